"""``natten.experimental`` of 0.17 where programs import it: :mod:`natten.older.experimental`."""

from natten.older.experimental import na1d, na2d, na3d

__all__ = ["na1d", "na2d", "na3d"]
