"""Modules whose attributes are set, loaded, traced and called in ways that constructors never see:
as if constructed so, or refused with a sentence that names what is wrong.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import natten
from natten import nn as natten_nn
from natten.nn import (
    GatedMlp,
    Mlp,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodBackbone,
    NeighborhoodCrossAttention1D,
    NeighborhoodCrossAttention2D,
    NeighborhoodCrossAttention3D,
    NeighborhoodStage,
    NeighborhoodTransformerBlock,
    RotaryEmbedding,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
    # Of torch's own GraphModule.
    pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning"),
]

RANKS = (NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D)
CROSS = (NeighborhoodCrossAttention1D, NeighborhoodCrossAttention2D, NeighborhoodCrossAttention3D)


# --- attributes

# attribute, value, argument of the constructor
SETTINGS = [
    ("kernel_size", 5, {}),
    ("kernel_size", [5, 4], {}),
    ("kernel_size", torch.Size([2, 5]), {}),
    ("kernel_size", np.int64(4), {}),
    ("dilation", 2, {}),
    ("dilation", (1, 2), {}),
    ("dilation", None, {}),
    ("stride", 2, {}),
    ("stride", (1, 3), {}),
    ("stride", None, {}),
    ("is_causal", True, {}),
    ("is_causal", [False, True], {}),
    ("is_causal", None, {}),
    ("scale", 0.7, {"qk_scale": 0.7}),
    ("scale", 0, {"qk_scale": 0.0}),
    ("scale", None, {"qk_scale": None}),
    ("pad", True, {}),
]
MODULES = {
    "packed": (NeighborhoodAttention2D, {}),
    "separate": (NeighborhoodAttention2D, {"qk_norm": True}),
    "rotary": (NeighborhoodAttention2D, {"rotary": True}),
    "dropout": (NeighborhoodAttention2D, {"attn_drop": 0.3}),
    "cross": (NeighborhoodCrossAttention2D, {}),
    "cross-rotary": (NeighborhoodCrossAttention2D, {"rotary": True, "num_kv_heads": 1}),
    "older": (NeighborhoodAttention2D, {"bias": False}),
}


def pair(name, attribute, value, constructed, **arguments):
    """A module that was set, and one that was constructed so, with the same parameters."""
    cls, extra = MODULES[name]
    base = {"embed_dim": 16, "num_heads": 2, "kernel_size": 3} | extra | arguments
    module = cls(**base)
    given = constructed or {attribute: value}
    same = cls(**base | given)
    same.load_state_dict(module.state_dict())
    setattr(module, attribute, value)
    return module, same


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("attribute", "value", "constructed"), SETTINGS, ids=str)
def test_attributes_are_as_if_constructed_so(name, attribute, value, constructed):
    module, same = pair(name, attribute, value, constructed)
    assert getattr(module, attribute) == getattr(same, attribute)
    assert type(getattr(module, attribute)) is type(getattr(same, attribute))
    assert repr(module) == repr(same)
    x = torch.randn(2, 7, 8, 16)
    results = []
    for m in (module, same):
        torch.manual_seed(1)
        out = m(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(m.parameters()))])
    for a, b in zip(*results, strict=True):
        assert a.equal(b)
    if attribute != "pad":
        for m in (module.eval(), same.eval()):
            results.append(m.attention_map(x, [[3, 4]]).grid)
        assert results[-1].equal(results[-2])


@pytest.mark.parametrize("name", ["packed", "rotary", "cross"])
def test_set_modules_go_everywhere(name, tmp_path):
    """TorchScript, torch.compile, torch.export, pickle and copies."""
    module, same = pair(name, "kernel_size", 5, {})
    same.dilation = module.dilation = (1, 2)
    module, same = module.eval(), same.eval()
    x = torch.randn(1, 7, 10, 16)
    expected = same(x)
    assert module(x).equal(expected)
    assert_close(torch.jit.script(module)(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), expected)
    assert_close(torch.export.export(module, (x,)).module()(x), expected)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again(x).equal(expected)
        again.kernel_size = 3
        assert again.kernel_size == (3, 3)
    # A compiled module notices.
    module.kernel_size, module.is_causal = 4, True
    same.kernel_size, same.is_causal = 4, True
    assert_close(compiled(x), same(x))


def test_a_rotary_embedding_of_its_own_follows_the_dilation():
    module, same = pair("rotary", "dilation", 2, {})
    assert module.rotary.spacing == (2.0, 2.0)
    assert module.rotary.frequencies.equal(same.rotary.frequencies)
    shared = RotaryEmbedding(8, 2)
    module = NeighborhoodAttention2D(16, 2, 3, rotary=shared)
    module.dilation = 2
    assert shared.spacing == (1.0, 1.0)
    module = NeighborhoodAttention2D(16, 2, 3, rotary=True)
    module.rotary = shared
    module.dilation = 2
    assert shared.spacing == (1.0, 1.0)
    module.rotary = None
    plain = NeighborhoodAttention2D(16, 2, 3, dilation=2)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(1, 7, 8, 16)
    assert module(x).equal(plain(x))
    for bad in (RotaryEmbedding(4, 2), RotaryEmbedding(8, 1), nn.Identity(), "yes", 1):
        with pytest.raises(ValueError, match="rotary must be"):
            module.rotary = bad


def test_rotary_settings():
    rotary = RotaryEmbedding(8, 2).double()
    rotary.spacing, rotary.theta = (2, 3), 100.0
    same = RotaryEmbedding(8, 2, 100.0, (2.0, 3.0), dtype=torch.float64)
    assert rotary.frequencies.equal(same.frequencies)
    assert repr(rotary) == repr(same)
    for name, bad in (("spacing", 0), ("theta", (1.0,)), ("theta", "a"), ("spacing", True)):
        with pytest.raises(ValueError, match=f"{name} must be one positive number, or 2 of them"):
            setattr(rotary, name, bad)
    assert rotary.frequencies.equal(same.frequencies)


def test_dropout_of_weights_can_be_set():
    module, same = pair("packed", "attn_drop", 0.4, {})
    x = torch.randn(2, 7, 8, 16)
    torch.manual_seed(3)
    got = module(x)
    torch.manual_seed(3)
    assert got.equal(same(x))
    module.attn_drop = 0
    assert module.attn_drop is None
    module.attn_drop = nn.Dropout(0.2)
    assert module.attn_drop.p == 0.2
    with pytest.raises(ValueError, match="attn_drop must be a dropout probability"):
        module.attn_drop = 1.5


BAD_SETTINGS = [
    ("kernel_size", 0, "kernel_size must hold integers of at least 1"),
    ("kernel_size", None, "kernel_size must be an int"),
    ("kernel_size", (3, 3, 3), "kernel_size must have 2 values"),
    ("kernel_size", 3.0, "kernel_size must be an int"),
    ("stride", -1, "stride must hold integers of at least 1"),
    ("dilation", "2", "dilation must be an int"),
    ("is_causal", 1, "is_causal must be a bool"),
    ("scale", "1", "scale must be a number or None"),
    ("pad", 1, "pad must be a bool"),
]


@pytest.mark.parametrize("name", ["packed", "cross"])
@pytest.mark.parametrize(("attribute", "value", "message"), BAD_SETTINGS)
def test_wrong_attributes_are_refused_at_once(name, attribute, value, message):
    cls, _ = MODULES[name]
    module = cls(16, 2, 3)
    before = getattr(module, attribute)
    with pytest.raises(ValueError, match=message):
        setattr(module, attribute, value)
    assert getattr(module, attribute) == before


@pytest.mark.parametrize("name", ["packed", "separate", "dropout", "cross"])
@pytest.mark.parametrize(
    ("bias", "settings", "message"),
    [
        (False, {"stride": 4}, "stride must be at most kernel_size"),
        (False, {"stride": 3, "kernel_size": 2}, "stride must be at most kernel_size"),
        (False, {"dilation": 3}, r"kernel_size \* dilation = 3 \* 3 = 9"),
        (True, {"kernel_size": 5}, r"rpb must have shape .* = \(2, 9, 9\), got \(2, 5, 5\)"),
        (True, {"is_causal": True}, "rpb is defined for bidirectional axes only"),
    ],
)
def test_attributes_must_fit_each_other_when_called(name, bias, settings, message):
    cls, extra = MODULES[name]
    module = cls(16, 2, 3, rel_pos_bias=bias, **extra)
    x = torch.randn(1, 7, 8, 16)
    module(x)
    for attribute, value in settings.items():
        setattr(module, attribute, value)
    with pytest.raises(ValueError, match=message):
        module(x)
    with pytest.raises(ValueError, match=message):
        module.attention_map(x, [[0, 0]])


def test_attributes_of_modules_in_modules():
    """As programs enlarge the windows of a trained model."""
    arguments = dict(in_channels=3, embed_dim=16, depths=(1, 2), num_heads=(1, 2), num_registers=1)
    backbone = NeighborhoodBackbone(kernel_size=3, **arguments).eval()
    same = NeighborhoodBackbone(kernel_size=5, **arguments).eval()
    same.load_state_dict(backbone.state_dict())
    for module in backbone.modules():
        if isinstance(module, NeighborhoodAttention2D):
            module.kernel_size = 5
    x = torch.randn(1, 3, 44, 40)
    for a, b in zip(backbone(x), same(x), strict=True):
        assert a.equal(b)


# --- symbolic traces

factories = {
    **{
        f"attention-{i + 1}d": (lambda i=i: RANKS[i](16, 2, 3), (6, 7, 5)[: i + 1])
        for i in range(3)
    },
    "attention-rpb": (lambda: NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True), (6, 7)),
    "attention-everything": (
        lambda: NeighborhoodAttention2D(
            16, 4, 3, dilation=2, num_kv_heads=2, qk_norm=True, rotary=True, pad=True
        ),
        (6, 4),
    ),
    "attention-dropout": (
        lambda: NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True, attn_drop=0.2), (6, 7),
    ),
    "older": (
        lambda: NeighborhoodAttention2D(dim=16, num_heads=2, kernel_size=5, bias=True), (6, 4),
    ),
    **{f"cross-{i + 1}d": (lambda i=i: CROSS[i](16, 2, 3), (6, 7, 5)[: i + 1]) for i in range(3)},
    "cross-context": (
        lambda: NeighborhoodCrossAttention2D(16, 2, 3, context_dim=8, attn_drop=0.1), (6, 7),
    ),
    "block": (lambda: NeighborhoodTransformerBlock(16, 2, 3, layer_scale=0.1), (6, 7)),
    "block-1d": (lambda: NeighborhoodTransformerBlock(16, 2, 3, rank=1, gated_mlp=True), (9,)),
    "stage": (lambda: NeighborhoodStage(16, 2, 2, 3, dilation=(1, 2), drop_path=0.1), (6, 7)),
    "mlp": (lambda: Mlp(16, 32), (6, 7)),
    "gated-mlp": (lambda: GatedMlp(16, 32), (6, 7)),
    "patch-merging": (lambda: natten_nn.PatchMerging(16), (6, 7)),
    "downsampler": (lambda: natten_nn.ConvDownsampler(16), (6, 7)),
    "drop-path": (lambda: natten_nn.DropPath(0.5), (6, 7)),
}  # fmt: skip


@pytest.mark.parametrize("name", factories)
@pytest.mark.parametrize("training", [False, True])
def test_traces_without_concrete_arguments(name, training):
    make, extent = factories[name]
    module = make().train(training)
    graph = torch.fx.symbolic_trace(module)
    for grid in (extent, tuple(n + 3 for n in extent)):
        x = torch.randn(2, *grid, 16)
        results = []
        for function in (graph, module):
            torch.manual_seed(5)
            results.append(function(x))
        assert results[0].equal(results[1])
    # Whatever a pass over the graph removes or copies, what was traced stays.
    graph.graph.eliminate_dead_code()
    graph.recompile()
    torch.manual_seed(5)
    if torch.__version__ >= "2.12":
        # Before, torch pickles no graph of a module whose annotations are text.
        graph = pickle.loads(pickle.dumps(graph))
    assert graph(x).equal(results[1])


def test_traces_of_images():
    for module in (
        NeighborhoodBackbone(embed_dim=16, depths=(1, 1), num_heads=(1, 2), kernel_size=3),
        NeighborhoodBackbone(
            embed_dim=16, depths=(1, 1), num_heads=(1, 2), kernel_size=3, num_registers=2,
            overlapping=False, rotary=True,
        ),
        natten_nn.ConvTokenizer(),
        natten_nn.PatchTokenizer(),
    ):  # fmt: skip
        module.eval()
        graph = torch.fx.symbolic_trace(module)
        for extent in ((24, 29), (33, 32)):
            x = torch.randn(1, 3, *extent)
            got, expected = graph(x), module(x)
            assert_close(list(got), list(expected), atol=0, rtol=0)


def test_traced_modules_refuse_what_they_were_traced_without():
    x, tokens = torch.randn(1, 6, 7, 16), torch.randn(1, 2, 16)
    for module, name, argument in (
        (NeighborhoodAttention2D(16, 2, 3), "registers", tokens),
        (NeighborhoodCrossAttention2D(16, 2, 3, context_dim=16), "context", tokens),
        (NeighborhoodCrossAttention2D(16, 2, 3), "source", x),
        (NeighborhoodCrossAttention2D(16, 2, 3), "context_lengths", torch.tensor([1])),
        (NeighborhoodTransformerBlock(16, 2, 3), "registers", tokens),
        (NeighborhoodTransformerBlock(16, 2, 3), "cond", torch.randn(1, 16)),
        (NeighborhoodStage(16, 1, 2, 3), "cond", torch.randn(1, 16)),
        (NeighborhoodStage(16, 1, 2, 3), "registers", tokens),
    ):
        graph = torch.fx.symbolic_trace(module)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        assert graph(x).equal(module(x))
        assert graph(x, **{name: None}).equal(module(x))
        with pytest.raises(
            ValueError, match=f"{name} must be None: this graph is of a call without"
        ):
            graph(x, **{name: argument})


def test_traced_modules_take_what_does_not_change_the_graph():
    """Crops of larger grids, and the condition of modules that need one."""
    module = NeighborhoodAttention2D(16, 2, 3, rotary=True)
    graph = torch.fx.symbolic_trace(module)
    x = torch.randn(1, 6, 7, 16)
    for origin, grid in (([1, 2], [9, 9]), ([0, 0], [6, 7]), ([3, 1], None), (None, None)):
        assert graph(x, origin=origin, grid=grid).equal(module(x, origin=origin, grid=grid))
    for module in (
        NeighborhoodTransformerBlock(16, 2, 3, cond_dim=8),
        NeighborhoodStage(16, 2, 2, 3, cond_dim=8),
    ):
        nn.init.normal_(next(m for n, m in module.named_parameters() if "modulation" in n))
        graph = torch.fx.symbolic_trace(module)
        cond = torch.randn(1, 8)
        assert graph(x, cond).equal(module(x, cond))
    backbone = NeighborhoodBackbone(
        embed_dim=16, depths=(1,), num_heads=(2,), kernel_size=3, cond_dim=8
    ).eval()
    image = torch.randn(1, 3, 24, 24)
    assert torch.fx.symbolic_trace(backbone)(image, cond)[0].equal(backbone(image, cond)[0])


# --- state dicts


def module_with(**arguments):
    return NeighborhoodAttention2D(16, 2, 3, **arguments)


DROPPED = {
    "rpb": (module_with(rel_pos_bias=True), module_with(), ["rpb"], "rel_pos_bias=True"),
    "older": (
        NeighborhoodAttention2D(dim=16, num_heads=2, kernel_size=3, bias=True),
        # As OneFormer constructs it, without a word of the bias that there was up to 0.14.4.
        NeighborhoodAttention2D(16, kernel_size=3, dilation=None, num_heads=2, qkv_bias=True),
        ["rpb"],
        "rel_pos_bias=True",
    ),
    "qk_norm": (
        module_with(qk_norm=True), module_with(), ["q_norm.weight", "k_norm.weight"],
        "qk_norm=True",
    ),
    "qkv_bias": (module_with(), module_with(qkv_bias=False), ["qkv.bias"], "qkv_bias=True"),
    "cross": (
        NeighborhoodCrossAttention2D(16, 2, 3, rel_pos_bias=True),
        NeighborhoodCrossAttention2D(16, 2, 3), ["rpb"], "rel_pos_bias=True",
    ),
    "cross-context": (
        NeighborhoodCrossAttention2D(16, 2, 3, context_dim=8),
        NeighborhoodCrossAttention2D(16, 2, 3), ["context_kv.weight", "context_kv.bias"],
        "context_dim",
    ),
    "cross-qkv_bias": (
        NeighborhoodCrossAttention2D(16, 2, 3),
        NeighborhoodCrossAttention2D(16, 2, 3, qkv_bias=False), ["q.bias", "kv.bias"],
        "qkv_bias=True",
    ),
    "block": (
        NeighborhoodTransformerBlock(16, 2, 3, rel_pos_bias=True, layer_scale=1.0),
        NeighborhoodTransformerBlock(16, 2, 3), ["attn.rpb", "gamma1", "gamma2"], "",
    ),
    "block-modulation": (
        NeighborhoodTransformerBlock(16, 2, 3, cond_dim=4),
        NeighborhoodTransformerBlock(16, 2, 3), ["modulation.linear.weight"], "cond_dim",
    ),
    "backbone": (
        NeighborhoodBackbone(embed_dim=8, depths=(1,), num_heads=(1,), num_registers=1),
        NeighborhoodBackbone(embed_dim=8, depths=(1,), num_heads=(1,)), ["registers"],
        "num_registers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("prefix", ["", "backbone.levels.0."])
def test_parameters_without_a_place_are_told(name, prefix):
    source, target, keys, argument = DROPPED[name]
    target = copy.deepcopy(target)
    state = {prefix + k: v for k, v in source.state_dict().items()}
    root = target
    for part in reversed(prefix.split(".")[:-1]):
        outer = nn.Module()
        outer.add_module(part, root)
        root = outer
    with pytest.warns(UserWarning, match="has no place in a Neighborhood") as record:
        root.load_state_dict(state, strict=False)
    told = [str(w.message) for w in record]
    for key in keys:
        (text,) = [t for t in told if t.startswith(f"{prefix}{key} of the state dict has no place")]
        assert argument in text
        assert "was built without" in text
        assert text.endswith("and is dropped")
    with (
        pytest.warns(UserWarning, match="has no place in a Neighborhood"),
        pytest.raises(RuntimeError, match="Unexpected key"),
    ):
        root.load_state_dict(state)


@pytest.mark.parametrize("name", ["rpb", "cross-context", "block", "backbone"])
@pytest.mark.parametrize("strict", [False, True])
def test_nothing_is_told_of_what_fits(name, strict):
    source, target, *_ = DROPPED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(source).load_state_dict(source.state_dict(), strict=strict)
        if not strict:
            # What is missing is torch's to report.
            found = copy.deepcopy(source).load_state_dict(target.state_dict(), strict=False)
            assert found.missing_keys
            target.load_state_dict({}, strict=False)


def test_loaders_that_walk_the_modules_themselves():
    """mmengine calls _load_from_state_dict of every module, and logs or raises what it collects."""
    source, target, *_ = DROPPED["rpb"]
    missing, unexpected, errors = [], [], []
    with pytest.warns(UserWarning, match="^rpb of the state dict has no place in a Neighborhood"):
        target._load_from_state_dict(source.state_dict(), "", {}, True, missing, unexpected, errors)
    assert (missing, unexpected, errors) == ([], ["rpb"], [])


def test_timm_models_tell(tmp_path):
    timm = pytest.importorskip("timm")
    import natten.models  # noqa: F401

    small = dict(num_classes=3, depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 1, 2, 2))
    model = timm.create_model("nat_mini", **small)
    state = model.state_dict()
    (attention,) = [m for n, m in model.named_modules() if n == "levels.1.blocks.0.attn"]
    attention.rpb = None
    torch.save(state, tmp_path / "model.pth")
    with pytest.warns(UserWarning, match=r"levels\.1\.blocks\.0\.attn\.rpb of the state dict"):
        timm.models.load_checkpoint(model, str(tmp_path / "model.pth"), strict=False)


# --- the older order of arguments, and small inputs


def test_the_order_up_to_0_14_4_brings_what_there_was():
    """A bias and padding, as every module had it: against the module written in today's words."""
    with pytest.warns(UserWarning, match="rel_pos_bias=True and pad=True unless told otherwise"):
        module = NeighborhoodAttention2D(16, 7, 2)
    assert module.rpb.shape == (2, 13, 13)
    same = NeighborhoodAttention2D(16, 2, 7, rel_pos_bias=True, pad=True)
    same.load_state_dict(module.state_dict())
    x = torch.randn(1, 5, 9, 16)
    assert module(x).equal(same(x))
    assert module(x).shape == x.shape
    with pytest.warns(UserWarning, match="comes before num_heads"):
        # dim, kernel_size, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop, dilation
        module = NeighborhoodAttention2D(16, 3, 2, False, 0.5, 0.1, 0.2, 2)
    assert module.qkv.bias is None
    assert (module.scale, module.attn_drop.p, module.proj_drop.p) == (0.5, 0.1, 0.2)
    assert module.dilation == (2, 2)
    with pytest.warns(UserWarning, match="comes before"):
        assert NeighborhoodAttention2D(16, 7, 2, rel_pos_bias=False).rpb is None
    for arguments, named in (
        ((16, 3, 2, True), {"qkv_bias": True}),
        ((16, 3, 2, True, None, 0.0, 0.0, 1, 1), {}),
    ):
        with (
            pytest.warns(UserWarning, match="comes before"),
            pytest.raises(ValueError, match=r"versions up to 0\.14\.4 took qkv_bias, qk_scale"),
        ):
            NeighborhoodAttention2D(*arguments, **named)


def test_small_inputs_pad_or_say_who_did():
    """The older call forms: functions never padded, modules did up to 0.15, and not in 0.17."""
    x = torch.randn(1, 4, 9, 16)
    for bias in (True, False):
        module = NeighborhoodAttention2D(dim=16, num_heads=2, kernel_size=7, bias=bias)
        padded = NeighborhoodAttention2D(16, 2, 7, rel_pos_bias=bias, pad=True)
        padded.load_state_dict(module.state_dict())
        assert module(x).equal(padded(x))
    for rel_pos_bias in (True, False):
        module = NeighborhoodAttention2D(
            dim=16, num_heads=2, kernel_size=7, rel_pos_bias=rel_pos_bias
        )
        with pytest.raises(ValueError, match=r"pad=True .* as modules did up to NATTEN 0\.15"):
            module(x)
    q = torch.randn(1, 2, 4, 9, 8)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must be at most"):
        natten.natten2dqkrpb(q, q, torch.randn(2, 13, 13), 1)
    with pytest.raises(ValueError, match=r"kernel_size \* dilation must be at most"):
        natten.natten2dav(torch.randn(1, 2, 4, 9, 49), q, 7, 1)


# --- what is no tensor

NO_TENSORS = {
    "none": None,
    "array": np.zeros((1, 6, 7, 16), np.float32),
    "list": [[0.0]],
    "int": torch.zeros(1, 6, 7, 16, dtype=torch.int64),
    "bool": torch.zeros(1, 6, 7, 16, dtype=torch.bool),
    "complex": torch.zeros(1, 6, 7, 16, dtype=torch.complex64),
}
CALLED = {
    "attention": lambda: NeighborhoodAttention2D(16, 2, 3),
    "attention-pad": lambda: NeighborhoodAttention2D(16, 2, 3, pad=True, rel_pos_bias=True),
    "older": lambda: NeighborhoodAttention2D(dim=16, num_heads=2, kernel_size=3, bias=True),
    "cross": lambda: NeighborhoodCrossAttention2D(16, 2, 3),
    "block": lambda: NeighborhoodTransformerBlock(16, 2, 3),
    "stage": lambda: NeighborhoodStage(16, 1, 2, 3),
    "backbone": lambda: NeighborhoodBackbone(embed_dim=16, depths=(1,), num_heads=(1,)),
    "conv-tokenizer": natten_nn.ConvTokenizer,
    "patch-tokenizer": natten_nn.PatchTokenizer,
    "downsampler": lambda: natten_nn.ConvDownsampler(16),
    "patch-merging": lambda: natten_nn.PatchMerging(16),
    "rotary": lambda: RotaryEmbedding(16, 1),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize("name", CALLED)
def test_inputs_that_are_no_tensors_of_numbers(name, kind):
    message = (
        "^x must have a floating-point dtype, got torch"
        if isinstance(NO_TENSORS[kind], torch.Tensor)
        else r"^x must be a torch\.Tensor, got (NoneType|ndarray|list)$"
    )
    with pytest.raises(ValueError, match=message):
        CALLED[name]()(NO_TENSORS[kind])


@pytest.mark.parametrize("kind", [kind for kind in NO_TENSORS if kind != "none"])
def test_further_arguments_that_are_no_tensors_of_numbers(kind):
    x, bad = torch.randn(1, 6, 7, 16), NO_TENSORS[kind]
    for module, name in (
        (NeighborhoodAttention2D(16, 2, 3), "registers"),
        (NeighborhoodCrossAttention2D(16, 2, 3, context_dim=8), "context"),
        (NeighborhoodCrossAttention2D(16, 2, 3), "source"),
        (NeighborhoodTransformerBlock(16, 2, 3, cond_dim=8), "cond"),
        (NeighborhoodTransformerBlock(16, 2, 3), "registers"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must (be a torch|have a floating-point)"):
            module(x, **{name: bad})
    for module in (NeighborhoodAttention2D(16, 2, 3), NeighborhoodCrossAttention2D(16, 2, 3)):
        with pytest.raises(ValueError, match=r"^x must"):
            module.attention_map(bad, [[0, 0]])
    with pytest.raises(ValueError, match=r"^registers must"):
        NeighborhoodAttention2D(16, 2, 3).register_map(x, bad)
    for positions in ([[True, False]], [[0j, 1]]):
        with pytest.raises(ValueError, match="positions must be integers"):
            NeighborhoodAttention2D(16, 2, 3).attention_map(x, positions)
    cross = NeighborhoodCrossAttention2D(16, 2, 3, context_dim=8)
    for lengths in ([2], np.array([2]), 2):
        with pytest.raises(ValueError, match=r"context_lengths must be a torch\.Tensor, got"):
            cross(x, torch.randn(1, 3, 8), lengths)


@pytest.mark.parametrize("origin", [[1], [1, 2, 3], []])
def test_origins_have_a_value_for_each_axis(origin):
    x = torch.randn(1, 6, 7, 16)
    for module in (
        NeighborhoodAttention2D(16, 2, 3, rotary=True),
        NeighborhoodCrossAttention2D(16, 2, 3, rotary=True),
    ):
        with pytest.raises(ValueError, match="origin must have 2 values, one for each axis, got"):
            module(x, origin=origin)
    with pytest.raises(ValueError, match="origin must have 2 values"):
        RotaryEmbedding(8, 2)(torch.randn(1, 6, 7, 2, 8), origin)


def test_conditions_have_their_shape():
    block = NeighborhoodTransformerBlock(16, 2, 3, cond_dim=8)
    for shape in ((8,), (1, 4), (1, 1, 8)):
        with pytest.raises(
            ValueError, match=r"cond must have the shape \[batch, cond_dim=8\], got"
        ):
            block(torch.randn(1, 6, 7, 16), torch.randn(shape))
    with pytest.raises(ValueError, match="x must have 5 dimensions"):
        natten_nn.ConvTokenizer(rank=3)(torch.randn(1, 3, 16, 16))


FLAGS = [
    (NeighborhoodAttention2D, ("qkv_bias", "rel_pos_bias", "qk_norm", "pad", "bias")),
    (NeighborhoodCrossAttention2D, ("qkv_bias", "rel_pos_bias", "qk_norm", "pad")),
    (NeighborhoodTransformerBlock,
     ("qkv_bias", "rel_pos_bias", "qk_norm", "pad", "gated_mlp")),
]  # fmt: skip


@pytest.mark.parametrize("bad", [1, 0, "yes", None, [True]], ids=str)
@pytest.mark.parametrize(("cls", "names"), FLAGS)
def test_flags_are_bools(cls, names, bad):
    for name in names:
        with pytest.raises(ValueError, match=f"^{name} must be a bool, got"):
            cls(16, 2, 3, **{name: bad})
    if bad is not None:
        with pytest.raises(ValueError, match="rotary must be a bool or a RotaryEmbedding"):
            cls(16, 2, 3, rotary=bad)


def test_flags_of_tokens_and_backbones():
    with pytest.raises(ValueError, match="overlapping must be a bool, got 1"):
        NeighborhoodBackbone(overlapping=1)
    with pytest.raises(ValueError, match="pad must be a bool, got 'yes'"):
        natten_nn.PatchTokenizer(pad="yes")
    with pytest.raises(ValueError, match="num_registers must be a positive int, got -1"):
        NeighborhoodBackbone(num_registers=-1)
    with pytest.raises(ValueError, match=r"depth must be a positive int, got 1\.5"):
        NeighborhoodStage(16, 1.5, 2)


@pytest.mark.parametrize("bad", ["0.1", -0.1, 1.1, float("nan"), None, True, (0.1,)], ids=str)
def test_probabilities_are_numbers(bad):
    attention = {"proj_drop": (NeighborhoodAttention2D, NeighborhoodCrossAttention2D)}
    if bad is not None:
        attention["attn_drop"] = attention["proj_drop"]
    for name, classes in attention.items():
        for cls in classes:
            with pytest.raises(ValueError, match=f"{name} must be a dropout probability"):
                cls(16, 2, 3, **{name: bad})
    for name in ("drop", "drop_path"):
        with pytest.raises(ValueError, match=f"{name} must be a dropout probability"):
            NeighborhoodTransformerBlock(16, 2, 3, **{name: bad})
    with pytest.raises(ValueError, match="drop_prob must be"):
        natten_nn.DropPath(bad)


# --- defaults of torch


@pytest.mark.parametrize("name", ["packed", "rotary", "dropout", "cross-rotary"])
@pytest.mark.parametrize("attribute", ["device", "dtype"])
def test_results_do_not_depend_on_defaults(name, attribute):
    """Parameters follow torch's defaults when they are made; what is computed later does not."""
    cls, extra = MODULES[name]
    module = cls(16, 2, 3, context_dim=8, **extra) if "cross" in name else cls(16, 2, 3, **extra)
    x, tokens = torch.randn(1, 6, 7, 16), torch.randn(1, 2, 8 if "cross" in name else 16)

    def results():
        torch.manual_seed(2)
        found = [module(x)]
        if "cross" in name:
            found.append(module(x, tokens, torch.tensor([1], device="cpu")))
        elif name != "dropout":
            found += module(x, tokens)
            found.append(module.register_map(x, tokens).grid)
        found.append(module.attention_map(x, torch.tensor([[1, 2]], device="cpu")).grid)
        found.append(module.attention_map(x, [[5, 0]]).grid)
        module.dilation = 2
        found.append(module(x))
        module.dilation = 1
        copied = pickle.loads(pickle.dumps(module))
        found += [copied(x), *copied.float().state_dict().values()]
        return found

    expected = results()
    before = torch.get_default_dtype()
    try:
        if attribute == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.float64)
        got = results()
        made = cls(16, 2, 3, **extra)
        for parameter in made.parameters():
            assert getattr(parameter, attribute) in (torch.device("meta"), torch.float64)
    finally:
        # Any device, were it the one before, would be looked up by all later calls of torch.
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    for a, b in zip(got, expected, strict=True):
        assert a.device.type == "cpu"
        assert a.equal(b)
