"""Transfer plans of random layouts, carried out on numpy arrays: the ground truth is the logical tensor itself."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from copus_ext.core.reshard.geometry import Box, flat_range_boxes
from copus_ext.core.reshard.transfer import Holding, Transfer, TransferError, TransferPlan, plan_transfer

SHAPES = {"embedding": (24, 6), "bias": (12,), "expert": (4, 6, 8), "scale": ()}
ITEM_BYTES = {"embedding": 4, "bias": 8, "expert": 4, "scale": 2}
WORLD = 4


def random_side(rng: random.Random) -> list[list[Holding]]:
    """A layout like Megatron's: each key cut along an axis, replicated, and perhaps held in flat ranges."""
    side: list[list[Holding]] = [[] for _ in range(WORLD)]
    for key, shape in SHAPES.items():
        cuts = rng.choice([1, 2, 4]) if shape else 1
        axis = rng.randrange(len(shape)) if shape else 0
        holders = rng.choice([[0, 1, 2, 3], [0, 3], [1, 2, 3]])
        flat = rng.random() < 0.5
        if cuts > 1 and shape[axis] % cuts == 0 and not flat:
            width = shape[axis] // cuts
            for rank in range(WORLD):
                at = rank % cuts
                offset = tuple(at * width if i == axis else 0 for i in range(len(shape)))
                local = tuple(width if i == axis else n for i, n in enumerate(shape))
                side[rank].append(Holding(key, Box(offset, local), len(side[rank]), (0,) * len(shape), ITEM_BYTES[key]))
            continue
        size = int(np.prod(shape))
        share = -(-size // len(holders)) if flat else size
        for place, rank in enumerate(holders):
            first = place * share if flat else 0
            for box in flat_range_boxes(shape, first, min(size, first + share)):
                side[rank].append(Holding(key, box, len(side[rank]), (0,) * len(shape), ITEM_BYTES[key]))
    for holdings in side:
        rng.shuffle(holdings)
    return [[h._replace(piece=i) for i, h in enumerate(holdings)] for holdings in side]


def window(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))


def contents(side: list[list[Holding]], logical: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    return [[np.array(logical[h.key][window(*h.box)]) for h in holdings] for holdings in side]


def carry_out(transfers: list[Transfer], old: list[list[np.ndarray]], new: list[list[np.ndarray]]) -> None:
    for transfer in transfers:
        source, target = old[transfer.source][transfer.taken.piece], new[transfer.target][transfer.given.piece]
        shape = transfer.taken.box.shape
        target[window(transfer.given.start, shape)] += source[window(transfer.taken.start, shape)]


def lower_bound(old: list[list[Holding]], new: list[list[Holding]]) -> int:
    """Element by element: what a rank needs and does not hold must come once."""
    total = 0
    for before, after in zip(old, new, strict=True):
        for key, shape in SHAPES.items():
            need, have = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
            for holding in (h for h in after if h.key == key):
                need[window(*holding.box)] = True
            for holding in (h for h in before if h.key == key):
                have[window(*holding.box)] = True
            total += int((need & ~have).sum()) * ITEM_BYTES[key]
    return total


def random_plan(seed: int) -> tuple[list[list[Holding]], list[list[Holding]], TransferPlan]:
    rng = random.Random(seed)
    old, new = random_side(rng), random_side(rng)
    return old, new, plan_transfer(old, new)


@pytest.mark.parametrize("seed", range(60))
def test_plan_reproduces_the_logical_tensors_with_the_least_bytes(seed: int) -> None:
    old, new, plan = random_plan(seed)
    logical = {
        key: np.arange(1, 1 + int(np.prod(shape)), dtype=np.int64).reshape(shape) for key, shape in SHAPES.items()
    }
    arrived = [[np.zeros(h.box.shape, dtype=np.int64) for h in holdings] for holdings in new]
    carry_out(list(plan.transfers), contents(old, logical), arrived)
    # += above: an element that came twice would be twice its value
    for got, want in zip(arrived, contents(new, logical), strict=True):
        assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))
    assert plan.bytes_moved == plan.bytes_minimum == lower_bound(old, new)


def test_replicas_share_the_sending() -> None:
    """Two holders, six ranks in need: each sends to three."""
    whole = Box((0, 0), (8, 8))
    old = [[Holding("w", whole, 0, (0, 0), 4)] if rank < 2 else [] for rank in range(8)]
    new = [[Holding("w", whole, 0, (0, 0), 4)] for _ in range(8)]
    sent = Counter(t.source for t in plan_transfer(old, new).transfers if t.on_wire)
    assert sent == {0: 3, 1: 3}


def test_a_holder_on_the_same_node_is_preferred() -> None:
    whole = Box((0, 0), (8, 8))
    old = [[Holding("w", whole, 0, (0, 0), 4)] if rank in (0, 5) else [] for rank in range(8)]
    new = [[Holding("w", whole, 0, (0, 0), 4)] for _ in range(8)]
    sources = {t.target: t.source for t in plan_transfer(old, new, ranks_per_node=4).transfers}
    assert sources == {0: 0, 1: 0, 2: 0, 3: 0, 4: 5, 5: 5, 6: 5, 7: 5}


def test_part_of_what_is_held_may_be_planned_for() -> None:
    whole, half = Box((0,), (8,)), Box((4,), (4,))
    old = [[Holding("w", whole, 0, (0,), 4), Holding("b", whole, 1, (0,), 4)], []]
    plan = plan_transfer(old, [[], [Holding("w", half, 0, (0,), 4)]], partial=True)
    assert [(t.source, t.target, t.taken.box) for t in plan.transfers] == [(0, 1, half)]


def test_what_cannot_be_planned_is_refused() -> None:
    half, whole = Box((0,), (4,)), Box((0,), (8,))
    with pytest.raises(TransferError, match="nobody holds"):
        plan_transfer([[Holding("w", half, 0, (0,), 4)]], [[Holding("w", whole, 0, (0,), 4)]])
    with pytest.raises(TransferError, match="only one of the two jobs has b"):
        plan_transfer([[Holding("w", half, 0, (0,), 4)]], [[Holding("b", half, 0, (0,), 4)]])
    with pytest.raises(TransferError, match="32 bytes in the old job and 16"):
        plan_transfer([[Holding("w", whole, 0, (0,), 4)]], [[Holding("w", half, 0, (0,), 4)]])
