"""The DiNAT and Nat classes of transformers, unmodified, on this package.

    make test-transformers

installs what it needs under build/ and runs this file; elsewhere it is skipped.
"""

from __future__ import annotations

import importlib

import pytest
import timm
import torch

from natten.models import convert

transformers = pytest.importorskip("transformers")
VERSION = tuple(int(n) for n in transformers.__version__.split(".")[:2])

pytestmark = pytest.mark.skipif(
    (4, 54) <= VERSION < (5, 6), reason="transformers' own DiNAT is broken in 4.54 to 5.5"
)

SMALL = dict(depths=(2, 1, 2, 1), num_heads=(2, 4, 8, 16), embed_dim=32, mlp_ratio=2.0)
DILATIONS = ((1, 4), (2,), (1, 2), (1,))


def load(name: str):
    """Configuration and classes of "dinat" or "nat", or a skip."""
    kind = {"dinat": "Dinat", "nat": "Nat"}[name]
    for module in (f"transformers.models.{name}", f"transformers.models.deprecated.{name}"):
        try:
            configuration = importlib.import_module(f"{module}.configuration_{name}")
            modeling = importlib.import_module(f"{module}.modeling_{name}")
        except ModuleNotFoundError:
            continue
        names = ("ForImageClassification", "Backbone")
        classes = (getattr(modeling, kind + suffix) for suffix in names)
        return getattr(configuration, kind + "Config"), *classes
    pytest.skip(f"transformers {transformers.__version__} has no {name}")


def pair(name: str, layer_scale: float | None, kernel_size: int = 7):
    """A model of ours and one of transformers with the same weights."""
    config_class, model_class, _ = load(name)
    extra = {"dilations": DILATIONS} if name == "dinat" else {}
    ours = timm.create_model(
        f"{name}_mini", **SMALL, kernel_size=kernel_size, layer_scale=layer_scale, num_classes=7,
        drop_path_rate=0.0, **extra,
    )  # fmt: skip
    config = config_class(
        **SMALL,
        kernel_size=kernel_size,
        layer_scale_init_value=layer_scale or 0.0,
        num_labels=7,
        drop_path_rate=0.0,
        **extra,
    )
    theirs = model_class(config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state, _ = convert(ours.state_dict(), "huggingface", prefix=name)
    theirs.load_state_dict(state)
    return ours, theirs


# The first needs no padding without dilation, the other does at its last levels.
@pytest.mark.parametrize("size", [(224, 224), (96, 160)], ids=str)
@pytest.mark.parametrize("layer_scale", [None, 0.1])
@pytest.mark.parametrize("name", ["dinat", "nat"])
def test_logits_equal(name, layer_scale, size):
    ours, theirs = pair(name, layer_scale)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, got = ours.eval()(images), theirs.eval()(images).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dinat", "nat"])
def test_gradients_equal(name):
    ours, theirs = pair(name, 0.1, kernel_size=3)
    images = torch.randn(1, 3, 128, 96)
    weight = torch.randn(1, 7)
    (ours.train()(images) * weight).sum().backward()
    (theirs.train()(images).logits * weight).sum().backward()
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    # Gradients convert as weights do.
    expected, _ = convert(gradients, "huggingface", prefix=name)
    for key, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], atol=1e-3, rtol=1e-3, msg=key)


def test_heads_as_many_as_columns():
    """Sixteen heads on a grid of 16 x 16: the shape alone does not tell the layouts apart."""
    ours, theirs = pair("dinat", None, kernel_size=3)
    images = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        expected, got = ours.eval()(images), theirs.eval()(images).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dinat", "nat"])
def test_backbone(name):
    config_class, _, backbone_class = load(name)
    model = backbone_class(config_class(**SMALL, out_features=["stage2", "stage4"]))
    maps = model(torch.randn(1, 3, 224, 160)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(1, 64, 28, 20), (1, 256, 7, 5)]
    sum(m.sum() for m in maps).backward()
