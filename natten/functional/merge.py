"""merge_attentions: attention over several contexts, as if they had been one."""

from __future__ import annotations

import dis
import logging
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from natten import validation

logger = logging.getLogger("natten")

# Below this, launching a handful of small kernels costs less than guarding a compiled function.
_FUSION_PAYS = 1 << 20


def _merge(outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(lses[0].dtype, torch.float32)
    stacked = torch.stack([lse.to(dtype) for lse in lses])
    nothing = stacked == -torch.inf
    top = stacked.detach().amax(0)
    # Where no branch saw a key, there is no maximum to subtract.
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (stacked - top).exp()
    total = weights.sum(0)
    seen = total != 0
    # The inner where keeps infinite derivatives of log out of the backward pass.
    safe_total = torch.where(seen, total, 1.0)
    lse = torch.where(seen, top + safe_total.log(), -torch.inf)
    shares = weights / safe_total
    # A branch that saw nothing has no say, whatever its output holds.
    out: Any = sum(
        share.unsqueeze(-1) * output.to(dtype).masked_fill(none.unsqueeze(-1), 0.0)
        for share, output, none in zip(shares.unbind(), outputs, nothing.unbind(), strict=True)
    )
    return out.to(outputs[0].dtype), lse


class _Fused:
    """_merge through torch.compile; once that fails, without."""

    def __init__(self) -> None:
        self._compiled: Callable[..., Any] | None = None
        self._broken = False

    def __call__(self, outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        if not self._broken:
            try:
                if self._compiled is None:
                    self._compiled = torch.compile(_merge, dynamic=True)
                return self._compiled(outputs, lses)
            except Exception as error:  # whatever a missing or broken compiler raises
                self._broken = True
                logger.warning("merge_attentions runs without torch.compile: %s", error)
        return _merge(outputs, lses)


_fused = _Fused()


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if not isinstance(outputs, (list, tuple)) or not isinstance(lses, (list, tuple)):
        raise ValueError(
            "outputs and lse_tensors must be lists of tensors, got "
            f"{type(outputs).__name__} and {type(lses).__name__}"
        )
    if len(outputs) < 2 or len(outputs) != len(lses):
        raise ValueError(
            "outputs and lse_tensors must have the same length of at least 2, got "
            f"{len(outputs)} and {len(lses)}"
        )
    first = outputs[0]
    for index, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        validation.check_is_tensor(f"outputs[{index}]", output)
        validation.check_is_tensor(f"lse_tensors[{index}]", lse)
        if output.dim() != 4:
            raise ValueError(
                f"outputs[{index}] must have 4 dimensions, [batch, seqlen, heads, head_dim], got "
                f"shape {tuple(output.shape)}"
            )
        if lse.dim() != 3:
            raise ValueError(
                f"lse_tensors[{index}] must have 3 dimensions, [batch, seqlen, heads], got shape "
                f"{tuple(lse.shape)}"
            )
        if output.shape != first.shape or output.dtype != first.dtype:
            raise ValueError(
                f"outputs[{index}] must match outputs[0], {tuple(first.shape)} {first.dtype}, got "
                f"{tuple(output.shape)} {output.dtype}"
            )
        if lse.shape != output.shape[:-1]:
            raise ValueError(
                f"lse_tensors[{index}] must have shape {tuple(output.shape[:-1])}, got "
                f"{tuple(lse.shape)}"
            )
        if output.device != first.device or lse.device != first.device:
            raise ValueError(
                f"outputs[{index}] and lse_tensors[{index}] must be on {first.device}, got "
                f"{output.device} and {lse.device}"
            )


@lru_cache(maxsize=256)
def _unpacks(code: CodeType, call: int) -> bool:
    """Whether the instruction after the one at ``call`` unpacks two values."""
    following = (i for i in dis.get_instructions(code) if i.offset > call)
    return next(((i.opname, i.arg) for i in following), None) == ("UNPACK_SEQUENCE", 2)


def _refuse_unpacking() -> None:
    """Raise if the caller of merge_attentions unpacks what is one tensor.

    A tensor unpacks along its first dimension: with a batch of 2, ``out, lse = ...`` would go on
    with the two entries of the batch. Compilers hide who calls.
    """
    caller = sys._getframe(2)
    if _unpacks(caller.f_code, caller.f_lasti):
        raise ValueError(
            "merge_attentions returns the output alone, and the caller unpacks two values: call it "
            "with return_lse=True for output and logsumexp"
        )


@overload
def merge_attentions(
    outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True,
    *, return_lse: Literal[False] = False, use_autograd_fix: bool = True,
) -> Tensor: ...  # fmt: skip


@overload
def merge_attentions(
    outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True,
    *, return_lse: Literal[True], use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def merge_attentions(
    outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor], torch_compile: bool = True,
    *, return_lse: bool, use_autograd_fix: bool = True,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    *,
    return_lse: bool = False,
    use_autograd_fix: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Merge attention outputs of the same queries over different keys, as if over all of them.

        lse = log(sum_i exp(lse_i)),    out = sum_i exp(lse_i - lse) * out_i

    computed in float32 (float64 for float64). Exactly differentiable in every output and every
    logsumexp, for any number of branches.

    Args:
        outputs: At least two of ``[batch, seqlen, heads, head_dim]``.
        lse_tensors: As many of ``[batch, seqlen, heads]``; -inf where a branch saw no key, whose
            output does then not count.
        torch_compile: Fuse the elementwise operations with torch.compile where it pays (large
            tensors on a GPU). Without a working compiler the merge runs unfused.
        return_lse: Also return the merged logsumexp.
        use_autograd_fix: For programs that pass it. Gradients are right with either value: those
            that reach the branches are the exact ones, and nothing is written into their outputs.

    Returns:
        The merged output in the outputs' dtype; with ``return_lse`` also the logsumexp. A query
        that saw no key in any branch gets 0 and -inf.

    Raises:
        ValueError: Lists of different length or of fewer than two tensors, tensors that do not
            match, flags that are not bool; and ``out, lse = merge_attentions(...)`` without
            ``return_lse``.
    """
    _check(outputs, lse_tensors)
    fuse = validation.optional_bool("torch_compile", torch_compile)
    validation.optional_bool("use_autograd_fix", use_autograd_fix)
    eager = not torch.compiler.is_compiling()
    if not validation.optional_bool("return_lse", return_lse) and eager:
        _refuse_unpacking()
    pays = fuse and eager and outputs[0].is_cuda and outputs[0].numel() >= _FUSION_PAYS
    out, lse = (_fused if pays else _merge)(list(outputs), list(lse_tensors))
    return (out, lse) if return_lse else out


__all__ = ["merge_attentions"]
