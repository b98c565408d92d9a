"""The compiled CPU backend: correctness, determinism, and a process that always survives."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
from cases import CASES, Case
from checks import Inputs as Leaves
from checks import check_problem, make_inputs, run

from natten.functional import dispatch, neighborhood_attention_generic
from natten.functional.backend import Inputs, Results
from natten.functional.backends import cpu
from natten.functional.backends.cpu import plan
from natten.functional.problem import DEFAULT_CONFIG, Problem, Unavailable

pytest.importorskip("numba")

from natten.functional.backends.cpu import blocks

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def choose(monkeypatch, by_block):
    """Loops by block wherever they can, or loops by row."""
    monkeypatch.setattr(
        blocks, "pays", lambda problem, backward: by_block and blocks.covers(problem)
    )


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_eager_attention(case, dtype, monkeypatch):
    choose(monkeypatch, dtype in (torch.float32, torch.bfloat16))
    check_problem(case, "cpu", dtype)


def run_all(inputs, **arguments):
    """Output, logsumexp and all gradients of a call."""
    out, lse = neighborhood_attention_generic(
        inputs.query, inputs.key, inputs.value, rpb=inputs.rpb,
        additional_keys=inputs.additional_keys, additional_values=inputs.additional_values,
        backend="cpu", return_lse=True, **arguments,
    )  # fmt: skip
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + lse.sum()
    return [out, lse, *torch.autograd.grad(loss, list(inputs.tensors().values()))]


BIG = Case("big", (40, 40), (7, 7), heads=4, heads_kv=2, head_dim=32, additional=3, rpb=True)


@pytest.mark.usefixtures("two_threads")
def test_reruns_are_bitwise_equal():
    inputs = make_inputs(BIG, torch.float32)
    first = run_all(inputs, kernel_size=7)
    for _ in range(5):
        for a, b in zip(first, run_all(inputs, kernel_size=7), strict=True):
            assert torch.equal(a, b)


def test_boxes_do_not_change_results(monkeypatch, two_threads):
    """Halos, partial boxes and residues of the dilation, all at once."""
    inputs = make_inputs(BIG, torch.float64)
    arguments = {"kernel_size": (5, 7), "dilation": (2, 3), "stride": (2, 1)}
    inputs.rpb = torch.randn(4, 9, 13, dtype=torch.float64, requires_grad=True)
    whole = run_all(inputs, **arguments)
    monkeypatch.setattr(cpu.plan, "MAX_BOX_BYTES", 20_000)
    monkeypatch.setattr(cpu.plan, "MIN_BOX_BYTES", 20_000)
    cpu.plan.query_sweep.cache_clear()
    cpu.plan.key_sweep.cache_clear()
    boxes = run_all(inputs, **arguments)
    cpu.plan.query_sweep.cache_clear()
    cpu.plan.key_sweep.cache_clear()
    for a, b in zip(whole, boxes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


WIDE_WINDOWS = {
    "one axis": ((150,), {"kernel_size": 61}),
    "causal": ((150,), {"kernel_size": 61, "is_causal": True, "stride": 5}),
    "dilated": ((25, 34), {"kernel_size": (9, 13), "dilation": (1, 2), "stride": (4, 1)}),
    "ring": ((6, 12, 9), {"kernel_size": (5, 7, 6), "is_circular": (False, True, False)}),
}


@pytest.mark.parametrize("name", WIDE_WINDOWS)
@pytest.mark.usefixtures("two_threads")
def test_blocks_of_wide_windows(name, monkeypatch):
    """Windows of many chunks, boxes of few patches; neither the batch nor threads change a bit."""
    grid, arguments = WIDE_WINDOWS[name]
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    monkeypatch.setattr(plan, "MAX_MEMBERS", 3)
    choose(monkeypatch, True)
    plan.query_patches.cache_clear()
    plan.key_patches.cache_clear()
    torch.manual_seed(0)
    query = torch.randn(3, *grid, 4, 24, requires_grad=True)
    key = torch.randn(3, *grid, 2, 24, requires_grad=True)
    value = torch.randn(3, *grid, 2, 40, requires_grad=True)
    extra_keys = torch.randn(3, 21, 2, 24, requires_grad=True)
    extra_values = torch.randn(3, 21, 2, 40, requires_grad=True)
    sizes = np.broadcast_to(arguments["kernel_size"], len(grid))
    bias = torch.randn(4, *(2 * sizes - 1), requires_grad=True)
    rpb = None if "is_causal" in arguments else bias
    inputs = Leaves(query, key, value, rpb, extra_keys, extra_values)
    arguments = arguments | {"additional_lengths": torch.tensor([0, 17, 21])}
    found = run_all(inputs, **arguments)
    exact = inputs.to(torch.float64)
    choose(monkeypatch, False)
    for a, b in zip(found, run_all(exact, **arguments), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    choose(monkeypatch, True)
    torch.set_num_threads(1)
    last = [x.detach()[2:].requires_grad_() for x in (query, key, value, extra_keys, extra_values)]
    weight = torch.linspace(-1, 1, found[0].numel()).view(found[0].shape)[2:]
    out, lse = neighborhood_attention_generic(
        *last[:3], rpb=rpb, additional_keys=last[3], additional_values=last[4], backend="cpu",
        return_lse=True, **arguments | {"additional_lengths": None},
    )  # fmt: skip
    alone = [out, lse, *torch.autograd.grad((out * weight).sum() + lse.sum(), last)]
    of_entries = [*found[:5], *found[-2:]]
    for a, b in zip(of_entries, alone, strict=True):
        assert torch.equal(a[2:], b)


def test_blocks_leave_entries_that_are_not_finite_to_rows(monkeypatch):
    """The other entries keep their bits."""
    choose(monkeypatch, True)
    tensors = [torch.randn(3, 40, 1, 8) for _ in range(3)]
    tensors += [torch.randn(1, 17), torch.randn(3, 5, 1, 8), torch.randn(3, 5, 1, 8)]
    whole = run_all(Leaves(*(t.clone().requires_grad_() for t in tensors)), kernel_size=9)
    for number, place in ((0, 20), (1, 20), (2, 20), (4, 3), (5, 3)):
        poisoned = [t.clone() for t in tensors]
        poisoned[number][1, place, 0, 3] = torch.inf
        inputs = Leaves(*(t.requires_grad_() for t in poisoned))
        found = run_all(inputs, kernel_size=9)
        choose(monkeypatch, False)
        exact = run_all(inputs.to(torch.float64), kernel_size=9)
        choose(monkeypatch, True)
        for a, b, c in zip(found, whole, exact, strict=True):
            if len(a) == 3:  # the gradient of the bias is a sum over the batch
                assert torch.equal(a[::2], b[::2])
            torch.testing.assert_close(a.double(), c, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.usefixtures("two_threads")
def test_many_python_threads_at_once():
    inputs = make_inputs(BIG, torch.float32)
    expected = run_all(inputs, kernel_size=7)
    failures = []

    def work():
        for _ in range(5):
            got = run_all(inputs, kernel_size=7)
            if not all(map(torch.equal, expected, got)):
                failures.append(got)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_after_use():
    inputs = make_inputs(BIG, torch.float32)
    with torch.no_grad():
        expected = run(BIG, inputs, "cpu")[0].numpy()
        child = os.fork()
        if child == 0:
            # torch's own parallel operations may hang in a forked child; numpy's do not.
            equal = np.array_equal(run(BIG, inputs, "cpu")[0].numpy(), expected)
            os._exit(0 if equal else 1)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert status == 0


class Windows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.full((1, 16, 16, 1, 8), float(index))
        return neighborhood_attention_generic(x, x, x, kernel_size=3, backend="cpu")[0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers():
    Windows()[0]
    loaded = list(torch.utils.data.DataLoader(Windows(), batch_size=1, num_workers=2))
    for index, x in enumerate(loaded):
        torch.testing.assert_close(x, torch.full_like(x, float(index)))


def test_exceptions_on_helper_threads_reach_the_caller():
    def task():
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("helper")
        time.sleep(0.2)

    with pytest.raises(ValueError, match="helper"):
        cpu.parallel.run(task, 2)


def child_python(code, **environment):
    """Run a script in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_every_loop_does_without_a_folder_to_cache_it():
    """numba refuses when the modules of the loops are imported, or never."""
    refusing = """
        import numba.core.caching as caching
        def refuse(*args, **kwargs):
            raise RuntimeError("cannot cache function: no locator available")
        caching.FunctionCache.__init__ = refuse
        import torch
        from natten import na1d
        x = torch.randn(1, 9, 1, 8)
        na1d(x, x, x, kernel_size=3, backend="cpu")
    """
    ran = child_python(refusing)
    assert ran.returncode == 0, ran.stderr


def test_import_of_natten_does_not_import_numba():
    ran = child_python("import natten, sys; assert 'numba' not in sys.modules")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("features", ["", "+avx,+avx2,+fma,+f16c"])
def test_other_processors(features, tmp_path):
    """Loops compiled for less than this processor: shorter vectors, no fused multiply-add."""
    code = """
        import torch
        from natten.functional import neighborhood_attention_generic as na
        from natten.functional.backends.cpu import blocks
        torch.manual_seed(0)
        x = torch.randn(1, 13, 17, 2, 24)
        exact = na(*[x.double()] * 3, kernel_size=(5, 7), backend="reference")
        for by_block in (False, True):
            blocks.pays = lambda problem, backward: by_block
            for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
                out = na(*[x.to(dtype)] * 3, kernel_size=(5, 7), backend="cpu")
                assert (out.double() - exact).abs().max() < bound, (by_block, dtype)
    """
    ran = child_python(
        code, NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES=features, NUMBA_CACHE_DIR=str(tmp_path)
    )
    assert ran.returncode == 0, ran.stderr


FALLBACK = """
    import torch
    from natten.functional import neighborhood_attention_generic as na
    x = torch.randn(1, 9, 9, 1, 8)
    for _ in range(2):
        na(x, x, x, kernel_size=3)
    try:
        na(x, x, x, kernel_size=3, backend="cpu")
    except RuntimeError as error:
        print(error)
"""


def test_without_numba_another_backend_runs_and_says_so_once():
    hidden = "import sys\nsys.modules['numba'] = None\n"
    ran = child_python(hidden + textwrap.dedent(FALLBACK))
    assert ran.returncode == 0, ran.stderr
    assert "pip install" in ran.stdout
    assert ran.stderr.count("pip install numba") == 1


def test_without_jit_another_backend_runs():
    ran = child_python(FALLBACK, NUMBA_DISABLE_JIT="1")
    assert ran.returncode == 0, ran.stderr
    assert "NUMBA_DISABLE_JIT" in ran.stdout


def problem(**changes):
    fields = {
        "batch": 1, "query_shape": (8,), "key_shape": (8,), "heads": 1, "heads_kv": 1,
        "head_dim": 8, "head_dim_v": 8, "kernel_size": (3,), "stride": (1,), "dilation": (1,),
        "is_causal": (False,), "grid": (8,), "query_origin": (0,), "key_origin": (0,), "scale": 1.0,
    }  # fmt: skip
    return Problem(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": torch.device("cuda")}, "cuda"),
        ({"dtype": torch.complex64}, "complex64"),
        ({"kernel_size": (3,) * 4}, "4"),
    ],
)
def test_refusals_name_their_reason(changes, reason):
    assert reason in cpu.CPU.refusal(problem(**changes), DEFAULT_CONFIG)


def test_accepts_what_it_can_and_has_no_tiles():
    assert cpu.CPU.refusal(problem(), DEFAULT_CONFIG) is None
    assert cpu.CPU.configs(problem()) == cpu.CPU.backward_configs(problem()) == []


def test_missing_numba_is_the_environments_fault(monkeypatch):
    monkeypatch.setattr(cpu, "_numba_problem", lambda: "numba is missing")
    assert isinstance(cpu.CPU.refusal(problem(), DEFAULT_CONFIG), Unavailable)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("query", torch.zeros(1, 8, 1, 8, dtype=torch.bfloat16)),
        ("key", torch.zeros(1, 7, 1, 8)),
        ("value", torch.zeros(1, 8, 1, 9)),
        ("additional_keys", torch.zeros(1, 2, 1, 8)),
    ],
)
def test_loops_never_get_tensors_of_another_problem(name, wrong):
    """They would read out of bounds."""
    names = ["query", "key", "value", "rpb", "additional_keys", "additional_values"]
    right = dict.fromkeys(names[:3], torch.zeros(1, 8, 1, 8)) | dict.fromkeys(names[3:])
    tensors = list((right | {name: wrong}).values())
    with pytest.raises(ValueError, match=name):
        cpu.CPU.forward(problem(), DEFAULT_CONFIG, Inputs(*tensors))
    out, lse = cpu.CPU.forward(problem(), DEFAULT_CONFIG, Inputs(*right.values()))
    with pytest.raises(ValueError, match=name):
        cpu.CPU.backward(
            problem(), DEFAULT_CONFIG, Inputs(*tensors), Results(out, lse, out), (True,) * 6
        )


@pytest.mark.parametrize("name", ["grad_out", "grad_lse", "out", "lse"])
def test_loops_never_get_results_of_another_problem(name):
    x = torch.zeros(1, 8, 1, 8)
    inputs = Inputs(x, x, x)
    out, lse = cpu.CPU.forward(problem(), DEFAULT_CONFIG, inputs)
    results = {"grad_out": out, "grad_lse": lse, "out": out, "lse": lse}
    results[name] = results[name][:, :7]
    with pytest.raises(ValueError, match=f"^{name} must be"):
        cpu.CPU.backward(problem(), DEFAULT_CONFIG, inputs, Results(**results), (True,) * 6)


def test_chosen_on_the_cpu():
    assert dispatch.resolve(problem(), DEFAULT_CONFIG) is cpu.CPU


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_survives(dtype):
    """A window of one key copies values: all bit patterns, so all roundings that change nothing."""
    value = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    value = value.view(1, -1, 1, 8)
    zeros = torch.zeros_like(value)
    out = neighborhood_attention_generic(zeros, zeros, value, kernel_size=1, backend="cpu")
    torch.testing.assert_close(out, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_as_torch_does(dtype):
    """A third of every number of the type: never representable, often subnormal."""
    pattern = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    pattern = pattern[pattern.isfinite()]
    rows = pattern[: len(pattern) // 8 * 8].view(-1, 8)
    value = torch.stack([rows, rows.roll(1, 0), rows.roll(2, 0)], 1).view(1, -1, 1, 8)
    zeros = torch.zeros_like(value)
    # Blocks of three tokens share a window.
    out = neighborhood_attention_generic(
        zeros, zeros, value, kernel_size=3, stride=3, backend="cpu"
    )
    mean = value.double().view(-1, 3, 8).mean(1).to(dtype).double()
    error = (out.double().view(-1, 3, 8) - mean[:, None]).abs()
    unit = torch.finfo(dtype).eps * mean.abs() + torch.finfo(dtype).smallest_normal / 128
    finite = mean.isfinite()
    assert (error <= unit[:, None])[finite[:, None].expand_as(error)].all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("kernel_size", [5, 16])
def test_nan_and_infinity_as_in_eager_attention(poison, where, kernel_size):
    """Poison reaches exactly the rows that eager attention over the window gives it to."""
    tensors = {name: torch.randn(1, 16, 1, 8) for name in ("query", "key", "value")}
    tensors[where][0, 6, 0, 3] = poison
    out = neighborhood_attention_generic(**tensors, kernel_size=kernel_size, backend="cpu")
    for i in range(16):
        start = min(max(i - kernel_size // 2, 0), 16 - kernel_size)
        q = tensors["query"][0, i, 0]
        k, v = (tensors[n][0, start : start + kernel_size, 0] for n in ("key", "value"))
        scores = k @ q * 8**-0.5
        expected = scores.softmax(0) @ v
        torch.testing.assert_close(out[0, i, 0], expected, equal_nan=True)


def test_causal_dense_attention_does_not_see_later_poison():
    x = torch.randn(1, 700, 1, 8)
    value = x.clone()
    value[0, 650] = float("nan")
    out = neighborhood_attention_generic(x, x, value, 700, is_causal=True, backend="cpu")
    assert out[0, :650].isfinite().all()
    assert out[0, 650:].isnan().all()


def test_scores_too_large_for_exp():
    x = 100 * torch.randn(1, 64, 1, 16)
    out, lse = neighborhood_attention_generic(x, x, x, 9, backend="cpu", return_lse=True)
    exact, exact_lse = neighborhood_attention_generic(
        *[x.double()] * 3, 9, backend="reference", return_lse=True
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-3)


def test_cost_is_linear_in_tokens():
    """Four times the tokens take far less than the sixteen times of quadratic cost."""
    times = []
    for size in (64, 128):
        x = torch.randn(1, size, size, 2, 32)
        runs = []
        for _ in range(5):
            start = time.thread_time()
            neighborhood_attention_generic(x, x, x, 7, backend="cpu")
            runs.append(time.thread_time() - start)
        times.append(min(runs))
    assert times[1] < 8 * times[0]


MEMORY = """
    from pathlib import Path
    import torch
    from natten.functional import neighborhood_attention_generic as na

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

    torch.set_num_threads(2)
    small = torch.randn(1, 8, 8, 4, 32)
    na(small, small, small, kernel_size=7, backend="cpu")
    for shape in ((2, 112, 112, 4, 32), (1, 224, 224, 1, 64)):
        q, k, v = (torch.randn(shape) for _ in range(3))
        Path("/proc/self/clear_refs").write_text("5")  # forgets earlier peaks
        before = peak()
        out = na(q, k, v, kernel_size=7, backend="cpu")
        print((peak() - before) / out.nbytes)
        del out
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory")
def test_forward_needs_little_memory():
    ran = child_python(MEMORY)
    assert ran.returncode == 0, ran.stderr
    # The output itself is one.
    assert all(0.9 < float(line) < 2.0 for line in ran.stdout.split()), ran.stdout
