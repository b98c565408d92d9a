"""Who runs a problem, and what is said when nobody or somebody else should."""

from __future__ import annotations

import logging

import pytest
import torch

import natten
from natten.functional import dispatch
from natten.functional.backend import Backend
from natten.functional.problem import DEFAULT_CONFIG, Config, Unavailable, decode_config
from natten.types import KernelSchedule

Q = torch.randn(1, 8, 9, 2, 16)


class Fake(Backend):
    """A backend that says what the test wants."""

    def __init__(self, name, reason=None, pairs=()):
        self.name = name
        self.reason = reason
        self.pairs = list(pairs)
        self.asked = 0

    def refusal(self, problem, config):
        self.asked += 1
        return self.reason

    def configs(self, problem):
        return self.pairs

    backward_configs = configs

    def forward(self, problem, config, inputs):
        self.config = config
        query = inputs.query
        return query.new_zeros(problem.output_shape), query.new_zeros(problem.lse_shape)

    def backward(self, problem, config, inputs, results, needs, destinations=None):
        raise AssertionError("nobody asked for gradients")


@pytest.fixture
def table(monkeypatch):
    """Replace backends by fakes; the result takes them."""
    fakes = {}
    load = dispatch.load
    monkeypatch.setattr(dispatch, "load", lambda name: fakes.get(name) or load(name))
    dispatch._resolve.cache_clear()
    yield lambda *backends: fakes.update({b.name: b for b in backends})
    dispatch._resolve.cache_clear()


def test_some_backend_is_always_found():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        query = Q.to(dtype, copy=True).requires_grad_()
        natten.na2d(query, query, query, 3).float().sum().backward()


def test_first_that_can(table):
    table(Fake("cpu", "not today"), Fake("flex"))
    chosen = natten.explain(Q, Q, Q, 3).chosen
    assert chosen == "flex-fna"
    table(Fake("cpu"))
    assert natten.explain(Q, Q, Q, 3).chosen == "cpu-fna"


def test_named_backend_never_falls_back(table):
    table(Fake("cpu", "windows of 3 are not for me"), Fake("flex", Unavailable("no such chip")))
    with pytest.raises(NotImplementedError, match="'cpu' cannot run this problem: windows of 3"):
        natten.na2d(Q, Q, Q, 3, backend="cpu-fna")
    with pytest.raises(RuntimeError, match="'flex' cannot run this problem: no such chip"):
        natten.na2d(Q, Q, Q, 3, backend="flex-fna")


def test_gpu_backends_decline_cpu_tensors():
    for name in ("cutlass", "hopper", "blackwell"):
        with pytest.raises((RuntimeError, NotImplementedError), match=f"'{name}' cannot run"):
            natten.na2d(Q, Q, Q, 3, backend=f"{name}-fna")
        with pytest.raises((RuntimeError, NotImplementedError), match=f"'{name}' cannot run"):
            natten.attention(Q[0], Q[0], Q[0], backend=f"{name}-fmha")
        # The way of a full window honours the name too.
        with pytest.raises((RuntimeError, NotImplementedError), match=f"'{name}' cannot run"):
            natten.na2d(Q, Q, Q, (8, 9), backend=f"{name}-fna")


def test_cpu_backend_declines_other_devices():
    problem_tensors = [torch.empty(1, 8, 9, 2, 16, device="meta")] * 3
    explanation = natten.explain(*problem_tensors, 3)
    reasons = {d.backend: d.reason for d in explanation.decisions}
    assert reasons["cpu-fna"] == "it runs on cpu tensors, and these are on meta"


@pytest.mark.parametrize("name", ["reference", "reference-fna"])
def test_names(name):
    assert natten.na2d(Q, Q, Q, 3, backend=name).shape == Q.shape


def test_nobody_can(table, monkeypatch):
    table(*(Fake(name, f"{name} is out") for name in ("cpu", "flex", "reference")))
    with pytest.raises(NotImplementedError, match="cpu: cpu is out; flex: flex is out; reference"):
        natten.na2d(Q, Q, Q, 3)


def test_missing_numba_is_said_once(table, caplog):
    table(Fake("cpu", Unavailable("numba is missing: pip install 'natten[cpu]'")))
    dispatch._suggested.clear()
    with caplog.at_level(logging.WARNING, "natten"):
        for kernel_size in (3, 5, 7):
            natten.na2d(Q, Q, Q, kernel_size)
    assert caplog.text.count("pip install") == 1


def test_preferences_are_part_of_the_decision(table):
    class Undecided(Fake):
        def refusal(self, problem, config):
            on = natten.are_deterministic_algorithms_enabled()
            return "not deterministic" if on else None

    table(Undecided("cpu"))
    natten.na2d(Q, Q, Q, 3, backend="cpu-fna")
    with (
        natten.use_deterministic_algorithms(),
        pytest.raises(NotImplementedError, match="not deterministic"),
    ):
        natten.na2d(Q, Q, Q, 3, backend="cpu-fna")
    natten.na2d(Q, Q, Q, 3, backend="cpu-fna")


TILES = [((4, 4), (4, 8)), ((8, 8), (8, 8))]


def test_tiles(table):
    backend = Fake("cpu", pairs=TILES)
    table(backend)
    tiles = {"q_tile_shape": (4, 4), "kv_tile_shape": [4, 8]}
    natten.na2d(Q, Q, Q, 3, **tiles)
    assert backend.config == Config(q_tile_shape=(4, 4), kv_tile_shape=(4, 8))
    with pytest.raises(ValueError, match=r"'cpu' lists, got \(4, 4\)/\(8, 8\); valid: \(4, 4\)/"):
        natten.na2d(Q, Q, Q, 3, q_tile_shape=(4, 4), kv_tile_shape=(8, 8))
    with pytest.raises(ValueError, match="backward_q_tile_shape and backward_kv_tile_shape must"):
        natten.na2d(Q, Q, Q, 3, backward_q_tile_shape=(1, 1), backward_kv_tile_shape=(8, 8))
    # Tile shapes of the given rank keep a full window on its axes.
    natten.na2d(Q, Q, Q, (8, 9), **tiles)
    assert backend.config.q_tile_shape == (4, 4)
    # No tiles at all: nothing to choose from, and nothing to complain of.
    natten.na2d(Q, Q, Q, 3, backend="reference", **tiles)


def test_tiles_with_schedules(table):
    pairs = [(TILES[0], KernelSchedule.WarpSpecializedPingpong), (TILES[1], "coop")]
    backend = Fake("cpu", pairs=pairs)
    table(backend)
    tiles = {"q_tile_shape": (4, 4), "kv_tile_shape": (4, 8)}
    natten.na2d(Q, Q, Q, 3, **tiles)
    natten.na2d(Q, Q, Q, 3, kernel_schedule="pp", **tiles)
    schedule = KernelSchedule.WarpSpecializedPingpong
    natten.na2d(Q, Q, Q, 3, kernel_schedule=schedule, **tiles)
    assert backend.config.kernel_schedule == "pp"
    with pytest.raises(ValueError, match="with kernel_schedule='coop'"):
        natten.na2d(Q, Q, Q, 3, kernel_schedule="coop", **tiles)


def test_attention_tiles(table):
    backend = Fake("cpu", pairs=[((64,), (128,))])
    table(backend)
    flat = Q.flatten(1, 2)
    natten.attention(flat, flat, flat, q_tile_size=64, kv_tile_size=128, backward_kv_splits=3)
    assert backend.config.q_tile_shape == (64,)
    assert backend.config.backward_kv_splits == (3,)
    with pytest.raises(ValueError, match="valid"):
        natten.attention(flat, flat, flat, q_tile_size=64, kv_tile_size=64)


@pytest.mark.parametrize(
    "config",
    [
        DEFAULT_CONFIG,
        Config(q_tile_shape=(4, 4, 8), kv_tile_shape=(4, 4, 8)),
        Config(backward_kv_splits=(2, 3), backward_use_pt_reduction=True),
        Config(run_persistent_kernel=False, kernel_schedule="coop", torch_compile=True),
    ],
)
def test_config_survives_its_text(config):
    assert decode_config(config.encode()) == config
    assert (config.encode() == "") == (config == DEFAULT_CONFIG)


def test_explanation_of_a_call_with_extras():
    """Whatever a call asks for beside its window is in the table."""
    assert "\nwith" not in str(natten.explain(Q, Q, Q, 3))
    mask = torch.ones(Q.shape[:-2], dtype=torch.bool)
    extras = {
        "additional_keys": Q[:, 0, :5], "additional_values": Q[:, 0, :5], "softcap": 2.5,
        "additional_lengths": torch.tensor([3] * len(Q)), "sink": torch.zeros(Q.shape[-2]),
        "key_mask": mask, "query_mask": mask, "rpb": torch.zeros(Q.shape[-2], 5, 5),
    }  # fmt: skip
    assert (
        "\nwith 5 additional keys, lengths of these, a bias, softcap=2.5, a sink, a mask of keys, "
        "a mask of queries\n"
    ) in str(natten.explain(Q, Q, Q, 3, **extras))


def test_explanation():
    explanation = natten.explain(Q, Q, Q, 3)
    names = [d.backend for d in explanation.decisions]
    assert names == [
        "blackwell-fna",
        "hopper-fna",
        "cutlass-fna",
        "cpu-fna",
        "flex-fna",
        "reference-fna",
    ]
    text = str(explanation)
    assert "8x9 queries" in text
    assert "runs on cuda tensors, and these are on cpu" in text
    assert sum("> " in line for line in text.splitlines()) == 1
    assert explanation.chosen in text
    with pytest.raises(ValueError, match="kernel_size"):
        natten.explain(Q, Q, Q, 99)


def test_config_getters():
    getters = [name for name in natten.__all__ if "configs_for" in name]
    assert len(getters) == 14
    flat = Q.flatten(1, 2)
    for name in getters:
        getter = getattr(natten, name)
        assert getter.__name__ == name
        query = flat if name.endswith("fmha") else Q
        entries = getter(query, query, query)
        assert isinstance(entries, list)
    # One axis: attention's tiles are plain integers.
    assert (128, 128) in natten.get_configs_for_flex_fmha(flat, flat, flat)
    assert ((128,), (128,)) in natten.get_configs_for_flex_fna(flat, flat, flat)
    # Backends that cannot run such tensors have nothing to list.
    assert natten.get_configs_for_cutlass_hopper_fna(Q, Q, Q) == []


def test_public_names():
    assert natten.HAS_LIBNATTEN is True
    assert all(hasattr(natten, name) for name in natten.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        natten.nonsense  # noqa: B018
