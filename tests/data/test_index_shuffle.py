"""The order of an epoch is a uniform permutation, equal on all platforms."""

import hashlib
import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from rescalevit_jax.data import index_shuffle


def order(size, seed=0, epoch=0):
  return index_shuffle.shuffle(np.arange(size), size, seed, epoch)


@pytest.mark.parametrize("sizes", [range(1, 201), [50_000], [2**20 + 1]])
def test_every_index_occurs_once(sizes):
  for size in sizes:
    found = order(size, seed=3, epoch=size)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_an_index_is_shuffled_without_the_others():
  whole = order(1437, 2**32 - 1, 10**6)
  for i in (0, 700, 1436):
    found = index_shuffle.shuffle(np.array([i]), 1437, 2**32 - 1, 10**6)
    assert found == whole[i]


@pytest.mark.parametrize("size", [1, 10, 1437, 50_000, 2**31 - 1, 2**31])
def test_shuffle_equals_python_integer_arithmetic(size):
  rows = math.isqrt(size - 1) + 1
  sides = (rows, (size + rows - 1) // rows)
  bits = hashlib.shake_128(b"4294967296,12").digest(96)
  keys = [int.from_bytes(bits[i : i + 8], "little") for i in range(0, 96, 8)]

  def expected(cell):
    left, right = divmod(cell, sides[1])
    for i, key in enumerate(keys):
      mixed = (right ^ key) * 0xBF58476D1CE4E5B9 % 2**64
      mixed = (mixed ^ (mixed >> 32)) * 0x94D049BB133111EB % 2**64
      left, right = right, (left + (mixed >> 32)) % sides[i % 2]
    cell = left * sides[1] + right
    return cell if cell < size else expected(cell)

  indices = np.unique(np.linspace(0, size - 1, 200).astype(np.int64))
  found = index_shuffle.shuffle(indices, size, seed=2**32, epoch=12)
  assert found.tolist() == [expected(int(i)) for i in indices]


def test_all_orders_of_five_are_equally_frequent():
  number = {p: i for i, p in enumerate(itertools.permutations(range(5)))}
  found = [number[tuple(order(5, seed).tolist())] for seed in range(6000)]
  counts = np.bincount(found, minlength=120)
  assert stats.chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("size", [10, 17])
def test_positions_and_pairs_are_uniform(size):
  orders = np.array([order(size, seed, epoch=1) for seed in range(4000)])
  for i in range(size - 1):
    places = np.bincount(orders[:, i], minlength=size)
    assert stats.chisquare(places).pvalue > 0.001
    steps = (orders[:, i + 1] - orders[:, i]) % size
    assert stats.chisquare(np.bincount(steps)[1:]).pvalue > 0.001


def test_neighbors_epochs_and_seeds_are_uncorrelated():
  size = 50_000
  x = order(size)
  others = [np.roll(x, 1), np.arange(size), order(size, 0, 1), order(size, 1)]
  for y in others:
    # Uncorrelated orders give 0 with standard deviation 1 / sqrt(size).
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / math.sqrt(size)


def test_seeds_and_epochs_do_not_collide():
  keys = [(1, 23), (12, 3), (2**32 - 1, 0), (2**32, 0), (0, 1), (0, 2**32)]
  assert len({tuple(order(50, *key).tolist()) for key in keys}) == len(keys)


def test_memory_is_independent_of_size():
  tracemalloc.start()
  try:
    index_shuffle.shuffle(np.arange(128), 2**31, 0, 0)
    assert tracemalloc.get_traced_memory()[1] < 100_000
  finally:
    tracemalloc.stop()
