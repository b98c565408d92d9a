"""Soft cap, sink and masks of tokens in the modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import natten
from natten.nn import (
    NeighborhoodAttention2D,
    NeighborhoodCrossAttention2D,
    NeighborhoodTransformerBlock,
)

MODULE = {"softcap": 0.8, "sink": True, "num_kv_heads": 2, "dtype": torch.float64}


def module(**arguments: object) -> NeighborhoodAttention2D:
    torch.manual_seed(0)
    made = NeighborhoodAttention2D(16, 4, (3, 5), **{**MODULE, **arguments})
    torch.nn.init.normal_(made.sink)
    return made


def tokens(height: int = 7, width: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    mask = torch.rand(2, height, width) < 0.7
    return torch.randn(2, height, width, 16, dtype=torch.float64), mask


def by_function(attention: NeighborhoodAttention2D, x: Tensor, mask: Tensor) -> Tensor:
    heads = attention.qkv(x).unflatten(-1, (8, 4)).split([4, 2, 2], -2)
    out = natten.na2d(
        *heads, (3, 5), softcap=0.8, sink=attention.sink, key_mask=mask, query_mask=mask
    )
    return attention.proj(out.flatten(-2))


def test_as_the_function() -> None:
    attention, (x, mask) = module(), tokens()
    out, expected = attention(x, mask=mask), by_function(attention, x, mask)
    assert_close(out, expected)
    assert_close(
        torch.autograd.grad(out.sin().sum(), list(attention.parameters())),
        torch.autograd.grad(expected.sin().sum(), list(attention.parameters())),
    )
    assert_close(out[~mask], attention.proj.bias.expand_as(out[~mask]))
    # Not through one packed tensor.
    rotated = module(rotary=lambda heads, origin: heads)
    assert_close(rotated(x, mask=mask), expected)


def test_padding_is_not_valid() -> None:
    attention, (x, mask) = module(pad=True), tokens(2, 4)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 1))
    valid = torch.nn.functional.pad(mask, (0, 1, 0, 1))
    assert_close(attention(x, mask=mask), by_function(attention, padded, valid)[:, :2, :4])


def test_registers_see_valid_tokens() -> None:
    attention, (x, mask) = module(), tokens()
    registers = torch.randn(2, 3, 16, dtype=torch.float64)
    everything, of_registers = attention(x, registers, mask=mask)
    changed = torch.where(mask[..., None], x, 7.0)
    for got, expected in zip(attention(changed, registers, mask=mask), (everything, of_registers)):
        assert_close(got, expected)
    assert not torch.equal(attention(x, registers)[1], of_registers)


def test_maps_and_streams_know_of_caps_and_sinks() -> None:
    attention, (x, _) = module(is_causal=(True, False)), tokens()
    out, state = attention.stream(x[:, :4])
    more, _ = attention.stream(x[:, 4:], state)
    assert_close(torch.cat([out, more], 1), attention(x))
    maps = attention.attention_map(x, [(3, 2)])
    weights = maps.grid[:, 0].repeat_interleave(1, 1)
    value = attention.qkv(x).unflatten(-1, (8, 4))[..., 6:, :].repeat_interleave(2, -2)
    expected = torch.einsum("bhxy,bxyhd->bhd", weights.double(), value).flatten(1)
    assert_close(attention.proj(expected), attention(x)[:, 3, 2], atol=1e-6, rtol=1e-5)
    assert bool((weights.sum((-1, -2)) < 1).all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_scripted_and_exported() -> None:
    attention, (x, mask) = module(), tokens()
    expected = attention(x, mask=mask)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, mask=mask), expected)
    assert_close(torch.jit.script(attention)(x, mask=mask), expected)
    exported = torch.export.export(attention, (x,), {"mask": mask}).module()
    other = ~mask
    assert_close(exported(x, mask=other), attention(x, mask=other))


def test_blocks_and_cross_attention() -> None:
    x, mask = tokens()
    arguments = {"softcap": 0.8, "sink": True, "dtype": torch.float64}
    block = NeighborhoodTransformerBlock(16, 4, 3, **arguments)
    changed = torch.where(mask[..., None], x, 7.0)
    assert_close(block(x, mask=mask)[mask], block(changed, mask=mask)[mask])
    assert set(dict(block.named_parameters())) >= {"attn.sink"}
    crossed = NeighborhoodCrossAttention2D(16, 4, 3, context_dim=8, **arguments)
    context = torch.randn(2, 5, 8, dtype=torch.float64)
    out = crossed(x, context)
    torch.nn.init.constant_(crossed.sink, 30.0)
    assert_close(crossed(x, context), crossed.proj.bias.expand_as(out), atol=1e-6, rtol=0)


def test_refusals() -> None:
    attention, (x, mask) = module(attn_drop=0.1), tokens()
    with pytest.raises(NotImplementedError, match="dropout of attention weights"):
        attention(x, mask=mask)
    with pytest.raises(ValueError, match=r"mask must be a torch.Tensor or None, got \[True\]"):
        module()(x, mask=[True])
    for wrong in (mask[:1], mask.double(), mask[..., None]):
        with pytest.raises(ValueError, match="mask must be bools of the shape"):
            module()(x, mask=wrong)
    with pytest.raises(ValueError, match="softcap must be"):
        module(softcap=-1.0)
    block = NeighborhoodTransformerBlock(16, 4, 3, context_dim=8, dtype=torch.float64)
    context = torch.randn(2, 5, 8, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="a mask of a block with context_dim"):
        block(x, context=context, mask=mask)
    plain = NeighborhoodAttention2D(16, 4, (3, 5), num_kv_heads=2)
    with pytest.warns(UserWarning, match="sink=True"):
        plain.load_state_dict(module(attn_drop=0.0).state_dict(), strict=False)
