"""Geometry against brute force: every box is painted into a small array and counted."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from copus_ext.core.reshard.geometry import Box, flat_range_boxes, intersect, shift, strides, subtract, subtract_all


def painted(shape: tuple[int, ...], boxes: list[Box]) -> np.ndarray:
    """How many of the boxes hold each element of a tensor of this shape."""
    counts = np.zeros(shape, dtype=int)
    for box in boxes:
        assert all(n > 0 for n in box.shape)
        counts[tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))] += 1
    return counts


def random_box(rng: random.Random, shape: tuple[int, ...]) -> Box:
    edges = [sorted(rng.sample(range(n + 1), 2)) for n in shape]
    return Box(tuple(low for low, _ in edges), tuple(high - low for low, high in edges))


@pytest.mark.parametrize("shape", [(9,), (5, 6), (3, 4, 5), (2, 3, 2, 4)])
def test_intersect_and_subtract_split_a_box_exactly(shape: tuple[int, ...]) -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = random_box(rng, shape), random_box(rng, shape)
        in_a, in_b = painted(shape, [a]), painted(shape, [b])
        common = intersect(a, b)
        assert np.array_equal(painted(shape, [common] if common else []), in_a * in_b)
        rest = subtract(a, b)
        assert len(rest) <= 2 * len(shape)
        assert np.array_equal(painted(shape, rest), in_a * (1 - in_b))


def test_subtract_all_leaves_what_nobody_took() -> None:
    rng = random.Random(1)
    shape = (5, 6, 3)
    for _ in range(100):
        box, taken = random_box(rng, shape), [random_box(rng, shape) for _ in range(4)]
        expected = painted(shape, [box]) * (painted(shape, taken) == 0)
        assert np.array_equal(painted(shape, subtract_all(box, taken)), expected)


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (1, 6), (3, 2, 4), (2, 1, 3, 2)])
def test_every_flat_range_is_few_boxes_in_order(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        boxes = flat_range_boxes(shape, start, stop)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        flat = painted(shape, boxes).reshape(-1)
        assert np.array_equal(flat, [start <= i < stop for i in range(size)])
        firsts = [sum(o * s for o, s in zip(box.offset, strides(shape), strict=True)) for box in boxes]
        assert firsts == sorted(firsts)


def test_scalars_are_boxes_too() -> None:
    scalar = Box((), ())
    assert scalar.volume == 1
    assert intersect(scalar, scalar) == scalar
    assert subtract(scalar, scalar) == []


def test_strides_are_numpys() -> None:
    for shape in [(7,), (4, 5), (2, 3, 4)]:
        array = np.zeros(shape, dtype=np.int8)
        assert strides(shape) == array.strides


def test_shift_moves_between_coordinate_systems() -> None:
    assert shift((1, 0), (12, 7), (10, 5)) == (3, 2)
