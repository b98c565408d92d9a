"""Arguments of the attention modules up to 0.17: :mod:`natten.older.modules`."""

from natten.older.modules import accepts_older_arguments, translate

__all__ = ["accepts_older_arguments", "translate"]
