"""Programs that use this package, reduced to how they call it: forward and backward, against the
fused operations or dense attention. Call forms of transformers are in test_transformers.py.
"""

from __future__ import annotations

import einops
import pytest
import torch
from torch import Tensor, nn

import natten
from natten.context import NattenContext
from natten.window import Axis, grid_mask


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float, **window) -> Tensor:
    """Masked attention of heads-last tensors."""
    tokens = query.shape[1:-2]
    sizes = {k: v if isinstance(v, tuple) else (v,) * len(tokens) for k, v in window.items()}
    ones = (1,) * len(tokens)
    axes = map(
        Axis,
        tokens,
        sizes["kernel_size"],
        sizes.get("stride", ones),
        sizes.get("dilation", ones),
        sizes.get("is_causal", (False,) * len(tokens)),
    )
    flat = (t.flatten(1, -3).transpose(1, 2) for t in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(
        *flat, attn_mask=grid_mask(list(axes), device=query.device), scale=scale
    )
    return out.transpose(1, 2).unflatten(1, tokens)


def assert_same(got: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    """Values and gradients."""
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-4)
    grad = torch.randn_like(got)
    for a, b in zip(
        *(torch.autograd.grad(out, inputs, grad, retain_graph=True) for out in (got, wanted))
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


class DiffusionBlock(nn.Module):
    """As in hourglass diffusion transformers (k-diffusion and what grew from it)."""

    def __init__(self, channels: int, head_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.head_dim, self.kernel_size = head_dim, kernel_size
        self.heads = channels // head_dim
        self.norm = nn.RMSNorm(channels)
        self.qkv_proj = nn.Linear(channels, 3 * channels, bias=False)
        self.scale = nn.Parameter(torch.full([self.heads], 10.0))
        self.out_proj = nn.Linear(channels, channels, bias=False)

    def cosine(self, x: Tensor, scale: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * scale.sqrt()

    def forward(self, x: Tensor, fused: bool) -> Tensor:
        skip, qkv = x, self.qkv_proj(self.norm(x))
        if fused and natten.has_fused_na():
            q, k, v = einops.rearrange(qkv, "n h w (t nh e) -> t n h w nh e", t=3, e=self.head_dim)
            scale = self.scale[:, None]
            q, k = self.cosine(q, scale), self.cosine(k, scale)
            x = natten.functional.na2d(q, k, v, self.kernel_size, scale=1.0)
            x = einops.rearrange(x, "n h w nh e -> n h w (nh e)")
        else:
            q, k, v = einops.rearrange(qkv, "n h w (t nh e) -> t n nh h w e", t=3, e=self.head_dim)
            scale = self.scale[:, None, None, None]
            q, k = self.cosine(q, scale), self.cosine(k, scale)
            weights = natten.functional.na2d_qk(q, k, self.kernel_size).softmax(dim=-1)
            x = natten.functional.na2d_av(weights, v, self.kernel_size)
            x = einops.rearrange(x, "n nh h w e -> n h w (nh e)")
        return self.out_proj(x) + skip


def test_diffusion_block():
    block = DiffusionBlock(64, 32, 7)
    x = torch.randn(2, 12, 9, 64, requires_grad=True)
    assert_same(block(x, True), block(x, False), [x, *block.parameters()])


@pytest.mark.parametrize("kernel_size", [(3, 7, 7), (3, 5, 5), (5, 5, 5)], ids=str)
def test_video_decoder(kernel_size):
    """LTX-2: three axes, a scale of 1 after normalized heads, no key parallelism, and a backend
    that is named or not."""
    natten.use_kv_parallelism_in_fused_na(False)
    qkv = torch.randn(1, 5, 8, 7, 3 * 2 * 64, requires_grad=True)
    q, k, v = qkv.unflatten(-1, (3, 2, 64)).unbind(-3)
    q, k = nn.functional.normalize(q, dim=-1) * 4, nn.functional.normalize(k, dim=-1) * 4
    out = natten.na3d(q, k, v, kernel_size=kernel_size, scale=1.0, backend=None)
    assert_same(out, dense(q, k, v, 1.0, kernel_size=kernel_size), [qkv])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="it runs on cuda"):
            natten.na3d(q, k, v, kernel_size=kernel_size, scale=1.0, backend="cutlass-fna")


COSMOS = {
    "strided": dict(kernel_size=(4, 6, 8), stride=(1, 4, 8)),
    "dilated": dict(kernel_size=(4, 4, 4), dilation=(1, 2, 3)),
    "causal": dict(kernel_size=(4, 4, 4), is_causal=(True, False, False)),
    "whole": dict(kernel_size=(4, 8, 12)),
}


@pytest.mark.parametrize("window", COSMOS)
def test_cosmos(window):
    """Cosmos-Predict2: everything by name, None for what is not chosen, -1 resolved by the
    caller."""
    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    arguments = dict(stride=1, dilation=1, is_causal=False) | COSMOS[window]
    shape = (1, 4, 8, 12, 2, 128)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    out = natten.functional.neighborhood_attention_generic(
        query=q,
        key=k,
        value=v,
        **arguments,
        backend=None,
        q_tile_shape=None,
        kv_tile_shape=None,
        backward_q_tile_shape=None,
        backward_kv_tile_shape=None,
        backward_kv_splits=None,
        backward_use_pt_reduction=False,
        run_persistent_kernel=True,
    )
    assert natten.is_memory_usage_unrestricted()
    assert_same(out, dense(q, k, v, 128**-0.5, **COSMOS[window]), [q, k, v])


def test_music_analysis():
    """all-in-one: one and two axes, a bias for each head."""
    from natten.functional import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb

    for rank, qk, av in ((1, natten1dqkrpb, natten1dav), (2, natten2dqkrpb, natten2dav)):
        tokens, dilation = (24, 12)[:rank], 2
        q, k, v = (torch.randn(2, 3, *tokens, 8, requires_grad=True) for _ in range(3))
        bias = torch.randn(3, *(9,) * rank, requires_grad=True)
        weights = qk(q / 8**0.5, k, bias, 5, dilation).softmax(-1)
        out = av(weights, v, 5, dilation)
        fused = natten.functional.neighborhood_attention_generic(
            *(t.movedim(1, -2) for t in (q, k, v)), kernel_size=5, dilation=dilation, rpb=bias
        ).movedim(-2, 1)
        assert_same(out, fused, [q, k, v, bias])


def test_style_generator():
    """StyleNAT: branches of heads, each with its own window, everything but tensors by name."""
    natten.use_fused_na(False)
    natten.use_autotuner(False)
    qkv = torch.randn(1, 12, 12, 3, 2, 8, requires_grad=True)
    bias = torch.randn(2, 5, 5, requires_grad=True)
    q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
    for dilation in (1, 4):
        weights = natten.functional.na2d_qk(
            q * 8**-0.5, k, kernel_size=(3, 3), dilation=(dilation, dilation), rpb=bias
        )
        out = natten.functional.na2d_av(
            weights.softmax(dim=-1), v, kernel_size=(3, 3), dilation=(dilation, dilation)
        )
        heads_last = (t.movedim(1, 3) for t in (q, k, v))
        fused = natten.na2d(*heads_last, 3, dilation=dilation, rpb=bias).movedim(3, 1)
        assert_same(out, fused, [qkv, bias])
    natten.use_fused_na()


def test_segmentation_backbone():
    """SegMAN: neighborhood attention with global tokens, switches, and handles for fvcore."""
    from natten.flops import add_natten_handle, av_2d_flop, qk_2d_rpb_flop
    from natten.functional import na2d_av, na2d_qk, use_gemm_na

    use_gemm_na(True)
    natten.functional.use_fused_na(True)
    assert callable(add_natten_handle)
    assert callable(qk_2d_rpb_flop)
    assert callable(av_2d_flop)
    q, k, v = (torch.randn(1, 2, 9, 8, 16, requires_grad=True) for _ in range(3))
    weights = na2d_qk(q, k, kernel_size=7, dilation=1).softmax(-1)
    out = na2d_av(weights, v, kernel_size=7, dilation=1)
    fused = natten.na2d(*(t.movedim(1, 3) for t in (q, k, v)), 7, scale=1.0).movedim(3, 1)
    assert_same(out, fused, [q, k, v])


def test_upsampler():
    """NAF: few channels in queries and keys, many in values; one name or the other."""
    q, k = (torch.randn(1, 1, 10, 12, 8, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 1, 10, 12, 48, requires_grad=True)
    scores = natten.functional.na2d_qk(q, k, kernel_size=5, dilation=2) * 8**-0.5
    out = natten.functional.na2d_av(scores.softmax(-1), v, kernel_size=5, dilation=2)
    fused = natten.functional.na2d(
        *(t.movedim(1, 3) for t in (q, k, v)), kernel_size=5, dilation=2, stride=1
    ).movedim(3, 1)
    assert_same(out, fused, [q, k, v])


def test_dynamic_convolution():
    """OverLoCK: weights of a contrast between regions, one set for each half of the channels, with
    biases of their own and windows of two sizes."""
    weights = torch.randn(2, 2, 9, 9, 25 + 49, requires_grad=True)
    value = torch.randn(2, 2, 2, 9, 9, 6, requires_grad=True)
    small, large = torch.split(weights, [25, 49], dim=-1)
    out = torch.cat(
        [
            natten.functional.na2d_av(small, value[0], kernel_size=5),
            natten.functional.na2d_av(large, value[1], kernel_size=7),
        ],
        dim=1,
    )
    axes = [Axis(9, 5)] * 2
    table = torch.zeros(2, 2, 81, 81)
    table = table.masked_scatter(grid_mask(axes).expand(2, 2, -1, -1), small)
    wanted = (table @ value[0].flatten(2, 3)).unflatten(2, (9, 9))
    assert_same(out[:, :2], wanted, [weights, value])


def test_agile_module():
    """AgileFormer: the bias by position, between tensors and window."""
    from natten.functional import na2d_av, na2d_qk_with_bias

    q, k, v = torch.randn(3, 1, 2, 8, 8, 4, requires_grad=True).unbind()
    bias = torch.randn(2, 5, 5)
    weights = na2d_qk_with_bias(q, k, bias, 3, 2).softmax(dim=-1)
    assert na2d_av(weights, v, 3, 2).equal(
        natten.na2d_av(natten.na2d_qk(q, k, 3, 2, rpb=bias).softmax(-1), v, 3, 2)
    )


def test_audio():
    """stable-audio-tools: a sequence, and tensors of 16 bits."""
    q, k, v = (torch.randn(1, 2, 40, 16, dtype=torch.float16) for _ in range(3))
    weights = natten.functional.na1d_qk(q, k, kernel_size=9, dilation=1).softmax(dim=-1)
    out = natten.functional.na1d_av(weights, v, kernel_size=9, dilation=1)
    fused = natten.na1d(*(t.transpose(1, 2) for t in (q, k, v)), 9, scale=1.0).transpose(1, 2)
    torch.testing.assert_close(out, fused, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("parametrization", ["context", "bias"])
def test_classification_repository(parametrization):
    """NAT and DiNAT: which argument asks for the bias depends on natten.context."""
    bias = {"rel_pos_bias": True} if parametrization == "context" else {"bias": True}
    assert hasattr(natten, "context")
    module = natten.NeighborhoodAttention2D(
        32,
        kernel_size=7,
        dilation=None,
        num_heads=2,
        qkv_bias=True,
        qk_scale=None,
        attn_drop=0.0,
        proj_drop=0.0,
        **bias,
    )
    assert sorted(module.state_dict()) == [
        "proj.bias", "proj.weight", "qkv.bias", "qkv.weight", "rpb",
    ]  # fmt: skip
    assert module.rpb.shape == (2, 13, 13)
    x = torch.randn(1, 14, 9, 32, requires_grad=True)
    out = module(x)
    qkv = module.qkv(x).unflatten(-1, (3, 2, 16)).permute(3, 0, 4, 1, 2, 5)
    scores = natten.natten2dqkrpb(qkv[0] * 0.25, qkv[1], module.rpb, 7, 1)
    attended = natten.natten2dav(scores.softmax(-1), qkv[2], 7, 1)
    assert_same(out, module.proj(attended.movedim(1, 3).flatten(-2)), [x, *module.parameters()])


def test_weather():
    module = natten.NeighborhoodAttention3D(dim=16, num_heads=2, kernel_size=3)
    x = torch.randn(1, 3, 4, 5, 16, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape


def test_physics():
    """PhysicsNeMo: the window by position, dilation by name."""
    for rank, operation in enumerate((natten.na1d, natten.na2d, natten.na3d), start=1):
        q, k, v = (torch.randn(1, *(6,) * rank, 2, 8, requires_grad=True) for _ in range(3))
        out = operation(q, k, v, 3, dilation=2)
        wanted = dense(q, k, v, 8**-0.5, kernel_size=3, dilation=2)
        assert_same(out, wanted, [q, k, v])


def test_preferences_reset():
    natten.use_kv_parallelism_in_fused_na(False)
    NattenContext.reset()
    assert natten.is_kv_parallelism_in_fused_na_enabled()
