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


def heads_last(*tokens: int, heads: int = 2, dim: int = 16, value_dim: int | None = None):
    shape = (1, *tokens, heads)
    dims = (dim, dim, dim if value_dim is None else value_dim)
    return [torch.randn(*shape, d, requires_grad=True) for d in dims]


@pytest.mark.parametrize("value_dim", [64, 96])
def test_feature_upsamplers(value_dim):
    """AnyUp, JAFAR, NAF: values of many more channels than queries, everything by name; the backend
    that one of them names says what it lacks where it lacks it."""
    q, k, v = heads_last(12, 11, dim=8, value_dim=value_dim)
    window = dict(kernel_size=(3, 5), dilation=(2, 1))
    out = natten.na2d(q, k, v, **window, stride=1)
    assert_same(out, dense(q, k, v, 8**-0.5, **window), [q, k, v])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="it runs on cuda tensors, and these are on cpu"):
            natten.functional.na2d(q, k, v, **window, stride=1, backend="cutlass-fna")


COSMOS_TILES = {
    "hopper": ("h100", (4, 4, 8), (4, 4, 8)),
    "blackwell": ("b200", (8, 4, 8), (4, 4, 8)),
}


@pytest.mark.parametrize("backend", COSMOS_TILES)
def test_cosmos_tiles_are_accepted(backend):
    """The backends and tiles that it names, on devices that need not be here."""
    pytest.importorskip("triton")
    from natten import devices
    from natten.functional import dispatch
    from natten.functional.problem import Config
    from natten.simulator import make_problem

    device, q_tile, kv_tile = COSMOS_TILES[backend]
    problem = make_problem(
        (16, 44, 80), (16, 12, 24), stride=(1, 4, 8), heads=16, head_dim=128,
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    with devices.pretending(devices.find(device)):
        for schedule in (None, "coop") if backend == "hopper" else (None,):
            config = Config(q_tile, kv_tile, kernel_schedule=schedule)
            assert dispatch.resolve(problem, config, backend).name == backend
    dispatch.forget()


def test_cosmos_imports_under_determinism():
    """It asks for KV parallelism when it is imported, whatever the program told torch before."""
    torch.use_deterministic_algorithms(True)
    with pytest.warns(UserWarning, match="changes nothing"):
        natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference("unrestricted")
    q, k, v = heads_last(4, 6, 8)
    natten.functional.neighborhood_attention_generic(
        query=q, key=k, value=v, kernel_size=(4, 3, 4), stride=(1, 1, 2)
    ).sum().backward()
    assert natten.get_memory_usage_preference() == "unrestricted"


@pytest.mark.parametrize("return_lse", [False, True])
def test_cosmos_packed_towers(return_lse):
    """Two attentions of packed queries, merged: as the newer framework calls it, and as it reads
    here."""
    q = torch.randn(1, 10, 2, 16)
    context = [(torch.randn(1, n, 2, 16), torch.randn(1, n, 2, 16)) for n in (10, 7)]
    ends = torch.tensor([0, 4, 10], dtype=torch.int32)
    key_ends = [ends, torch.tensor([0, 3, 7], dtype=torch.int32)]
    parts = [
        natten.functional.attention(
            q, k, v, cumulative_seqlen_Q=ends, cumulative_seqlen_KV=kv_ends, max_seqlen_Q=6,
            max_seqlen_KV=6, return_lse=True,
        )
        for (k, v), kv_ends in zip(context, key_ends)
    ]  # fmt: skip
    outputs, lses = [p[0] for p in parts], [p[1] for p in parts]
    if not return_lse:
        with pytest.raises(ValueError, match="call it with return_lse=True"):
            merged, _ = natten.functional.merge_attentions(
                outputs=outputs, lse_tensors=lses, torch_compile=False
            )
        return
    merged, _ = natten.functional.merge_attentions(
        outputs=outputs, lse_tensors=lses, torch_compile=False, return_lse=True
    )
    for start, end, bounds in ((0, 4, [(0, 4), (0, 3)]), (4, 10, [(4, 10), (3, 7)])):
        k, v = (
            torch.cat([pair[i][:, a:b] for pair, (a, b) in zip(context, bounds)], 1) for i in (0, 1)
        )
        wanted = nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q[:, start:end], k, v))
        )
        torch.testing.assert_close(merged[:, start:end], wanted.transpose(1, 2))


@pytest.mark.parametrize("layout", ["qk", "dqk", "fused"])
def test_masked_audio(layout):
    """Transformers for sound: a keyword for the window, a padding mask between scores and softmax,
    float32 inside of half precision."""
    q, k, v = (torch.randn(2, 2, 30, 16).half() for _ in range(3))
    dtype = q.dtype
    q, k, v = (t.to(torch.float32) for t in (q, k, v))
    if layout == "fused":
        out = natten.na1d(*(t.transpose(1, 2) for t in (q, k, v)), 9, scale=1.0).transpose(1, 2)
    else:
        qk = {"qk": natten.functional.na1d_qk, "dqk": natten.functional.natten1dqk}[layout]
        av = {"qk": natten.functional.na1d_av, "dqk": natten.functional.natten1dav}[layout]
        scores = qk(q, k, kernel_size=9, dilation=1)
        mask = torch.zeros(2, 1, 30, 1, dtype=torch.bool)
        scores = scores.masked_fill(mask, -torch.finfo(scores.dtype).max)
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32)
        out = av(weights, v, kernel_size=9, dilation=1)
    wanted = dense(*(t.transpose(1, 2) for t in (q, k, v)), 1.0, kernel_size=9).transpose(1, 2)
    torch.testing.assert_close(out.to(dtype), wanted.to(dtype), atol=5e-3, rtol=5e-3)


def test_autoencoder_attention():
    """One head, a scalar window by position, `b c h w` moved to `b 1 h w c` and back."""
    q, k, v = torch.randn(3, 2, 8, 10, 12, requires_grad=True).unbind()
    one_head = [t.movedim(1, -1).unsqueeze(1) for t in (q, k, v)]
    weights = torch.softmax(natten.functional.natten2dqk(one_head[0], one_head[1], 5, 1), dim=-1)
    out = natten.functional.natten2dav(weights, one_head[2], 5, 1)[:, 0].movedim(-1, 1)
    wanted = dense(*(t[:, 0].unsqueeze(-2) for t in one_head), 1.0, kernel_size=5)
    torch.testing.assert_close(out, wanted[..., 0, :].movedim(-1, 1), atol=2e-5, rtol=2e-4)


def test_names_that_programs_try_one_after_the_other():
    """Short names, then long ones, then the generic function: whichever comes first is there."""
    from natten.functional import (
        na1d_av,
        na1d_qk,
        na2d_av,
        na2d_qk,
        na3d_av,
        na3d_qk,
        natten1dav,
        natten1dqkrpb,
        natten2dav,
        natten2dqkrpb,
        natten3dav,
        natten3dqkrpb,
    )

    short = [(na1d_qk, na1d_av), (na2d_qk, na2d_av), (na3d_qk, na3d_av)]
    long = [
        (natten1dqkrpb, natten1dav), (natten2dqkrpb, natten2dav), (natten3dqkrpb, natten3dav),
    ]  # fmt: skip
    for rank, ((qk, av), (qkrpb, long_av)) in enumerate(zip(short, long), start=1):
        q, k, v = torch.randn(3, 1, 2, *(6, 7, 5)[:rank], 8).unbind()
        weights = qk(q, k, 3, 1).softmax(-1)
        assert weights.equal(qkrpb(q, k, None, 3, 1).softmax(-1))
        assert av(weights, v, 3, 1).equal(long_av(weights, v, 3, 1))


def test_attention_with_an_offset_grid_of_values():
    """Weights between features of two images, used on a third: only the operations' shapes bind."""
    a, b, v = torch.randn(3, 1, 2, 9, 8, 4).unbind()
    weights = natten.functional.na2d_qk(a, b, kernel_size=(3, 5), dilation=(1, 1)).relu()
    out = natten.functional.na2d_av(weights, v, kernel_size=(3, 5), dilation=(1, 1))
    table = torch.zeros(1, 2, 72, 72)
    mask = grid_mask([Axis(9, 3), Axis(8, 5)])
    table = table.masked_scatter(mask.expand_as(table), weights)
    wanted = (table @ v.flatten(2, 3)).unflatten(2, (9, 8))
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_own_module_with_rotated_heads():
    """A module of a program's own: arguments through check_all_args, one operation for all."""
    from natten.functional import neighborhood_attention_generic
    from natten.types import CausalArgTypeOrDed, DimensionTypeOrDed
    from natten.utils.checks import check_all_args

    class Own(nn.Module):
        def __init__(
            self, na_dim: int, kernel_size: DimensionTypeOrDed, is_causal: CausalArgTypeOrDed
        ) -> None:
            super().__init__()
            self.window = check_all_args(na_dim, kernel_size, 1, 1, is_causal)
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            batch, *grid, channels = x.shape
            rank = len(grid)
            permutation = [rank + 1, 0, *range(1, rank + 1), rank + 2, rank + 3]
            qkv = self.qkv(x).reshape(batch, *grid, 3, 2, 8).permute(*permutation)
            kernel_size, stride, dilation, is_causal = self.window
            out = neighborhood_attention_generic(
                qkv[0].flip(-1), qkv[1].flip(-1), qkv[2], kernel_size=kernel_size, stride=stride,
                dilation=dilation, is_causal=is_causal, scale=0.5,
            )  # fmt: skip
            return out.reshape(batch, *grid, channels)

    for rank in (1, 2, 3):
        module = Own(rank, 3, (True, False, False)[:rank])
        x = torch.randn(1, *(5, 6, 4)[:rank], 16, requires_grad=True)
        q, k, v = module.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        wanted = dense(q, k, v, 0.5, kernel_size=3, is_causal=(True, False, False)[:rank])
        assert_same(module(x), wanted.flatten(-2), [x])


def test_subclasses_with_their_own_arguments():
    """As programs bridge versions: the older order outside, names inside."""

    class Bridged(natten.NeighborhoodAttention1D):
        def __init__(
            self, dim, num_heads, kernel_size, dilation=1, is_causal=False, rel_pos_bias=False,
            qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0,
        ):  # fmt: skip
            super().__init__(
                embed_dim=dim, num_heads=num_heads, kernel_size=kernel_size, stride=1,
                dilation=dilation, is_causal=is_causal, qkv_bias=qkv_bias, qk_scale=qk_scale,
                proj_drop=proj_drop,
            )  # fmt: skip

    module = Bridged(16, 2, 3, 2, True)
    same = natten.NeighborhoodAttention1D(16, 2, 3, dilation=2, is_causal=True)
    same.load_state_dict(module.state_dict())
    x = torch.randn(1, 9, 16)
    assert module(x).equal(same(x))


DEPTH = [
    # arguments, names, kernel_size, dilation, bias
    ((), dict(dim=16, num_heads=2, kernel_size=3), (3, 3, 3), (1, 1, 1), False),
    ((), dict(dim=16, num_heads=2, kernel_size=3, bias=True), (3, 3, 3), (1, 1, 1), True),
    (
        (),
        dict(dim=16, kernel_size=3, kernel_size_d=5, dilation=2, dilation_d=1, num_heads=2),
        (5, 3, 3), (1, 2, 2), True,
    ),
    ((16, 2, 3), dict(kernel_size_d=5, bias=False), (5, 3, 3), (1, 1, 1), False),
    ((16, 2, 3), dict(kernel_size_d=None, dilation_d=2), (3, 3, 3), (2, 1, 1), True),
    ((16, 2, 3, 5), dict(bias=True), (5, 3, 3), (1, 1, 1), True),
    ((16, 2, 3, 5, 2, 1), dict(bias=True), (5, 3, 3), (1, 2, 2), True),
    ((16, 2, 3, 2), {}, (3, 3, 3), (1, 1, 1), False),  # today's stride
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "named", "kernel_size", "dilation", "bias"), DEPTH)
def test_volumes_with_a_window_of_their_own_in_depth(arguments, named, kernel_size, dilation, bias):
    module = natten.NeighborhoodAttention3D(*arguments, **named)
    assert (module.kernel_size, module.dilation) == (kernel_size, dilation)
    assert (module.rpb is not None) is bias
    if "kernel_size_d" in named or "bias" in named:
        assert module.pad
        # Extents below the window, which only padding can take.
        assert module(torch.randn(1, 2, 4, 5, 16)).shape == (1, 2, 4, 5, 16)
    with pytest.raises(ValueError, match="kernel_size_d, dilation, dilation_d by position"):
        natten.NeighborhoodAttention3D(16, 2, 3, 5, bias=True, kernel_size_d=5)
    with pytest.raises(TypeError, match="kernel_size_d"):
        natten.NeighborhoodAttention2D(16, 2, 3, kernel_size_d=5)


def test_volumes_in_depth_are_the_unfused_products():
    """Names of 0.15 outside, its functions with depth first inside: forward and backward."""
    module = natten.NeighborhoodAttention3D(
        dim=16, num_heads=2, kernel_size=3, kernel_size_d=5, dilation=2, dilation_d=1
    )
    x = torch.randn(1, 5, 7, 8, 16, requires_grad=True)
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, 8)).permute(4, 0, 5, 1, 2, 3, 6)
    weights = natten.functional.na3d_qk_with_bias(q * module.scale, k, module.rpb, 5, 3, 1, 2)
    attended = natten.functional.natten3dav(weights.softmax(-1), v, 5, 3, 1, 2)
    wanted = module.proj(attended.movedim(1, 4).flatten(-2))
    assert_same(module(x), wanted, [x, *module.parameters()])


def test_token_permutation_as_servers_call_it():
    """vLLM-Omni: by name, with a dilation, there and back."""
    from natten.token_permute import token_permute_operation, token_unpermute_operation

    x = torch.randn(1, 6, 7, 10, 2, 8)
    for dilation in (None, (1, 2, 2)):
        permuted, layout, _ = token_permute_operation(
            x, tile_shape=(2, 4, 8), dilation=dilation, flip_tiled_dims=True, use_torch=True
        )
        assert tuple(layout) == (6, 7, 10)
        back = token_unpermute_operation(
            permuted, token_layout_shape=layout, tile_shape=(2, 4, 8), dilation=dilation,
            flip_tiled_dims=True, use_torch=True,
        )  # fmt: skip
        assert back.equal(x)


@pytest.mark.parametrize("prefix", ["", "backbone.layers.0.blocks.0.attn."])
def test_oneformer_checkpoints_are_not_loaded_without_a_word(prefix):
    """Its DiNAT constructs modules as up to 0.14.4, whose bias needed no argument, and loads with
    strict=False: without the bias results would be others."""
    arguments = dict(kernel_size=7, dilation=None, num_heads=2, qkv_bias=True, qk_scale=None,
                     attn_drop=0.0, proj_drop=0.0)  # fmt: skip
    trained = natten.NeighborhoodAttention2D(32, **arguments, rel_pos_bias=True)
    module = natten.NeighborhoodAttention2D(32, **arguments)
    model = module
    for name in reversed(prefix.split(".")[:-1]):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    with pytest.warns(UserWarning, match="built without rel_pos_bias=True, and is dropped") as told:
        model.load_state_dict(state, strict=False)
    assert f"{prefix}rpb of the state dict" in str(told[0].message)
    module = natten.NeighborhoodAttention2D(32, **arguments, rel_pos_bias=True)
    module.load_state_dict(trained.state_dict(), strict=False)
    x = torch.randn(1, 8, 9, 32)
    assert module(x).equal(trained(x))
