"""The order of the tokens of a frame: a permutation that can be undone, and compact blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memflow_ops.token_order import strip_order, token_order

SIZES = [(1, 1), (3, 5), (7, 1), (8, 8), (12, 5), (13, 17), (20, 4), (30, 52), (60, 104)]


@given(rows=st.integers(1, 40), columns=st.integers(1, 40))
def test_strips_are_a_permutation_of_neighbours(rows, columns):
    places = strip_order(rows, columns)
    assert torch.equal(places.sort().values, torch.arange(rows * columns))
    row, column = places // columns, places % columns
    assert ((column[1:] - column[:-1]).abs() <= 1).all(), "never more than a column away from the token before"
    assert ((row[1:] - row[:-1]) <= 12).all() and ((row[1:] - row[:-1]) >= -11).all()


@pytest.mark.parametrize("rows, columns", SIZES)
def test_what_is_reordered_comes_back(rows, columns):
    order = token_order("strips", rows, columns)
    x = torch.randn(2, 3 * rows * columns, 2, 4)
    moved = order.apply(x)
    assert torch.equal(order.undo(moved), x) and torch.equal(order.apply(order.undo(x)), x)
    frame = x.unflatten(1, (3, rows * columns))
    for i in (0, rows * columns // 2, rows * columns - 1):
        assert torch.equal(moved.unflatten(1, (3, -1))[:, :, i], frame[:, :, int(order.places[i])])


def test_strips_of_a_small_frame_by_hand():
    # 12 rows are round(1.5) = 2 strips of 6; the second goes back from the right edge.
    first = [row * 2 + column for column in (0, 1) for row in range(6)]
    second = [row * 2 + column for column in (1, 0) for row in range(6, 12)]
    assert strip_order(12, 2).tolist() == first + second
    assert strip_order(3, 2).tolist() == [0, 2, 4, 1, 3, 5]


def test_blocks_of_a_wan_frame_are_compact():
    """30 x 52 tokens: 64 in a row are 1.2 rows, in strips 7.5 rows are about 8.5 columns."""
    rows = strip_order(30, 52) // 52
    columns = strip_order(30, 52) % 52
    for start in range(0, 1560, 64):
        block = slice(start, min(start + 64, 1560))
        assert columns[block].max() - columns[block].min() <= 9
        assert rows[block].max() - rows[block].min() <= 15


def test_raster_is_no_order_and_other_names_are_refused():
    assert token_order("raster", 4, 4) is None
    with pytest.raises(ValueError, match="token_order must be raster or strips, got 'hilbert'"):
        token_order("hilbert", 4, 4)
