"""Kernels that are compiled before they are needed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import natten
from natten import cli, devices
from natten.functional.problem import DEFAULT_CONFIG
from natten.simulator import make_problem

pytest.importorskip("triton")

from triton.runtime import driver

from natten.functional.backends.triton import CUTLASS, ahead, launcher, tiles
from natten.functional.backends.triton.forward import forward_kernel
from natten.functional.backends.triton.launcher import Compilation, Launch


def _problem(*grid: int, dtype: torch.dtype = torch.float16):
    return make_problem(grid, (3,) * len(grid), heads=2, head_dim=16, dtype=dtype)


@pytest.fixture
def compiled():
    """What would be compiled, by kernel and number of programs."""
    found = []

    def run(self: Compilation, device: torch.device | None) -> None:
        found.append((self.kernel.__name__, self.programs))

    with mock.patch.object(Compilation, "run", run):
        yield found


def test_kernels_are_in_the_cache(tmp_path, monkeypatch):
    """Compiled for a GPU that is not here, and loaded by a second time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # What other tests have compiled is in memory.
    forward_kernel.device_caches.clear()
    assert natten.precompile(_problem(12), gpu="h100", backward=False, workers=1) == 1
    assert len(list(tmp_path.rglob("forward_kernel.cubin"))) == 1
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")}
    assert natten.precompile(_problem(12), gpu="h100", backward=False, workers=1) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.cubin")} == written


def test_calls_of_a_model_are_found(compiled):
    """Whatever they are in, without computing anything; a call that is made twice, once."""
    attention = natten.NeighborhoodAttention2D(32, 2, kernel_size=3)
    model = torch.nn.Sequential(attention, attention, torch.nn.Linear(32, 32)).half()
    x = torch.randn(2, 5, 6, 32).half()
    assert natten.precompile(model, x, gpu="h100") == len(compiled) == 2
    # Of so few tokens, which computes those of key and value, too.
    assert {name for name, _ in compiled} == {"forward_kernel", "query_gradient_kernel"}
    assert natten.precompile(model, x, gpu="h100", backward=False) == 1


def test_backward_kernels_are_compiled_meanwhile(compiled):
    """From the first forward pass on, those that the backward pass launches, which waits for
    them."""
    problem = replace(_problem(40, 30), requires_grad=True, device=torch.device("cuda"))
    # Other tests may have left some, of launches that were to come.
    launcher._pending.clear()
    with devices.pretending(devices.find("h100")):
        ahead.compile_backward(CUTLASS, problem, DEFAULT_CONFIG)
        pending = [future for futures in launcher._pending.values() for future in futures]
        wait(pending)
        found = set(compiled)
        inputs, results, needs = ahead.without_memory(problem)
        with launcher.collecting(any_order=False) as wanted:
            CUTLASS.backward(problem, DEFAULT_CONFIG, inputs, results, needs)
    assert len(pending) == len(found) == 2
    assert found == {(c.kernel.__name__, c.programs) for c in wanted}
    finished = []

    def launch(kernel: object, *_: object) -> None:
        assert all(future.done() for future in futures)
        finished.append(kernel)

    done = threading.Event()
    with ThreadPoolExecutor(2) as pool, mock.patch.object(launcher, "_launch", launch):
        for compilation in wanted:
            futures = launcher._pending[compilation.kernel] = [pool.submit(done.wait)]
            threading.Timer(0.05, done.set).start()
            Launch(compilation.kernel, 1, compilation.arguments)._compile(())
    assert finished == [c.kernel for c in wanted]
    assert not launcher._pending


def test_kernels_that_are_compiled_are_not_launched_while_others_are_collected():
    """What collects kernels has tensors without memory."""
    compiled, kernel = mock.Mock(), mock.Mock()
    known, unknown = torch.empty(2, device="meta"), torch.empty(2, device="meta").half()
    launch = Launch(kernel, 1, ("rest",), compiled={((known.dtype, True),): compiled})
    with launcher.collecting(any_order=False) as found:
        launch.run(known)
        launch.run(unknown)
    assert found == [Compilation(kernel, 1, (unknown, "rest"), {"enable_fp_fusion": True})]
    assert not compiled.run.called
    assert not kernel.mock_calls


def test_what_launches_a_kernel_is_compiled_with_it():
    """For the GPU that is here, and only there; nothing is loaded on it."""
    kernel, launcher_of = mock.Mock(), mock.Mock()
    compilation = Compilation(kernel, 5, ("x",), {"num_warps": 4})
    with (
        mock.patch("torch.cuda.device", return_value=nullcontext()) as on,
        mock.patch.object(driver, "_active", SimpleNamespace(launcher_cls=launcher_of)),
    ):
        compilation.run()
        assert not launcher_of.called
        assert not on.called
        compilation.run(torch.device("cuda", 1))
    on.assert_called_once_with(torch.device("cuda", 1))
    compiled = kernel.warmup.return_value
    launcher_of.assert_called_once_with(compiled.src, compiled.metadata)
    assert kernel.warmup.call_args_list == [mock.call("x", grid=(5,), num_warps=4)] * 2
    assert not compiled.run.called


def test_problems(compiled):
    problems = [_problem(40, 30), _problem(40, 30), _problem(13, 17)]
    assert natten.precompile(problems, gpu="a100", backward=False) == 2
    assert len({programs for _, programs in compiled}) == 2


def test_kernels_of_dilation_groups(compiled):
    """Hopper's own, as without dilation."""
    if launcher.in_gluon("hopper_forward") is None:
        pytest.skip("this Triton has no Gluon")
    problem = make_problem(
        (256, 256), (128, 32), dilation=(1, 4), heads=8, head_dim=128, dtype=torch.bfloat16
    )
    natten.precompile(problem, gpu="h100")
    assert {name for name, _ in compiled} == {
        "longest_kernel", "hopper_forward_kernel", "statistics_kernel", "hopper_gradients_kernel",
    }  # fmt: skip


def test_whatever_the_order_of_the_sizes_will_be():
    """Tiles are those that each size has where it is the first, not those of sizes before it."""
    grids = [(40 + 9 * n, 31 + 5 * n) for n in range(12)]
    problems = [
        make_problem(grid, (7, 7), heads=2, head_dim=32, dtype=torch.float16, device="cuda")
        for grid in grids
    ]
    with devices.pretending(devices.find("h100")):
        best = [CUTLASS.forward_tiling(problem, DEFAULT_CONFIG) for problem in problems]
        reused = [tiles.reuse(p, tiles.FORWARD, t) for p, t in zip(problems, best, strict=True)]
        assert reused != best
        for problem, tiling in zip(problems, best, strict=True):
            (kernel,) = ahead.kernels(CUTLASS, problem, DEFAULT_CONFIG)
            variant = kernel.arguments[-1]
            assert (variant.QUERY_TILE[1:], variant.KEY_TILE[1:]) == (tiling.query, tiling.key)


def test_command(compiled, capsys):
    words = ["precompile", "-i", "12", "14", "-w", "3", "-n", "2", "--more-sizes", "40x50"]
    words += ["--gpu", "h100"]
    assert cli.main(words) == 0
    assert "2 kernels for 2 sizes" in capsys.readouterr().out
    more = ["--sink", "--circular", "-w", "5", "--backprop"]
    with mock.patch("natten.precompiling.precompile", return_value=4) as precompile:
        assert cli.main([*words, *more]) == 0
    assert "4 kernels for 2 sizes" in capsys.readouterr().out
    (problems,) = precompile.call_args.args
    assert [(p.grid, p.kernel_size, p.heads) for p in problems] == [
        (size, (k, k), 1) for size in ((12, 14), (40, 50)) for k in (3, 5)
    ]
    assert all(p.has_sink and p.is_circular and p.requires_grad for p in problems)
    assert cli.main([*words[:-4], "--more-sizes", "40,50", "--gpu", "h100"]) == 2
    assert "such as 32x48" in capsys.readouterr().err


def test_what_fails_is_named():
    def fail(self: Compilation, device: torch.device | None) -> None:
        raise ValueError("too odd")

    with (
        mock.patch.object(Compilation, "run", fail),
        pytest.raises(RuntimeError, match=r"1 of 1 kernels .* forward_kernel: too odd"),
    ):
        natten.precompile(_problem(12), gpu="h100", backward=False)


def test_wrong_requests():
    with pytest.raises(ValueError, match="no call"):
        natten.precompile(torch.nn.Linear(3, 3), torch.ones(3), gpu="h100")
    with pytest.raises(ValueError, match="got 'cpu'"):
        natten.precompile(_problem(12), gpu="cpu")
    with pytest.raises(ValueError, match="Problems"):
        natten.precompile([3], gpu="h100")
    with pytest.raises(NotImplementedError, match="no kernel to compile"):
        natten.precompile(_problem(12, dtype=torch.float64), gpu="h100")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="gpu='h100'"):
            natten.precompile(_problem(12))


def test_the_driver_is_what_it_was():
    from triton.runtime import driver

    before = driver._active
    with ahead.target((9, 0)):
        assert driver.active.get_current_target().arch == 90
    assert driver._active is before
