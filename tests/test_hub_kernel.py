"""The folder that Hugging Face kernels loads this library from, and programs that load it so.

`make test-hub` installs kernels and diffusers beside this environment, and runs all of it.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

import natten
from natten import cli, hub_kernel

ROOT = Path(__file__).resolve().parents[1]
TOY = dict(
    latent_channels=8, patch_size=2, decoder_head_dim=16,
    decoder_stage_channels=(32, 32), decoder_stage_depths=(1, 1),
    decoder_stage_kernels=((3, 5, 5),), decoder_upsample_strides=((1, 2, 2),),
    decoder_upsample_channel_reductions=(1,), decoder_stage5_kernel=(3, 5, 5),
    decoder_t_emb_dim=16, spatial_compression_ratio=4, temporal_compression_ratio=1,
)  # fmt: skip


def test_the_command_writes_the_folder(tmp_path, capsys):
    for _ in range(2):  # again, over what is there
        assert cli.main(["hub-kernel", str(tmp_path / "new" / "kernel")]) == 0
    assert capsys.readouterr().out.endswith(
        f"LOCAL_KERNELS=shi-labs/natten={tmp_path}/new/kernel\n"
    )
    variants = tmp_path / "new" / "kernel" / "build"
    assert {path.name for path in variants.iterdir()} == {"torch-cpu", "torch-cuda", "torch-rocm"}
    for path in variants.iterdir():
        metadata = json.loads((path / "metadata.json").read_text())
        assert path.name == f"torch-{metadata['backend']['type']}"
        found = runpy.run_path(str(path / "__init__.py"))
        assert found["na3d"] is natten.na3d
        module = found["__getattr__"]("token_permute")
        assert module.__name__ == "natten.token_permute"
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            found["__getattr__"]("nonsense")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        hub_kernel.write_hub_kernel(tmp_path / "file")


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    kernels = pytest.importorskip("kernels")
    from kernels.load import _parse_local_kernel_overrides

    folder = hub_kernel.write_hub_kernel(tmp_path)
    monkeypatch.setenv("LOCAL_KERNELS", f"{hub_kernel.REPOSITORY}={folder}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _parse_local_kernel_overrides.cache_clear()
    yield kernels.get_kernel(hub_kernel.REPOSITORY, version=1)
    _parse_local_kernel_overrides.cache_clear()


def test_the_digest_is_that_of_the_files(kernel):
    from kernels._rust import Digest, Metadata

    folder = Path(kernel.__file__).parent
    metadata = Metadata.read_from_file(folder / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, folder))


def test_calls_of_vllm_omni(kernel):
    query, key, value = (torch.randn(1, 4, 8, 8, 2, 64) for _ in range(3))
    kernel.use_kv_parallelism_in_fused_na(False)
    natten.use_kv_parallelism_in_fused_na(True)
    out = kernel.na3d(query, key, value, kernel_size=(3, 7, 7), scale=1.0, backend=None)
    expected = natten.na3d(query, key, value, kernel_size=(3, 7, 7), scale=1.0)
    assert torch.equal(out, expected)
    tiles, *_ = kernel.token_permute.token_permute_operation(query, (2, 4, 4))
    assert tiles.shape == (1, 256, 2, 64)


def test_the_video_decoder_of_ltx_2(kernel):
    pytest.importorskip("diffusers")
    decoders = pytest.importorskip("diffusers.models.autoencoders.ltx2_diffusion_decoder")
    torch.manual_seed(0)
    model = decoders.LTX2VideoDiffusionDecoderModel(**TOY).eval()
    latents = torch.randn(1, 8, 4, 6, 7)

    def decoded():
        with torch.no_grad():
            return model.decoder(latents, generator=torch.Generator().manual_seed(0))

    flex = decoded()
    processor = decoders.LTX2VideoVaeNeighborhoodNattenProcessor()
    assert processor._na3d is natten.na3d
    attentions = [
        module for module in model.modules()
        if isinstance(module, decoders.LTX2VideoVaeNeighborhoodAttention)
    ]  # fmt: skip
    assert len(attentions) == 2
    for attention in attentions:
        attention.set_processor(processor)
    torch.testing.assert_close(decoded(), flex, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("example", "package"),
    [("diffusers_processor.py", "diffusers"), ("transformers_dinat.py", "transformers")],
)
def test_examples_run(example, package, capsys, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.setattr("sys.argv", [example])
    runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
    assert "within" in capsys.readouterr().out
