"""Reorder tokens so that every tile of the grid is contiguous, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pad

from natten import validation


def _padded(
    tokens: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    return tuple(-(-n // (t * d)) * t * d for n, t, d in zip(tokens, tile, dilation, strict=True))


def _split_shape(
    padded: tuple[int, ...], tile: tuple[int, ...], dilation: tuple[int, ...]
) -> list[int]:
    """Each axis as (tile number, place in the tile, dilation group)."""
    shape: list[int] = []
    for n, t, d in zip(padded, tile, dilation, strict=True):
        shape += [n // (t * d), t, d]
    return shape


def _order(rank: int, flip: bool) -> list[int]:
    """Dimensions of the split tensor: batch, groups, tile numbers, places, heads, features."""
    groups = [3 + 3 * axis for axis in range(rank)]
    numbers = [1 + 3 * axis for axis in range(rank)]
    places = [2 + 3 * axis for axis in range(rank)]
    if flip:
        numbers, places = numbers[::-1], places[::-1]
    return [0, *groups, *numbers, *places, 1 + 3 * rank, 2 + 3 * rank]


def _check(tensor: Tensor, dims: int | None) -> None:
    validation.check_is_tensor("tensor", tensor)
    if dims is None and not 4 <= tensor.dim() <= 6:
        raise ValueError(
            "tensor must have 4, 5 or 6 dimensions, [batch, *tokens, heads, head_dim], got shape "
            f"{tuple(tensor.shape)}"
        )
    if dims is not None and tensor.dim() != dims:
        raise ValueError(
            f"tensor must have {dims} dimensions, [batch, tokens, heads, head_dim], got shape "
            f"{tuple(tensor.shape)}"
        )


def token_permute_operation(
    tensor: Tensor,
    tile_shape: Sequence[int],
    dilation: Sequence[int] | int | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Make every tile of every dilation group contiguous, padding with zeros at the ends.

    Args:
        tensor: ``[batch, *tokens, heads, head_dim]``.
        tile_shape: Extents of a tile.
        dilation: Dilation groups become batch entries; None means 1.
        flip_tiled_dims: Whether the first axis varies fastest, among tiles and inside of them;
            otherwise the last one does.
        use_torch: Accepted for compatibility; there is one implementation, in torch operations.

    Returns:
        The permuted tensor ``[batch * prod(dilation), padded tokens / prod(dilation), heads,
        head_dim]``, the token shape, and the padded token shape. Differentiable.

    Raises:
        ValueError: A tensor of the wrong rank, or a tile or dilation that does not fit it.
    """
    _check(tensor, None)
    tokens = tuple(tensor.shape[1:-2])
    rank = len(tokens)
    tile = validation.int_tuple("tile_shape", tile_shape, rank)
    groups = validation.int_tuple("dilation", 1 if dilation is None else dilation, rank)
    padded = _padded(tokens, tile, groups)
    borders: list[int] = [0, 0, 0, 0]
    for n, m in zip(reversed(tokens), reversed(padded), strict=True):
        borders += [0, m - n]
    split = pad(tensor, borders).reshape(
        tensor.shape[0], *_split_shape(padded, tile, groups), *tensor.shape[-2:]
    )
    ordered = split.permute(_order(rank, flip_tiled_dims))
    batch = ordered.shape[: rank + 1].numel()
    length = ordered.shape[rank + 1 : -2].numel()
    return ordered.reshape(batch, length, *tensor.shape[-2:]), tokens, padded


def token_unpermute_operation(
    tensor: Tensor,
    token_layout_shape: Sequence[int],
    tile_shape: Sequence[int],
    dilation: Sequence[int] | int | None = None,
    flip_tiled_dims: bool = True,
    use_torch: bool = True,
) -> Tensor:
    """The inverse of :func:`token_permute_operation`, without the padding.

    Args:
        tensor: As :func:`token_permute_operation` returns it.
        token_layout_shape: The token shape that it returned.
        tile_shape: As given to it.
        dilation: As given to it.
        flip_tiled_dims: As given to it.
        use_torch: As there.

    Returns:
        ``[batch, *tokens, heads, head_dim]``. Differentiable.

    Raises:
        ValueError: A tensor that does not have the shape of such a result.
    """
    _check(tensor, 4)
    tokens = tuple(token_layout_shape)
    rank = len(tokens)
    tile = validation.int_tuple("tile_shape", tile_shape, rank)
    groups = validation.int_tuple("dilation", 1 if dilation is None else dilation, rank)
    padded = _padded(tokens, tile, groups)
    order = _order(rank, flip_tiled_dims)
    shape = [-1, *_split_shape(padded, tile, groups), *tensor.shape[-2:]]
    count = 1
    for n in padded:
        count *= n
    per_group = 1
    for d in groups:
        per_group *= d
    if tensor.shape[1] * per_group != count or tensor.shape[0] % per_group:
        raise ValueError(
            f"tensor must have shape [batch * {per_group}, {count // per_group}, heads, "
            f"head_dim] for tokens of shape {tokens}, got {tuple(tensor.shape)}"
        )
    shape[0] = tensor.shape[0] // per_group
    split = tensor.reshape([shape[dim] for dim in order])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    whole = split.permute(inverse).reshape(shape[0], *padded, *tensor.shape[-2:])
    return whole[(slice(None), *(slice(0, n) for n in tokens))].contiguous()


__all__ = ["token_permute_operation", "token_unpermute_operation"]
