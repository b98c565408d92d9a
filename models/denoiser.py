"""A denoiser of photographs: what restoration builds of `NeighborhoodBackbone`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from natten.nn import ChannelsFirst, NeighborhoodBackbone, NeighborhoodStage
from natten.nn.backbone import is_list
from natten.nn.embed import wrapped
from natten.validation import bool_tuple
from natten.varlen import GridLayout

from ._base import cfg
from ._checkpoint import packaged_weights

__all__ = ["ImageDenoiser"]


class ImageDenoiser(nn.Module):
    """Removes Gaussian noise of a known strength.

    A `NeighborhoodBackbone` of patches of 2 x 2 pixels; the patches and its maps, brought to their
    size, are added, pass through one more stage of blocks, and say how much noise each pixel has.

    Args:
        in_chans: channels of the image.
        embed_dim: channels of the first level; they double at every level.
        depths, num_heads: of the levels.
        decoder_depth: blocks behind them.
        kernel_size: window of all blocks.
        mlp_ratio: hidden width of the MLPs.
        is_circular: whether rows and columns are rings (a panorama's columns), a bool or two:
            windows and convolutions wrap around, and `2 ** len(depths)` divides their pixels.

    Shapes: images `[B, in_chans, H, W]`, of any size, to the same; or a list of images
    `[in_chans, H, W]` of different sizes to such a list.
    """

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 32,
        depths: Sequence[int] = (2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 4),
        decoder_depth: int = 2,
        kernel_size: int = 7,
        mlp_ratio: float = 2.0,
        is_circular: bool | Sequence[bool] = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        block: dict[str, Any] = {
            "kernel_size": kernel_size, "mlp_ratio": mlp_ratio, "rel_pos_bias": True, "pad": True,
            "is_circular": is_circular,
        }  # fmt: skip
        self.in_chans = in_chans
        self.is_circular = bool_tuple("is_circular", is_circular, 2)
        self.encoder = NeighborhoodBackbone(
            in_chans + 1,
            embed_dim,
            depths,
            num_heads,
            overlapping=False,
            patch_size=2,
            channels_first=True,
            **block,
            **place,
        )
        # Beside the backbone, whose norms hide how strong the contrast is.
        self.skip = nn.Conv2d(in_chans + 1, embed_dim, 2, stride=2, **place)
        self.merge = nn.ModuleList(
            nn.Conv2d(embed_dim * 2**i, embed_dim, 1, **place) for i in range(len(depths))
        )
        self.decoder = ChannelsFirst(
            NeighborhoodStage(embed_dim, decoder_depth, num_heads[0], **block, **place)
        )
        self.head = nn.Sequential(
            nn.Conv2d(
                embed_dim, 4 * in_chans, 3,
                padding=[0 if wraps else 1 for wraps in self.is_circular], **place,
            ),
            nn.PixelShuffle(2),
        )  # fmt: skip

    @overload
    def forward(self, x: Tensor, noise: Tensor | float = 25 / 255) -> Tensor: ...

    @overload
    def forward(self, x: Sequence[Tensor], noise: Tensor | float = 25 / 255) -> list[Tensor]: ...

    def forward(self, x: Any, noise: Tensor | float = 25 / 255) -> Any:
        """The image without its noise.

        Args:
            x: `[B, in_chans, H, W]`, clean values in [0, 1]; or a list of `[in_chans, H, W]`.
                Neighbors of one size are computed together.
            noise: standard deviation of what was added to them, one number or one for each image.
        """
        if is_list(x):
            return self._of_list(x, noise)
        if not isinstance(noise, Tensor):
            noise = x.new_full((1,), noise)
        if noise.dim() != 1 or noise.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"noise must be a number or have the shape [{x.shape[0]}], got {list(noise.shape)}"
            )
        strength = noise.to(x.dtype).view(-1, 1, 1, 1)
        height, width = x.shape[2:]
        # Patches of 2: an odd border is repeated, and refused where it is none.
        wraps_y, wraps_x = self.is_circular
        odd = (0, 0 if wraps_x else width % 2, 0, 0 if wraps_y else height % 2)
        seen = F.pad(x, odd, mode="replicate")
        told = strength.expand(x.shape[0], 1, *seen.shape[2:])
        seen = 4 * torch.cat([seen - 0.5, 2 * told], 1)
        maps = self.encoder(seen)
        merged = self.skip(seen) + self.merge[0](maps[0])
        for merge, feature in zip(self.merge[1:], maps[1:]):
            merged = merged + self._enlarged(merge(feature), merged.shape[2:])
        decoded = merged + self.decoder(merged)
        if any(self.is_circular):
            decoded = wrapped(decoded, self.is_circular, (1, 1))
        return x - self.head(decoded)[..., :height, :width] / 4

    def _enlarged(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """A map of that size; around a ring it is interpolated, too."""
        if not any(self.is_circular):
            return F.interpolate(x, size=size, mode="bilinear")
        extent = x.shape[2:]
        # What one token more on both sides becomes.
        more = [
            n // old if wraps else 0
            for n, old, wraps in zip(size, extent, self.is_circular, strict=True)
        ]
        x = wrapped(x, self.is_circular, (1, 1))
        x = F.interpolate(x, size=[n + 2 * m for n, m in zip(size, more)], mode="bilinear")
        return x[..., more[0] : more[0] + size[0], more[1] : more[1] + size[1]]

    def _of_list(self, images: Sequence[Tensor], noise: Tensor | float) -> Any:
        first = images[0]
        told = torch.as_tensor(noise, dtype=first.dtype, device=first.device)
        layout = GridLayout([tuple(image.shape[1:]) for image in images])

        def clean(run: Tensor, strength: Tensor) -> Tensor:
            return self.forward(run.movedim(-1, 1), strength).movedim(1, -1)

        packed = layout.pack([image.movedim(0, -1) for image in images])
        out = layout.map(clean, packed, each=[told.expand(len(images))])
        return [image.movedim(-1, 0) for image in layout.unpack(out)]


default_cfgs = generate_default_cfgs(
    {
        "image_denoiser_pico.photographs": {
            **cfg(first_conv="encoder.patch_embed.proj"),
            "file": packaged_weights("image_denoiser_pico.photographs"),
            "num_classes": 0,
            "classifier": None,
            "pool_size": None,
            "input_size": (3, 64, 64),
            "origin_url": None,
        }
    }
)


@register_model
def image_denoiser_pico(pretrained: bool = False, **kwargs: Any) -> ImageDenoiser:
    """A small ImageDenoiser, with weights in the package."""
    unused = ("num_classes", "global_pool")  # there is nothing to classify or to pool
    return build_model_with_cfg(
        ImageDenoiser, "image_denoiser_pico", pretrained, kwargs_filter=unused, **kwargs
    )
