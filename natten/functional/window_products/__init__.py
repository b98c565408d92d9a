"""Attention over windows in two steps, and the products that it is made of.

:mod:`.functions` has na1d_qk to na3d_av, :mod:`.operators` the products as torch.library operators.
They are computed by :mod:`.eager` (torch, on any device), :mod:`.cpu` (numba) or :mod:`.triton`.
"""
