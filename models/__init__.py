"""Image and video models built of neighborhood attention, registered with timm.

Importing this package registers every model; then `timm.create_model("dinat_base")` works like any
other. Families: NAT, DiNAT, DiNAT_s, their isotropic variants, video models, and a denoiser.
`python -m natten.models` lists them.
"""

from __future__ import annotations

from . import denoiser, dinat, dinat_s, isotropic, nat, video
from ._checkpoint import checkpoint_filter_fn, convert, detect_layout, read_checkpoint
from .denoiser import ImageDenoiser
from .isotropic import IsotropicNAT
from .nat import NAT
from .video import StreamState, VideoDenoiser, VideoNAT

__all__ = [
    "NAT",
    "ImageDenoiser",
    "IsotropicNAT",
    "StreamState",
    "VideoDenoiser",
    "VideoNAT",
    "checkpoint_filter_fn",
    "convert",
    "denoiser",
    "detect_layout",
    "dinat",
    "dinat_s",
    "isotropic",
    "nat",
    "read_checkpoint",
    "video",
]
