"""Preferences: setters, context managers, threads, and torch's own determinism."""

from __future__ import annotations

import threading

import pytest
import torch

import natten
from natten.context import NattenContext, Preferences


def test_initial_state():
    assert NattenContext.get() == Preferences()
    assert not natten.are_deterministic_algorithms_enabled()
    assert natten.is_kv_parallelism_in_fused_na_enabled()
    assert natten.get_memory_usage_preference() == "default"
    assert natten.is_memory_usage_default()
    assert not natten.is_flex_compile_allowed()
    assert not natten.is_flex_compile_backprop_allowed()


def test_memory():
    for pref in ("strict", "unrestricted", "default"):
        natten.set_memory_usage_preference(pref)
        assert natten.get_memory_usage_preference() == pref
        flags = {
            "default": natten.is_memory_usage_default(),
            "strict": natten.is_memory_usage_strict(),
            "unrestricted": natten.is_memory_usage_unrestricted(),
        }
        assert flags == {name: name == pref for name in flags}
    for bad in ("much", None, ["strict"], 1):
        with pytest.raises(ValueError, match="pref must be one of"):
            natten.set_memory_usage_preference(bad)


def test_flex_flags_are_independent():
    natten.allow_flex_compile_backprop()
    assert not natten.is_flex_compile_allowed()
    assert natten.is_flex_compile_backprop_allowed()
    natten.allow_flex_compile()
    natten.disable_flex_compile_backprop()
    assert natten.is_flex_compile_allowed()
    assert not natten.is_flex_compile_backprop_allowed()
    natten.allow_flex_compile_backprop()
    natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed()
    assert not natten.is_flex_compile_backprop_allowed()


def test_determinism_and_kv_parallelism():
    natten.use_deterministic_algorithms()
    assert natten.are_deterministic_algorithms_enabled()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    with pytest.raises(RuntimeError, match="not deterministic"):
        natten.use_kv_parallelism_in_fused_na(True)
    natten.use_kv_parallelism_in_fused_na(False)
    natten.use_deterministic_algorithms(False)
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    natten.use_kv_parallelism_in_fused_na()
    assert natten.is_kv_parallelism_in_fused_na_enabled()


def test_torch_determinism_counts():
    torch.use_deterministic_algorithms(True)
    assert natten.are_deterministic_algorithms_enabled()
    assert not natten.is_kv_parallelism_in_fused_na_enabled()
    with pytest.raises(RuntimeError, match="not deterministic"):
        natten.use_kv_parallelism_in_fused_na(True)
    torch.use_deterministic_algorithms(False)
    assert natten.is_kv_parallelism_in_fused_na_enabled()


@pytest.mark.parametrize("bad", [1, None, "yes"])
def test_flags_are_bools(bad):
    with pytest.raises(ValueError, match="mode must be a bool"):
        natten.use_deterministic_algorithms(bad)
    with pytest.raises(ValueError, match="mode must be a bool"):
        natten.use_kv_parallelism_in_fused_na(bad)


def test_as_context_managers():
    natten.set_memory_usage_preference("strict")
    with natten.set_memory_usage_preference("unrestricted"):
        assert natten.is_memory_usage_unrestricted()
        # A change of something else inside stays.
        natten.allow_flex_compile()
    assert natten.is_memory_usage_strict()
    assert natten.is_flex_compile_allowed()

    def fail():
        with natten.use_deterministic_algorithms(), natten.disable_flex_compile():
            assert natten.are_deterministic_algorithms_enabled()
            assert not natten.is_flex_compile_allowed()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not natten.are_deterministic_algorithms_enabled()
    assert natten.is_flex_compile_allowed()


def test_reset():
    natten.use_deterministic_algorithms()
    natten.set_memory_usage_preference("strict")
    natten.allow_flex_compile()
    NattenContext.reset()
    assert NattenContext.get() == Preferences()


def test_threads():
    """Process-wide, and no update of one field loses another."""
    seen = []
    natten.allow_flex_compile()
    thread = threading.Thread(target=lambda: seen.append(natten.is_flex_compile_allowed()))
    thread.start()
    thread.join()
    assert seen == [True]

    def memory():
        for _ in range(300):
            with natten.set_memory_usage_preference("strict"):
                pass

    def flags():
        for _ in range(300):
            with natten.use_kv_parallelism_in_fused_na(False):
                pass

    threads = [threading.Thread(target=target) for target in (memory, flags) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert natten.is_flex_compile_allowed()
