"""Process-wide preferences: determinism, KV parallelism, memory use, compiled FlexAttention.

Every setter takes effect at once, for all threads. What it returns may be used as a context
manager, which puts the earlier value back::

    natten.set_memory_usage_preference("strict")            # from now on

    with natten.use_deterministic_algorithms(True):         # in this block
        ...

Backends read the preferences when they run, in the backward pass too, whichever thread runs it.
"""

from __future__ import annotations

import warnings
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from threading import RLock
from types import TracebackType
from typing import Any

import torch

from natten.types import MemoryPreference, MemoryUsagePreference


@dataclass(frozen=True)
class Preferences:
    """One immutable state of all preferences; see the setters for their meaning."""

    deterministic: bool = False
    kv_parallelism: bool = True
    memory: MemoryUsagePreference = MemoryUsagePreference.Default
    flex_compile: bool = False
    flex_compile_backprop: bool = False

    def __hash__(self) -> int:
        return hash(self.identity)

    @cached_property
    def identity(self) -> tuple[bool | str, ...]:
        """What tells them apart. Every call looks things up by its preferences, and hashes of
        enumerations, and those that are computed in Python, are slow."""
        return tuple([v if isinstance(v, bool) else str(v) for v in astuple(self)])


_lock = RLock()
_preferences = Preferences()


class _Change:
    """A change that is already in effect; leaving it as a context undoes it."""

    def __init__(self, **values: Any) -> None:
        global _preferences
        with _lock:
            self._before = {name: getattr(_preferences, name) for name in values}
            _preferences = replace(_preferences, **values)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _preferences
        with _lock:
            _preferences = replace(_preferences, **self._before)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be a bool, got {value!r}")
    return value


def preferences() -> Preferences:
    """The preferences now in effect, torch's determinism included (an immutable snapshot)."""
    now = _preferences
    if not now.deterministic and torch.are_deterministic_algorithms_enabled():
        now = _torch_deterministic(now)
    return now


@lru_cache
def _torch_deterministic(now: Preferences) -> Preferences:
    return replace(now, deterministic=True)


def use_deterministic_algorithms(mode: bool = True) -> _Change:
    """Ask for backward passes that give the same bits on every run.

    ``torch.use_deterministic_algorithms`` has the same effect; either is enough. KV parallelism
    counts as disabled meanwhile. Backends without a deterministic backward pass decline.

    Args:
        mode: Whether to be deterministic. The initial state is False.

    Raises:
        ValueError: ``mode`` is not a bool.
    """
    return _Change(deterministic=_flag("mode", mode))


def are_deterministic_algorithms_enabled() -> bool:
    """Whether deterministic algorithms are asked for, here or by torch."""
    return preferences().deterministic


def use_kv_parallelism_in_fused_na(mode: bool = True) -> _Change:
    """Allow fused passes to work on several key tiles of one query tile at once.

    Faster where there are few queries, in backward passes also where there are few keys; needs more
    memory, and sums in an order that depends on how many there are.

    Args:
        mode: Whether to allow it. The initial state is True. While
            ``torch.use_deterministic_algorithms`` is in effect, True warns and changes nothing:
            programs say so at import, whatever torch was told.

    Raises:
        ValueError: ``mode`` is not a bool.
        RuntimeError: ``mode`` is True after ``natten.use_deterministic_algorithms``.
    """
    if _flag("mode", mode):
        if torch.are_deterministic_algorithms_enabled():
            warnings.warn(
                "KV parallelism is not deterministic, and torch.use_deterministic_algorithms(True) "
                "is in effect: use_kv_parallelism_in_fused_na(True) changes nothing",
                UserWarning,
                stacklevel=2,
            )
            return _Change()
        if _preferences.deterministic:
            raise RuntimeError(
                "KV parallelism is not deterministic and cannot be enabled while deterministic "
                "algorithms are; disable them first: natten.use_deterministic_algorithms(False)"
            )
    return _Change(kv_parallelism=mode)


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """Whether KV parallelism is allowed; never while deterministic algorithms are enabled."""
    now = preferences()
    return now.kv_parallelism and not now.deterministic


def set_memory_usage_preference(
    pref: MemoryPreference | MemoryUsagePreference = "default",
) -> _Change:
    """Say how much extra memory backward passes may use.

    KV parallelism needs float32 memory for partial sums, and so does the kernel for Hopper that
    computes all gradients in one pass: by default as much as one of the three gradients, with
    "unrestricted" twice that; with "strict" it is not used.

    Args:
        pref: "default", "strict" (little) or "unrestricted" (what is fastest), or the member of
            :class:`natten.context.MemoryUsagePreference`.

    Raises:
        ValueError: ``pref`` is none of these.
    """
    choices = tuple(map(str, MemoryUsagePreference))
    if not isinstance(pref, str) or pref not in choices:
        raise ValueError(f"pref must be one of {choices}, got {pref!r}")
    return _Change(memory=MemoryUsagePreference(pref))


def get_memory_usage_preference() -> MemoryUsagePreference:
    """The memory preference, a string too: equal to "default", "strict" or "unrestricted"."""
    return _preferences.memory


def is_memory_usage_default() -> bool:
    """Whether the memory preference is "default"."""
    return _preferences.memory == "default"


def is_memory_usage_strict() -> bool:
    """Whether the memory preference is "strict"."""
    return _preferences.memory == "strict"


def is_memory_usage_unrestricted() -> bool:
    """Whether the memory preference is "unrestricted"."""
    return _preferences.memory == "unrestricted"


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> _Change:
    """Allow ``torch_compile=True``: FlexAttention's forward pass compiled by torch.compile.

    Args:
        mode: False withdraws it, and compiled backward passes with it.
        backprop: Also :func:`allow_flex_compile_backprop`; False leaves that as it is.

    Raises:
        ValueError: An argument is not a bool, or ``backprop`` is asked for without ``mode``.
    """
    backprop = _flag("backprop", backprop)
    if not _flag("mode", mode):
        if backprop:
            raise ValueError("backprop=True needs mode=True: backward passes follow forward ones")
        return _Change(flex_compile=False, flex_compile_backprop=False)
    if backprop:
        return _Change(flex_compile=True, flex_compile_backprop=True)
    return _Change(flex_compile=True)


def disable_flex_compile() -> _Change:
    """Withdraw :func:`allow_flex_compile`; compiled backward passes go with it."""
    return allow_flex_compile(False)


def is_flex_compile_allowed() -> bool:
    """Whether FlexAttention's forward pass may be compiled. Initially False."""
    return _preferences.flex_compile


def allow_flex_compile_backprop(mode: bool = True) -> _Change:
    """Allow compiled FlexAttention to run where gradients are needed.

    Takes effect together with :func:`allow_flex_compile`, which it does not imply.

    Args:
        mode: False withdraws it.

    Raises:
        ValueError: ``mode`` is not a bool.
    """
    return _Change(flex_compile_backprop=_flag("mode", mode))


def disable_flex_compile_backprop() -> _Change:
    """Withdraw :func:`allow_flex_compile_backprop`."""
    return allow_flex_compile_backprop(False)


def is_flex_compile_backprop_allowed() -> bool:
    """Whether compiled FlexAttention may run where gradients are needed. Initially False."""
    return _preferences.flex_compile_backprop


class NattenContext:
    """The preferences as an object."""

    @staticmethod
    def get() -> Preferences:
        """The preferences now in effect."""
        return preferences()

    @staticmethod
    def reset() -> None:
        """Put every preference back to its initial value."""
        global _preferences
        with _lock:
            _preferences = Preferences()


__all__ = [
    "MemoryUsagePreference",
    "NattenContext",
    "Preferences",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "get_memory_usage_preference",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "preferences",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]
