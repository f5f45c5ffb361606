"""Who sends what to whom when a job's tensors go from one layout to another on the same ranks.

What a rank holds is a list of :class:`Holding`: boxes of logical tensors, with where they lie on the rank. Replicas (of
data parallelism, of tied embeddings) are simply more holders. From the holdings of all ranks before and after, every
rank computes the same plan: each new box is covered exactly once, by the rank's own data where it has it, and else by
the holder that has least to send.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from copus_ext.core.geometry import Box, intersect, shift, subtract, subtract_all

Holdings = Sequence[Sequence["Holding"]]  # by rank


class TransferError(ValueError):
    """The two sides do not hold the same logical tensors."""


class Holding(NamedTuple):
    """A box of logical tensor ``key`` on a rank: its first element lies at index ``start`` of the rank's ``piece``.

    ``item_bytes``: of one element, over all tensors that travel together (Adam's two moments: 8).
    """

    key: str
    box: Box
    piece: int
    start: tuple[int, ...]
    item_bytes: int

    def part(self, box: Box) -> Holding:
        """The part of this holding inside ``box``, which must lie in it."""
        return self._replace(box=box, start=shift(self.start, box.offset, self.box.offset))


class Transfer(NamedTuple):
    """One box from ``source`` to ``target``; on one rank when they are the same."""

    source: int
    target: int
    taken: Holding
    given: Holding

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.taken.box.volume * self.taken.item_bytes

    @property
    def on_wire(self) -> bool:
        """Between two ranks."""
        return self.source != self.target

    def halves(self) -> tuple[Transfer, Transfer]:
        """The same elements as two transfers, cut across the longest axis."""
        offset, shape = self.taken.box
        axis = max(range(len(shape)), key=shape.__getitem__)
        low = shape[axis] // 2
        sizes = ((0, low), (low, shape[axis] - low))
        boxes = [
            Box(
                (*offset[:axis], offset[axis] + first, *offset[axis + 1 :]),
                (*shape[:axis], count, *shape[axis + 1 :]),
            )
            for first, count in sizes
        ]
        first, second = (self._replace(taken=self.taken.part(b), given=self.given.part(b)) for b in boxes)
        return first, second


@dataclass(frozen=True)
class TransferPlan:
    """What every rank does, the same on every rank.

    ``bytes_moved`` are those that go over wires, over all ranks; ``bytes_minimum`` those that must, computed in
    another way. ``old_cover`` and ``new_cover`` name, by rank, parts that hold every logical element exactly once.
    """

    transfers: tuple[Transfer, ...]
    keys: tuple[str, ...]
    bytes_moved: int
    bytes_minimum: int
    old_cover: tuple[tuple[Holding, ...], ...]
    new_cover: tuple[tuple[Holding, ...], ...]


def plan_transfer(old: Holdings, new: Holdings) -> TransferPlan:
    """The plan that gives every rank what it holds in ``new`` from what all hold in ``old``.

    Args:
        old: by rank, what it holds now. Where boxes of a key overlap they are replicas.
        new: by rank, what it will hold.

    Raises:
        TransferError: a key is on one side only, or part of a new box is held by nobody.
    """
    old_by_key, new_by_key = _by_key(old), _by_key(new)
    if old_by_key.keys() != new_by_key.keys():
        one_sided = sorted(old_by_key.keys() ^ new_by_key.keys())
        raise TransferError(f"only one of the two jobs has {one_sided[0]} (and {len(one_sided) - 1} others)")
    keys = tuple(sorted(new_by_key))
    sent_bytes = [0] * len(old)
    transfers: list[Transfer] = []
    minimum = 0
    for key in keys:
        for target, wanted in new_by_key[key]:
            transfers += _cover(target, wanted, old_by_key[key], sent_bytes)
        minimum += _must_move(old_by_key[key], new_by_key[key])
    moved = sum(t.nbytes for t in transfers if t.on_wire)
    old_cover, new_cover = (_exact_cover(keys, side, len(old)) for side in (old_by_key, new_by_key))
    _check_same_elements(keys, old_cover, new_cover)
    return TransferPlan(tuple(transfers), keys, moved, minimum, old_cover, new_cover)


def rounds(transfers: Sequence[Transfer], limit_bytes: int) -> Iterator[list[Transfer]]:
    """Cut a plan's transfers into rounds in which no rank sends and receives more than ``limit_bytes`` over wires.

    A transfer larger than that is split, down to single elements. Order is kept: rounds are the same on every rank.
    """
    current: list[Transfer] = []
    used: defaultdict[int, int] = defaultdict(int)
    waiting = list(reversed(transfers))
    while waiting:
        transfer = waiting.pop()
        size = transfer.nbytes if transfer.on_wire else 0
        if size > limit_bytes and transfer.taken.box.volume > 1:
            waiting.extend(reversed(transfer.halves()))
            continue
        if current and max(used[transfer.source], used[transfer.target]) + size > limit_bytes:
            yield current
            current, used = [], defaultdict(int)
        current.append(transfer)
        used[transfer.source] += size
        used[transfer.target] += size
    if current:
        yield current


def _by_key(side: Holdings) -> dict[str, list[tuple[int, Holding]]]:
    found: defaultdict[str, list[tuple[int, Holding]]] = defaultdict(list)
    for rank, holdings in enumerate(side):
        for holding in holdings:
            found[holding.key].append((rank, holding))
    return dict(found)


def _cover(
    target: int, wanted: Holding, holders: list[tuple[int, Holding]], sent_bytes: list[int]
) -> Iterator[Transfer]:
    """Transfers that fill one new box; ``sent_bytes`` by rank is brought up to date."""

    def preference(holder: tuple[int, Holding]) -> tuple[bool, int, int]:
        rank = holder[0]
        return rank != target, sent_bytes[rank], (rank - target) % len(sent_bytes)

    missing = [wanted.box]
    for source, held in sorted(holders, key=preference):
        rest = []
        for box in missing:
            common = intersect(box, held.box)
            if common is None:
                rest.append(box)
                continue
            transfer = Transfer(source, target, held.part(common), wanted.part(common))
            sent_bytes[source] += transfer.nbytes * transfer.on_wire
            yield transfer
            rest += subtract(box, common)
        missing = rest
        if not missing:
            return
    raise TransferError(f"nobody holds {missing[0]} of {wanted.key}, which rank {target} needs")


def _must_move(old: list[tuple[int, Holding]], new: list[tuple[int, Holding]]) -> int:
    """Bytes of one key that ranks need and do not hold themselves: no plan can move less."""
    needs: defaultdict[int, list[Box]] = defaultdict(list)
    for rank, holding in new:
        needs[rank].append(holding.box)
    elements = sum(
        _absent(boxes, [holding.box for holder, holding in old if holder == rank]) for rank, boxes in needs.items()
    )
    return elements * new[0][1].item_bytes


def _absent(needed: list[Box], held: list[Box]) -> int:
    """Elements in ``needed`` and not in ``held``, counted on the grid that all their edges make."""
    if needed == held:
        return 0
    boxes = needed + held
    edges = [np.unique([(b.offset[i], b.end[i]) for b in boxes]) for i in range(len(needed[0].shape))]
    grid = np.zeros([len(e) - 1 for e in edges], dtype=bool)
    for box in needed:
        grid[_cells(box, edges)] = True
    for box in held:
        grid[_cells(box, edges)] = False
    sizes = [[int(b - a) for a, b in pairwise(e)] for e in edges]
    return sum(math.prod(s[i] for s, i in zip(sizes, cell, strict=True)) for cell in np.argwhere(grid).tolist())


def _cells(box: Box, edges: list[np.ndarray]) -> tuple[slice, ...]:
    return tuple(
        slice(*np.searchsorted(edge, (start, end))) for start, end, edge in zip(box.offset, box.end, edges, strict=True)
    )


def _exact_cover(
    keys: tuple[str, ...], by_key: dict[str, list[tuple[int, Holding]]], world_size: int
) -> tuple[tuple[Holding, ...], ...]:
    """By rank, parts of its holdings such that every element held by anybody is named exactly once."""
    parts: list[list[Holding]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for key in keys:
        taken: list[Box] = []
        for rank, holding in sorted(by_key[key], key=lambda held: (load[held[0]], held[0])):
            for box in subtract_all(holding.box, taken):
                parts[rank].append(holding.part(box))
                load[rank] += box.volume * holding.item_bytes
            taken.append(holding.box)
    return tuple(map(tuple, parts))


def _check_same_elements(
    keys: tuple[str, ...], old: tuple[tuple[Holding, ...], ...], new: tuple[tuple[Holding, ...], ...]
) -> None:
    sizes: list[dict[str, int]] = []
    for side in (old, new):
        size = dict.fromkeys(keys, 0)
        for part in (part for parts in side for part in parts):
            size[part.key] += part.box.volume * part.item_bytes
        sizes.append(size)
    for key in keys:
        if sizes[0][key] != sizes[1][key]:
            raise TransferError(f"{key} has {sizes[0][key]} bytes in the old job and {sizes[1][key]} in the new one")
