"""Attention modules whose grid of tokens is sharded over ranks.

A module with a :class:`Plan` in its attribute ``plan`` calls it instead of attending alone; inside
of :func:`natten.distributed.context_parallel` the context's plan stands in for those of modules
without one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from natten.distributed.attention import neighborhood_attention
from natten.distributed.boxes import Box
from natten.distributed.exchange import gathered
from natten.distributed.sharding import GridSharding, check_own
from natten.functional import attention, merge_attentions
from natten.functional.head_groups import of_groups
from natten.functional.neighborhood import middle
from natten.nn.core import NeighborhoodModule, fit_mask, fitted


@dataclass(frozen=True)
class Plan:
    """How attention is shared out.

    Attributes:
        sharding: Which box of tokens is whose.
        options: Arguments for `neighborhood_attention`.
        padded: The sharding with the padding that a module's window needs, if it is known.
    """

    sharding: GridSharding
    options: dict[str, Any] = field(default_factory=dict)
    padded: GridSharding | None = None

    def of_module(self, module: Any) -> Plan:
        """The plan that one module keeps: compilers cannot make shardings."""
        if isinstance(module, NeighborhoodModule):
            return replace(self, padded=self._padded_for(module))
        return self

    def _padded_for(self, module: NeighborhoodModule) -> GridSharding:
        sharding = self.sharding
        for size, _, distance in module.head_windows() if module.pad else []:
            sharding = sharding.padded([k * d for k, d in zip(size, distance)])
        return sharding

    def self_attention(
        self,
        module: Any,
        x: Tensor,
        registers: Tensor | None,
        origin: Any,
        grid: Any,
        mask: Tensor | None,
    ) -> Any:
        """What ``NeighborhoodAttention.forward`` returns, of this rank's box."""
        own, padded = self._boxes(module, origin, grid)
        x = _padded(x, "x", own, padded.own)
        valid = None if mask is None else fit_mask(mask, x, list(own.extent))
        query, key, value = module._separated(
            module._heads(x), list(padded.own.origin), True, list(padded.grid)
        )
        if registers is None:
            return module._output(self._attend(module, padded, query, key, value, mask=valid))
        module._check_registers(x, registers)
        query_r, key_r, value_r = module._project(registers, None, False)
        out = self._attend(module, padded, query, key, value, key_r, value_r, mask=valid)
        # Registers do not attend to the padding.
        key, value = _cropped(key, own), _cropped(value, own)
        out_r = self._attend_registers(module, query_r, key, value, key_r, value_r, mask)
        return module._output(out), module._output(out_r)

    def cross_attention(
        self,
        module: Any,
        x: Tensor,
        context: Tensor | None,
        context_lengths: Tensor | None,
        source: Tensor | None,
        origin: Any,
        grid: Any,
    ) -> Tensor:
        """What ``NeighborhoodCrossAttention.forward`` returns, of this rank's box."""
        own, padded = self._boxes(module, origin, grid)
        x = _padded(x, "x", own, padded.own)
        source = None if source is None else _padded(source, "source", own, padded.own)
        query, key, value = module._project(x, source, list(padded.own.origin), list(padded.grid))
        keys, values, lengths = module._contexts(x.shape[0], context, context_lengths)
        out = self._attend(module, padded, query, key, value, keys, values, lengths)
        return module._output(out)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``[batch, *tokens, channels]`` over all tokens of the grid."""
        check_own(x, "x", self.sharding.own)
        total = x.flatten(1, -2).sum(1) / prod(self.sharding.grid)
        return gathered(total, self.sharding.group).sum(0)

    def _boxes(self, module: Any, origin: Any, grid: Any) -> tuple[Box, GridSharding]:
        """This rank's box, and the sharding with the padding that the module's window needs."""
        if origin is not None or grid is not None:
            raise ValueError("origin and grid must be None: the sharding says where x is in which")
        if module._drops():
            raise NotImplementedError(
                "dropout of attention weights is not implemented for a sharded grid"
            )
        return self.sharding.own, self.padded or self._padded_for(module)

    def _attend(
        self,
        module: Any,
        padded: GridSharding,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        additional_lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        grid = list(padded.grid)
        windows = [
            fitted(query, size, stride, dilation, module.clip_window, grid)
            for size, stride, dilation in module.head_windows()
        ]
        of_heads = {
            "query": (query, -2), "key": (key, -2), "value": (value, -2),
            "additional_keys": (additional_keys, -2),
            "additional_values": (additional_values, -2),
            "rpb": (None if module.rpb is None else module._own_heads(module.rpb), 0),
            "sink": (module._sink(), 0),
        }  # fmt: skip
        parts = {name: of_groups(t, len(windows), dim) for name, (t, dim) in of_heads.items()}
        outs = []
        for group, (kernel_size, stride, dilation) in enumerate(windows):
            given: Any = {name: tensors[group] for name, tensors in parts.items()}
            if given["rpb"] is not None:
                given["rpb"] = middle(given["rpb"], list(kernel_size))
            outs.append(
                neighborhood_attention(
                    **given, kernel_size=kernel_size, stride=stride, dilation=dilation,
                    is_causal=module.is_causal, is_circular=module.is_circular,
                    scale=module.scale, softcap=module.softcap,
                    additional_lengths=additional_lengths, key_mask=mask, query_mask=mask,
                    sharding=padded, **self.options,
                )
            )  # fmt: skip
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -2)
        return _cropped(out, self.sharding.own)

    def _attend_registers(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_r: Tensor,
        value_r: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention of registers to the tokens of all ranks and to each other: every rank has the
        part of its tokens, and all join all parts."""
        options: Any = {"scale": module.scale, "softcap": module.softcap, "return_lse": True}
        tokens = key.flatten(1, -3), value.flatten(1, -3)
        valid = None if mask is None else mask.flatten(1)
        out, lse = attention(query, *tokens, key_mask=valid, **options)
        own = attention(query, key_r, value_r, sink=module._sink(), **options)
        outs, lses = [
            [*gathered(part, self.sharding.group).unbind(), of_registers]
            for part, of_registers in zip((out, lse), own)
        ]
        merged = merge_attentions(outs, lses)
        return merged


def _padded(x: Tensor, name: str, own: Box, padded: Box) -> Tensor:
    """Zeros behind the tokens of a box, up to those of a larger one."""
    check_own(x, name, own)
    if own == padded:
        return x
    amounts = [0, 0]  # channels
    for extent, larger in zip(reversed(own.extent), reversed(padded.extent)):
        amounts += [0, larger - extent]
    return F.pad(x, amounts)


def _cropped(x: Tensor, own: Box) -> Tensor:
    """The first tokens along each axis of ``[batch, *tokens, ...]``."""
    for axis, extent in enumerate(own.extent, 1):
        if x.shape[axis] != extent:
            x = x.narrow(axis, 0, extent)
    return x


__all__ = ["Plan"]
