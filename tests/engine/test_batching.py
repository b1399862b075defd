"""Batches: every example once, lengths together, padding that no position points at."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_traces.engine.batching import Example, epoch_batches, micro_batches, pad, padded_shape, padding_share

LENGTHS = np.random.default_rng(0).integers(1, 400, 3000).tolist()


def test_an_epoch_has_every_example_once():
    for epoch in range(3):
        batches = epoch_batches(LENGTHS, 16, seed=4, epoch=epoch)
        assert Counter(index for batch in batches for index in batch) == Counter(range(len(LENGTHS)))
        assert len(batches) == -(-len(LENGTHS) // 16)
        assert sorted(map(len, batches))[0] == len(LENGTHS) % 16 and sorted(map(len, batches))[1] == 16


def test_order_follows_from_seed_and_epoch():
    first = epoch_batches(LENGTHS, 16, seed=4, epoch=0)
    assert first == epoch_batches(LENGTHS, 16, seed=4, epoch=0)
    others = [epoch_batches(LENGTHS, 16, seed=4, epoch=1), epoch_batches(LENGTHS, 16, seed=5, epoch=0)]
    for other in others:
        assert sorted(map(sorted, first)) != sorted(map(sorted, other))  # other batches, not only another order


def test_lengths_are_kept_together_and_batches_are_not_in_order_of_length():
    batches = epoch_batches(LENGTHS, 16, seed=0, epoch=0)
    shuffled = np.random.default_rng(1).permutation(len(LENGTHS)).tolist()
    unsorted = [shuffled[at : at + 16] for at in range(0, len(shuffled), 16)]
    assert padding_share(batches, LENGTHS) < 0.05 < 0.4 < padding_share(unsorted, LENGTHS)
    means = [np.mean([LENGTHS[index] for index in batch]) for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_micro_batches_hold_the_budget(lengths, budget):
    batches = micro_batches(range(len(lengths)), lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
    for before, after in pairwise(batches):  # none that the one before had room for
        longest = max(lengths[index] for index in before)
        assert (len(before) + 1) * longest > budget and longest >= max(lengths[index] for index in after)


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ((1, 1, 0), (1, 1, 0)),
        ((2, 2, 1), (2, 33, 128)),
        ((3, 33, 128), (4, 33, 128)),
        ((5, 118, 129), (8, 129, 256)),  # 117 queries to 128
        ((16, 117, 0), (16, 129, 0)),
        ((17, 213, 0), (24, 225, 0)),  # 256 would add more than a tenth
        ((64, 600, 500), (64, 641, 512)),
    ],
)
def test_shapes_on_cuda(lengths, shape):
    assert padded_shape("cuda", *lengths) == shape
    assert padded_shape("cuda", *shape) == shape  # and stays there
    assert padded_shape("metal", *lengths) == padded_shape("cpu", *lengths) == lengths


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.integers(1, 9000))
def test_micro_batches_hold_the_budget_with_padding(lengths, budget):
    batches = micro_batches(range(len(lengths)), lengths, budget, "cuda")
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        rows, length, _ = padded_shape("cuda", len(batch), max(lengths[index] for index in batch))
        assert len(batch) == 1 or rows * length <= budget
        ids, positions = pad([Example("", (7,) * lengths[index], (True,) * lengths[index]) for index in batch], "cuda")
        assert ids.shape == (rows, length) and (ids[:, 1:].reshape(-1)[positions] == 7).all()
        assert len(positions) == sum(lengths[index] - 1 for index in batch)


def test_padding_and_positions():
    a = Example("a", (5, 6, 7, 8), (False, False, True, True))
    b = Example("b", (9, 4), (True, True))  # the first token has nothing before it
    c = Example("c", (1, 2, 3), (False, True, False))
    assert [a.count, b.count, c.count] == [2, 1, 1]
    ids, positions = pad([a, b, c])
    assert ids.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0], [1, 2, 3, 0]]
    assert positions.tolist() == [1, 2, 3 + 0, 6 + 0]
    assert ids[:, 1:].reshape(-1)[positions].tolist() == [7, 8, 4, 2]


@pytest.mark.parametrize(("batches", "share"), [([[0], [1, 2]], 1 / 10), ([[0, 1, 2]], 3 / 12), ([], 0.0)])
def test_padding_share(batches, share):
    assert padding_share(batches, [4, 3, 2]) == pytest.approx(share)
