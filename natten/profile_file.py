"""Profile files: which backend and tiles were fastest on a device, for later calls to use.

``natten profile --optimize --save FILE`` writes them, :func:`load_profile` or the environment
variable ``NATTEN_PROFILE`` apply them; :mod:`natten.tuned` says what then holds for which calls.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from natten import devices, tuned, validation
from natten.functional import dispatch, operators
from natten.functional.problem import Config, Problem
from natten.tuned import (
    VARIABLE,
    Entry,
    ShapeClass,
    lookup,
    preferred_backend,
    shape_class,
    with_profile,
)

FORMAT = "natten profile"
VERSION = 1


@dataclass(frozen=True)
class Profile:
    """What a file holds.

    Attributes:
        device: The driver's name of the device that was measured.
        capability: Its CUDA compute capability; None for a CPU.
        entries: One for each shape class, with and without gradients.
        natten_version: That wrote the file.
    """

    device: str
    capability: tuple[int, int] | None
    entries: tuple[Entry, ...]
    natten_version: str


def _encode(value: Any) -> Any:
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value


def save_profile(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a profile; the file is complete or not there."""
    entries = [
        {
            "problem": {f.name: _encode(getattr(e.problem, f.name)) for f in fields(Problem)},
            "backend": e.backend,
            "config": {name: _encode(value) for name, value in asdict(e.config).items()},
            "ms": e.ms,
        }
        for e in profile.entries
    ]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "natten": profile.natten_version,
        "device": profile.device,
        "capability": _encode(profile.capability),
        "entries": entries,
    }
    target = Path(path)
    draft = target.with_name(target.name + ".part")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(target)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _check_problem(p: Problem) -> None:
    """Raise ValueError unless ``p`` is a problem that a call can state."""
    if not isinstance(p.kernel_size, tuple) or not 1 <= len(p.kernel_size) <= 3:
        raise ValueError(f"kernel_size must have 1, 2 or 3 values, got {p.kernel_size!r}")
    windows = (p.kernel_size, p.stride, p.dilation, p.is_causal)
    grid = validation.int_tuple("grid", p.grid, p.rank)
    if validation.check_window(grid, *windows) != windows or grid != p.grid:
        raise ValueError(
            f"grid and window must have a value for each axis, got {p.grid}, {windows}"
        )
    for name, minimum in (
        ("query_shape", 1), ("key_shape", 1), ("query_origin", 0), ("key_origin", 0),
    ):  # fmt: skip
        values = getattr(p, name)
        if validation.int_tuple(name, values, p.rank, minimum) != values:
            raise ValueError(f"{name} must have a value for each axis, got {values!r}")
    for name, minimum in (
        ("batch", 1), ("heads", 1), ("heads_kv", 1), ("head_dim", 1), ("head_dim_v", 1),
        ("num_additional", 0), ("max_seqlen_q", 0), ("max_seqlen_kv", 0),
    ):  # fmt: skip
        value = getattr(p, name)
        if type(value) is not int or value < minimum:
            raise ValueError(f"{name} must be an int of at least {minimum}, got {value!r}")
    for name in (
        "has_lengths", "has_rpb", "has_sink", "has_key_mask", "has_query_mask", "varlen",
        "requires_grad",
    ):  # fmt: skip
        validation.optional_bool(name, getattr(p, name))
    if p.heads % p.heads_kv:
        raise ValueError(f"heads must be a multiple of heads_kv, got {p.heads} and {p.heads_kv}")
    validation.check_softcap(p.softcap)
    if not math.isfinite(validation.check_scale(p.scale, p.head_dim)):
        raise ValueError(f"scale must be finite, got {p.scale}")


def _decode_entry(entry: dict[str, Any]) -> Entry:
    values = _tuples(entry["problem"])
    values["dtype"] = getattr(torch, values["dtype"])
    values["device"] = torch.device(values["device"])
    if not isinstance(values["dtype"], torch.dtype):
        raise ValueError(f"{values['dtype']!r} is no dtype")
    problem = Problem(**values)
    _check_problem(problem)
    knobs = _tuples(entry["config"])
    config = Config(
        *validation.check_knobs(problem.rank, [knobs.pop(f.name) for f in fields(Config)])
    )
    if knobs:
        raise ValueError(f"no setting is called {', '.join(map(repr, knobs))}")
    if entry["backend"] not in dispatch.BACKENDS:
        raise ValueError(f"no backend is called {entry['backend']!r}")
    ms = entry["ms"]
    if type(ms) not in (int, float) or not 0 < ms < math.inf:
        raise ValueError(f"ms must be a positive number, got {ms!r}")
    return Entry(problem, entry["backend"], config, float(ms))


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Read a profile without applying it.

    Raises:
        ValueError: The file is not a profile of this version, or damaged.
        FileNotFoundError: There is no such file.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}")
        if type(document["version"]) is not int or document["version"] != VERSION:
            raise ValueError(
                f"its version is {document['version']!r}, and this natten reads {VERSION}"
            )
        for name in ("device", "natten"):
            if not isinstance(document[name], str):
                raise ValueError(f"{name} must be a text, got {document[name]!r}")
        if not isinstance(document["entries"], list):
            raise ValueError(f"entries must be a list, got {document['entries']!r}")
        capability = document["capability"]
        if capability is not None:
            capability = validation.int_tuple("capability", capability, 2, 0)
        return Profile(
            document["device"],
            capability,
            tuple(_decode_entry(entry) for entry in document["entries"]),
            document["natten"],
        )
    except (
        ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError,
    ) as error:  # fmt: skip
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{os.fspath(path)} is not a usable natten profile: {reason}") from error


def check_device(path: str | os.PathLike[str], profile: Profile) -> None:
    """Raise ValueError unless the profile was measured on the device that is here."""
    if profile.capability is None:
        here = devices.driver_name("cpu")
    elif not torch.cuda.is_available():
        here = "none (no CUDA device)"
    else:
        here = devices.driver_name("cuda")
    if here != profile.device:
        raise ValueError(
            f"{os.fspath(path)} is a profile of another device: it was measured on "
            f"{profile.device!r}, and the device here is {here!r}"
        )


def _apply(entries: dict[tuple[ShapeClass, bool], Entry] | None) -> None:
    tuned.entries = entries
    dispatch.forget()
    operators.forget()


def load_profile(path: str | os.PathLike[str] | None) -> int:
    """Let later calls use the backends and tiles of a profile file.

    Calls that name a backend or tiles are not changed. What was loaded before stays, except for
    shape classes that the file holds as well.

    Args:
        path: A file that ``natten profile --optimize`` wrote; None forgets all that was loaded.

    Returns:
        The number of entries that now apply.

    Raises:
        ValueError: The file is damaged, not a profile, or of another device.
        FileNotFoundError: There is no such file.
    """
    if path is None:
        entries: dict[tuple[ShapeClass, bool], Entry] = {}
    else:
        profile = read_profile(path)
        check_device(path, profile)
        entries = dict(tuned.entries or {})
        for e in profile.entries:
            try:
                dispatch.check_tiles(dispatch.load(e.backend), e.problem, e.config)
            except ValueError as error:
                raise ValueError(f"{os.fspath(path)} cannot be used here: {error}") from error
            entries[shape_class(e.problem), e.problem.requires_grad] = e
    _apply(entries)
    return len(entries)


@contextmanager
def without_profile() -> Iterator[None]:
    """Inside, nothing that was loaded applies: backends choose for themselves."""
    kept = tuned.entries
    _apply({})
    try:
        yield
    finally:
        _apply(kept)


def merged(profile: Profile, entries: Iterable[Entry]) -> Profile:
    """The profile with the entries, which replace those of the same shape class."""

    def key(entry: Entry) -> tuple[ShapeClass, bool]:
        return shape_class(entry.problem), entry.problem.requires_grad

    by_class = {key(e): e for e in (*profile.entries, *entries)}
    return Profile(
        profile.device, profile.capability, tuple(by_class.values()), profile.natten_version
    )


__all__ = [
    "VARIABLE",
    "Entry",
    "Profile",
    "check_device",
    "load_profile",
    "lookup",
    "merged",
    "preferred_backend",
    "read_profile",
    "save_profile",
    "shape_class",
    "with_profile",
    "without_profile",
]
