"""``merge_attentions`` where programs for NATTEN 0.21 import it."""

from __future__ import annotations

from natten.functional.merge import merge_attentions

__all__ = ["merge_attentions"]
