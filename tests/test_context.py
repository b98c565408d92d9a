"""Preferences: setters, context managers, threads, and torch's own determinism."""

from __future__ import annotations

import pickle
import threading
import warnings

import pytest
import torch

import natten
from natten.context import MemoryUsagePreference, NattenContext, Preferences


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
    torch.use_deterministic_algorithms(False)
    assert natten.is_kv_parallelism_in_fused_na_enabled()


@pytest.mark.parametrize("before", [True, False])
def test_kv_parallelism_changes_nothing_under_torch_determinism(before):
    """Programs ask for it at import; natten's own determinism, which is asked for too, wins."""
    natten.use_kv_parallelism_in_fused_na(before)
    torch.use_deterministic_algorithms(True)
    with pytest.warns(UserWarning, match="changes nothing") as record:
        change = natten.use_kv_parallelism_in_fused_na(True)
    with change:
        assert not natten.is_kv_parallelism_in_fused_na_enabled()
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with natten.use_kv_parallelism_in_fused_na(False):
            pass
    torch.use_deterministic_algorithms(False)
    assert natten.is_kv_parallelism_in_fused_na_enabled() is before


def test_flex_flags_take_arguments():
    def flags():
        return natten.is_flex_compile_allowed(), natten.is_flex_compile_backprop_allowed()

    for call, expected in (
        (lambda: natten.allow_flex_compile(True), (True, False)),
        (lambda: natten.allow_flex_compile(mode=True, backprop=True), (True, True)),
        # What is not said stays.
        (lambda: natten.allow_flex_compile(backprop=False), (True, True)),
        (lambda: natten.allow_flex_compile_backprop(mode=False), (True, False)),
        (lambda: natten.allow_flex_compile_backprop(True), (True, True)),
        (lambda: natten.allow_flex_compile(False), (False, False)),
    ):
        call()
        assert flags() == expected
    with natten.allow_flex_compile(True, True):
        assert flags() == (True, True)
    assert flags() == (False, False)
    with pytest.raises(ValueError, match="backprop=True needs mode=True"):
        natten.allow_flex_compile(False, True)
    for function, name in (
        (natten.allow_flex_compile, "mode"),
        (natten.allow_flex_compile, "backprop"),
        (natten.allow_flex_compile_backprop, "mode"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a bool, got 1"):
            function(**{name: 1})


def test_memory_preference_is_a_string_and_a_member():
    for number, (name, text) in enumerate(
        {"Default": "default", "Strict": "strict", "Unrestricted": "unrestricted"}.items()
    ):
        member = MemoryUsagePreference[name]
        for preference in (text, member):
            natten.set_memory_usage_preference(preference)
            got = natten.get_memory_usage_preference()
            assert got is member
            assert got == text != "other"
            assert hash(got) == hash(text)
            assert f"{got}" == str(got) == text
            assert got.value == number
            assert MemoryUsagePreference(number) is got
            assert pickle.loads(pickle.dumps(got)) is got
    with pytest.raises(ValueError, match="pref must be one of"):
        natten.set_memory_usage_preference(0)


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
