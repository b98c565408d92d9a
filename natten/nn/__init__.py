"""Modules around neighborhood attention: attention, blocks, tokenizers, stages, backbones."""

from natten.nn.attention import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from natten.nn.backbone import NeighborhoodBackbone, NeighborhoodStage
from natten.nn.block import DropPath, GatedMlp, Mlp, NeighborhoodTransformerBlock
from natten.nn.cross_attention import (
    NeighborhoodCrossAttention1D,
    NeighborhoodCrossAttention2D,
    NeighborhoodCrossAttention3D,
)
from natten.nn.embed import (
    ChannelsFirst,
    ConvDownsampler,
    ConvTokenizer,
    PatchExpanding,
    PatchMerging,
    PatchTokenizer,
)
from natten.nn.explicit import AttentionMap
from natten.nn.rotary import RotaryEmbedding
from natten.nn.stream import StreamState

__all__ = [
    "AttentionMap",
    "ChannelsFirst",
    "ConvDownsampler",
    "ConvTokenizer",
    "DropPath",
    "GatedMlp",
    "Mlp",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodBackbone",
    "NeighborhoodCrossAttention1D",
    "NeighborhoodCrossAttention2D",
    "NeighborhoodCrossAttention3D",
    "NeighborhoodStage",
    "NeighborhoodTransformerBlock",
    "PatchExpanding",
    "PatchMerging",
    "PatchTokenizer",
    "RotaryEmbedding",
    "StreamState",
]
