"""Implementations of one contract: see :mod:`natten.functional.dispatch`. They do not import each
other."""
