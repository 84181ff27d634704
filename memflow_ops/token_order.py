"""The order in which the tokens of a frame lie, which decides what part of the picture a block of them covers.

Attention does not depend on the order of keys, nor a transformer on that of its tokens, as long as positions travel
with them. But a block is consecutive tokens: row by row it is a thin stripe of the frame, in strips a compact patch,
whose keys may be more alike, so that their mean says more of them.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

TokenOrderName = Literal["raster", "strips"]
"""raster: row by row, as models have it. strips: see `strip_order`."""
STRIP_ROWS = 8
"""Rows of tokens of a strip, about."""


class TokenOrder(NamedTuple):
    """A permutation of the tokens of a frame, and what undoes it."""

    places: Tensor  # (T,) int64: the raster index of every token, in the new order
    inverse: Tensor  # (T,) int64: the place in the new order of every token, in raster order

    def apply(self, x: Tensor) -> Tensor:
        """x (B, F * T, ...) of whole frames in raster order, with the tokens of each in the new order."""
        return _reordered(x, self.places)

    def undo(self, x: Tensor) -> Tensor:
        """x (B, F * T, ...) of whole frames in the new order, with the tokens of each in raster order."""
        return _reordered(x, self.inverse)


def token_order(name: TokenOrderName, rows: int, columns: int, device: torch.device | str = "cpu") -> TokenOrder | None:
    """The order of that name for frames of rows x columns tokens; None where tokens stay as they are."""
    if name == "raster":
        return None
    if name != "strips":
        raise ValueError(f"token_order must be raster or strips, got {name!r}")
    places = strip_order(rows, columns).to(device)
    return TokenOrder(places, places.argsort())


def strip_order(rows: int, columns: int) -> Tensor:
    """The raster index of every token (rows * columns,) int64, in round(rows / 8) strips of nearly equal height.

    A strip goes column by column, from top to bottom in each, and every other strip from right to left, so that tokens
    that follow one another are neighbours, or stand in neighbouring columns.
    """
    grid = torch.arange(rows * columns, dtype=torch.int64, device="cpu").view(rows, columns)
    count = max(1, round(rows / STRIP_ROWS))
    bounds = [round(n * rows / count) for n in range(count + 1)]
    strips = (grid[top:bottom].T for top, bottom in pairwise(bounds))
    return torch.cat([(strip.flip(0) if n % 2 else strip).flatten() for n, strip in enumerate(strips)])


def _reordered(x: Tensor, places: Tensor) -> Tensor:
    return x.unflatten(1, (-1, len(places))).index_select(2, places).flatten(1, 2)
