"""Names of NATTEN 0.14 to 0.17 where programs import them: :mod:`natten.older.functions`."""

from natten.older.functions import *  # noqa: F403
from natten.older.functions import __all__ as __all__
