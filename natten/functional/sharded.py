"""Whether the grid of tokens is sharded over ranks: what `natten.distributed.context_parallel` sets
and calls of neighborhood attention look at. It knows nothing of torch.distributed."""

from __future__ import annotations

from typing import Any

# Called like neighborhood_attention_generic inside of context_parallel, else None.
current: Any = None
