"""Token permutation: an order written by hand, and round trips."""

from __future__ import annotations

import pytest
import torch

from natten.token_permute import token_permute_operation, token_unpermute_operation


def _grid(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(1, *shape, 1, 1)


@pytest.mark.parametrize(
    ("flip", "expected"),
    [
        (True, [0, 4, 1, 5, 8, 12, 9, 13, 2, 6, 3, 7, 10, 14, 11, 15]),
        (False, [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]),
    ],
)
def test_order(flip, expected):
    permuted, tokens, padded = token_permute_operation(_grid(4, 4), (2, 2), flip_tiled_dims=flip)
    assert permuted.flatten().tolist() == expected
    assert tokens == padded == (4, 4)


def test_dilation_groups_are_batch_entries():
    permuted, _, _ = token_permute_operation(_grid(6), (3,), dilation=(2,))
    assert permuted.shape == (2, 3, 1, 1)
    assert permuted.flatten(1).tolist() == [[0, 2, 4], [1, 3, 5]]


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(
    ("tokens", "tile", "dilation"),
    [
        ((7,), (3,), None),
        ((7, 9), (2, 4), (2, 1)),
        ((3, 5, 7), (2, 2, 3), (1, 2, 2)),
        ((8, 8), (4, 4), None),
    ],
)
def test_round_trip(tokens, tile, dilation, flip):
    tensor = torch.randn(2, *tokens, 3, 4)
    permuted, layout, padded = token_permute_operation(tensor, tile, dilation, flip)
    assert layout == tokens
    assert permuted[0].numel() * permuted.shape[0] == 2 * torch.Size(padded).numel() * 12
    back = token_unpermute_operation(permuted, layout, tile, dilation, flip)
    assert torch.equal(back, tensor)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="tensor must have 4, 5 or 6 dimensions"):
        token_permute_operation(torch.randn(2, 3), (2,))
    with pytest.raises(ValueError, match="tile_shape must have 2 values"):
        token_permute_operation(torch.randn(1, 4, 4, 1, 1), (2,))
    with pytest.raises(ValueError, match="tensor must have shape"):
        token_unpermute_operation(torch.randn(1, 5, 1, 1), (4, 4), (2, 2))
