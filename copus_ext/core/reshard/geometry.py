"""Boxes: axis-aligned pieces of a tensor, in the tensor's own coordinates.

Every piece that tensor, pipeline, expert or data parallelism cuts out of a logical tensor is one box, or, where a
flat range of a C-order tensor is cut (Megatron's distributed optimizer), a few of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import NamedTuple


class Box(NamedTuple):
    """Elements ``offset[i] <= index[i] < offset[i] + shape[i]`` along every axis. No axes: one scalar."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """The first index behind the box, along every axis."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))


def intersect(a: Box, b: Box) -> Box | None:
    """The elements in both, or None where there are none."""
    offset = tuple(map(max, a.offset, b.offset))
    shape = tuple(min(p, q) - o for p, q, o in zip(a.end, b.end, offset, strict=True))
    return Box(offset, shape) if all(n > 0 for n in shape) else None


def subtract(a: Box, b: Box) -> list[Box]:
    """The elements of ``a`` that are not in ``b``, as disjoint boxes (at most two per axis)."""
    common = intersect(a, b)
    if common is None:
        return [a] if a.volume else []
    pieces = []
    offset, shape = list(a.offset), list(a.shape)
    for axis, (start, count) in enumerate(zip(*common, strict=True)):
        below = start - offset[axis]
        above = offset[axis] + shape[axis] - (start + count)
        for first, thickness in ((offset[axis], below), (start + count, above)):
            if thickness:
                pieces.append(
                    Box(
                        (*offset[:axis], first, *offset[axis + 1 :]),
                        (*shape[:axis], thickness, *shape[axis + 1 :]),
                    )
                )
        offset[axis], shape[axis] = start, count  # what is left of this axis for the next ones
    return pieces


def subtract_all(box: Box, taken: Iterable[Box]) -> list[Box]:
    """The elements of ``box`` in none of ``taken``, as disjoint boxes."""
    rest = [box]
    for other in taken:
        rest = [piece for part in rest for piece in subtract(part, other)]
    return rest


@functools.lru_cache(maxsize=2**12)  # shapes come again and again
def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """C-order strides in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def shift(index: tuple[int, ...], by: tuple[int, ...], base: tuple[int, ...]) -> tuple[int, ...]:
    """``index + by - base``: the position of global index ``by`` in something whose ``base`` lies at ``index``."""
    return tuple(i + b - o for i, b, o in zip(index, by, base, strict=True))


def flat_range_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements ``[start, stop)`` of a flattened C-order tensor as boxes, in order.

    Args:
        shape: of the tensor.
        start: first flat index; ``0 <= start``.
        stop: flat index behind the last; ``stop <= prod(shape)``.

    Returns:
        At most ``2 * len(shape) - 1`` disjoint boxes.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [Box((start,), (stop - start,)) if shape else Box((), ())]
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        return _within_row(first, shape[1:], head, tail)
    boxes = _within_row(first, shape[1:], head, row) if head else []
    whole = first + bool(head)
    if last > whole:
        boxes.append(Box((whole, *[0] * (len(shape) - 1)), (last - whole, *shape[1:])))
    return boxes + _within_row(last, shape[1:], 0, tail)


def _within_row(index: int, shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    return [Box((index, *box.offset), (1, *box.shape)) for box in flat_range_boxes(shape, start, stop)]
