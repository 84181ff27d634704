"""Ranking in registers: scores as sortable integers, the k-th largest of a row, and places of the chosen columns."""

import triton
import triton.language as tl


@triton.jit
def sortable_key(scores):
    """Unsigned integers in the order of the float32 scores: -0 equals +0, NaN is 1, below -inf; no score gives 0."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.uint32, bitcast=True)
    keys = bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000).to(tl.uint32)
    return tl.where(scores == scores, keys, 1).to(tl.uint32)


@triton.jit
def score_of_key(keys):
    """The float32 score of a sortable key; NaN for 1."""
    bits = keys ^ tl.where(keys >= 0x80000000, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def kth_key(keys, k):
    """The k-th largest key [ROWS] of each row of keys [ROWS, COLUMNS], 0 where there are fewer; k [ROWS] at least 1."""
    kth = tl.full([keys.shape[0]], 0, tl.uint32)
    bit = tl.full([keys.shape[0]], 0x80000000, tl.uint32)
    # LLVM of triton 3.9.0 counts what it knows to be 0 or 1 as bits, which it puts together in local memory.
    one = tl.minimum(k, 1)
    for _ in range(32):  # from the highest bit down: a bit is set if k keys are then still as large
        trial = kth | bit
        bit = bit >> 1
        reach = tl.sum(tl.where(keys >= trial[:, None], one[:, None], 0), 1)
        kth = tl.where(reach >= k, trial, kth)
    return kth


@triton.jit
def words_of(bits):
    """Booleans [ROWS, COLUMNS] packed into words [ROWS, COLUMNS / 32]: column 32 * w + i is bit i of word w."""
    WORDS: tl.constexpr = bits.shape[1] // 32
    values = tl.where(bits, ((tl.arange(0, bits.shape[1]) * 0 + 1) << (tl.arange(0, bits.shape[1]) % 32))[None, :], 0)
    return tl.sum(tl.reshape(values, [bits.shape[0], WORDS, 32]), 2).to(tl.uint32)


@triton.jit
def bit_count(words):
    """The number of bits set in each 32-bit word."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return ((words + (words >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def sums_before(counts):
    """For each of counts [ROWS, WORDS] the sum of those before it in its row."""
    WORDS: tl.constexpr = counts.shape[1]
    if WORDS <= 16:  # no scan: triton 3.6.0 fails on some layouts of so few columns
        words = tl.arange(0, WORDS)
        earlier = words[None, :] < words[:, None]  # [WORDS, WORDS]
        sums = tl.sum(tl.where(earlier[None, :, :], counts[:, None, :], 0), 2)
    else:
        sums = tl.cumsum(counts, 1) - counts
    return sums


@triton.jit
def write_chosen(output_rows, row_mask, first, keys, kth, ties_wanted, taken):
    """Write the column, counted from `first`, of each key above kth [ROWS], and of the first `ties_wanted` equal to it.

    output_rows [ROWS]: pointers; taken [ROWS]: how many columns were written there before; keys [ROWS, COLUMNS], of
    which 0 is never chosen. Returns how many ties are still wanted, and the new taken. Few keys of a tile are chosen:
    they are taken from bit sets, one at a time for all rows together, which takes fewer instructions than a scan of
    the tile.
    """
    valid = (keys > 0) & row_mask[:, None]
    ties = words_of(valid & (keys == kth[:, None]))  # [ROWS, WORDS]
    left = words_of(valid & (keys > kth[:, None]))
    ties_count = bit_count(ties)
    quota = ties_wanted[:, None] - sums_before(ties_count)
    quota = tl.minimum(tl.maximum(quota, 0), ties_count)  # of each word
    count = bit_count(left) + quota
    places = taken[:, None] + sums_before(count)
    columns = first + 32 * tl.arange(0, keys.shape[1] // 32)
    left = left | tl.where(quota > 0, ties, 0).to(tl.uint32)
    while tl.max(tl.max((left > 0).to(tl.int32), 1), 0) > 0:
        lowest = left ^ (left & (left - 1))
        left = left ^ lowest
        is_tie = (ties & lowest) > 0
        take = (lowest > 0) & ((is_tie == 0) | (quota > 0))
        # A power of two as a float has the number of its bit as the exponent.
        column = columns[None, :] + (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(output_rows[:, None] + places, column, mask=take)
        places += take.to(tl.int32)
        quota -= (take & is_tie).to(tl.int32)
    return tl.maximum(ties_wanted - tl.sum(ties_count, 1), 0), taken + tl.sum(count, 1)


@triton.jit
def place_top_k(keys, top_k):
    """Which of the keys [ROWS, COLUMNS] are among the top_k highest of their row, in order of their columns.

    Of equal keys the first are taken, and a key of 0 never is. Returns whether a key is chosen, its place among the
    chosen ones of its row, and how many these are [ROWS].
    """
    kth = kth_key(keys, tl.zeros([keys.shape[0]], tl.int32) + top_k)
    above = keys > kth[:, None]
    ties = (keys == kth[:, None]) & (keys > 0)
    # One scan counts both up to and with each column, in the halves of an integer: a row has fewer than 2^15 columns.
    counts = tl.cumsum(above.to(tl.int32) + (ties.to(tl.int32) << 16), 1)
    ties_wanted = (top_k - tl.sum(above.to(tl.int32), 1))[:, None]
    ties_so_far = counts >> 16
    chosen = above | (ties & (ties_so_far <= ties_wanted))
    places = (counts & 0xFFFF) + tl.minimum(ties_so_far, ties_wanted) - 1
    return chosen, places, tl.sum(chosen.to(tl.int32), 1)


@triton.jit
def fill_unused(output_rows, row_mask, taken, top_k, value):
    """Write the value from place `taken` [ROWS] up to top_k."""
    for first in range(0, top_k, 32):
        places = first + tl.arange(0, 32)[None, :]
        unused = row_mask[:, None] & (places >= taken[:, None]) & (places < top_k)
        tl.store(output_rows[:, None] + places, tl.zeros_like(places) + value, mask=unused)
