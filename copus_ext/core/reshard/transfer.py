"""Who sends what to whom when a job's tensors go from one layout to another, on the same ranks, fewer or more.

What a rank holds is a list of :class:`Holding`: boxes of logical tensors, with where they lie on the rank. Replicas (of
data parallelism, of tied embeddings) are simply more holders. From the holdings of all ranks before and after, every
rank computes the same plan: each new box is covered exactly once, by the rank's own data where it has it, else by a
holder on its node, and among those by the one that has least to send.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from copus_ext.core.reshard.geometry import Box, intersect, shift, subtract

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

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.box.volume * self.item_bytes

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
        return self.taken.nbytes

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
    another way.
    """

    transfers: tuple[Transfer, ...]
    keys: tuple[str, ...]
    bytes_moved: int
    bytes_minimum: int


def plan_transfer(old: Holdings, new: Holdings, *, ranks_per_node: int = 1, partial: bool = False) -> TransferPlan:
    """The plan that gives every rank what it holds in ``new`` from what all hold in ``old``.

    Args:
        old: by rank, what it holds now. Where boxes of a key overlap they are replicas.
        new: by rank, what it will hold; as many ranks as in ``old``, of which some may hold nothing on a side.
        ranks_per_node: ranks ``[n k, (n + 1) k)`` share node ``n``.
        partial: ``new`` need not hold all of what ``old`` holds.

    Raises:
        TransferError: a key is on one side only, part of a new box is held by nobody, or part of an old one is lost.
    """
    old_by_key, new_by_key = _by_key(old), _by_key(new)
    one_sided = sorted(new_by_key.keys() - old_by_key.keys() if partial else old_by_key.keys() ^ new_by_key.keys())
    if one_sided:
        raise TransferError(f"only one of the two jobs has {one_sided[0]} (and {len(one_sided) - 1} others)")
    keys = tuple(sorted(new_by_key))
    sources = _Sources(len(old), ranks_per_node)
    transfers: list[Transfer] = []
    minimum = 0
    for key in keys:
        holders = _Holders(old_by_key[key], sources)
        for target, wanted in new_by_key[key]:
            transfers += holders.cover(target, wanted)
        minimum += _must_move(old_by_key[key], new_by_key[key])
        if not partial:
            _check_same_elements(key, old_by_key[key], new_by_key[key])
    moved = sum(t.nbytes for t in transfers if t.on_wire)
    return TransferPlan(tuple(transfers), keys, moved, minimum)


def _by_key(side: Holdings) -> dict[str, list[tuple[int, Holding]]]:
    found: defaultdict[str, list[tuple[int, Holding]]] = defaultdict(list)
    for rank, holdings in enumerate(side):
        for holding in holdings:
            found[holding.key].append((rank, holding))
    return dict(found)


class _Sources:
    """Chooses among ranks that hold the same, and remembers what each has to send."""

    def __init__(self, ranks: int, ranks_per_node: int) -> None:
        self._sent_bytes = [0] * ranks
        self.node = [rank // ranks_per_node for rank in range(ranks)]

    def choose(self, ranks: Iterable[int], target: int) -> int:
        """One on the node of ``target`` if there is one; of those, the one that has least to send."""

        def preference(rank: int) -> tuple[bool, int, int]:
            far = self.node[rank] != self.node[target]
            return far, self._sent_bytes[rank], (rank - target) % len(self.node)

        return min(ranks, key=preference)

    def sends(self, rank: int, nbytes: int) -> None:
        """``rank`` sends that much more."""
        self._sent_bytes[rank] += nbytes


class _Holders:
    """Who holds which boxes of one logical tensor."""

    def __init__(self, holders: list[tuple[int, Holding]], sources: _Sources) -> None:
        self._sources = sources
        self._by_box: dict[Box, dict[int, Holding]] = {}
        self._nodes: defaultdict[Box, set[int]] = defaultdict(set)
        self._own: defaultdict[int, list[Box]] = defaultdict(list)
        for rank, held in holders:
            self._by_box.setdefault(held.box, {})[rank] = held
            self._nodes[held.box].add(sources.node[rank])
            self._own[rank].append(held.box)
        self._known: dict[tuple[Box, tuple[Box, ...], int], list[tuple[Box, Box]]] = {}

    def cover(self, target: int, wanted: Holding) -> Iterator[Transfer]:
        """Transfers that fill one new box."""
        own = self._own.get(target, [])
        for common, box in self._cuts(target, wanted, tuple(own)):
            ranks = self._by_box[box]
            source = target if target in ranks else self._sources.choose(ranks, target)
            transfer = Transfer(source, target, ranks[source].part(common), wanted.part(common))
            self._sources.sends(source, transfer.nbytes * transfer.on_wire)
            yield transfer

    def _cuts(self, target: int, wanted: Holding, own: tuple[Box, ...]) -> list[tuple[Box, Box]]:
        """Parts of a wanted box, each with the held box that it is in; replicas want and hold the same."""
        node = self._sources.node[target]
        case = wanted.box, own, node
        if case not in self._known:
            near = [box for box, nodes in self._nodes.items() if node in nodes]
            missing, cuts = [wanted.box], list[tuple[Box, Box]]()
            for held in dict.fromkeys((*own, *near, *self._by_box)):
                parts = [common for box in missing if (common := intersect(box, held))]
                if parts:
                    cuts += [(part, held) for part in parts]
                    missing = [rest for box in missing for rest in subtract(box, held)]
                if not missing:
                    break
            if missing:
                raise TransferError(f"nobody holds {missing[0]} of {wanted.key}, which rank {target} needs")
            self._known[case] = cuts
        return self._known[case]


def _must_move(old: list[tuple[int, Holding]], new: list[tuple[int, Holding]]) -> int:
    """Bytes of one key that ranks need and do not hold themselves: no plan can move less."""
    needs, holds = _boxes_by_rank(new), _boxes_by_rank(old)
    known: dict[tuple[frozenset[Box], frozenset[Box]], int] = {}  # replicas need and hold the same
    elements = 0
    for rank, boxes in needs.items():
        case = frozenset(boxes), frozenset(holds.get(rank, ()))
        if case not in known:
            known[case] = _absent(list(case[0]), list(case[1]))
        elements += known[case]
    return elements * new[0][1].item_bytes


def _boxes_by_rank(holders: list[tuple[int, Holding]]) -> dict[int, list[Box]]:
    boxes: defaultdict[int, list[Box]] = defaultdict(list)
    for rank, holding in holders:
        boxes[rank].append(holding.box)
    return boxes


def _absent(needed: list[Box], held: list[Box]) -> int:
    """Elements in ``needed`` and not in ``held``, counted on the grid that all their edges make."""
    if set(needed) <= set(held):
        return 0
    boxes = needed + held
    edges = [sorted({edge for b in boxes for edge in (b.offset[i], b.end[i])}) for i in range(len(needed[0].shape))]
    grid = np.zeros([len(e) - 1 for e in edges], dtype=bool)
    for box in needed:
        grid[_cells(box, edges)] = True
    for box in held:
        grid[_cells(box, edges)] = False
    sizes = [[b - a for a, b in pairwise(e)] for e in edges]
    return sum(math.prod(s[i] for s, i in zip(sizes, cell, strict=True)) for cell in np.argwhere(grid).tolist())


def _cells(box: Box, edges: list[list[int]]) -> tuple[slice, ...]:
    return tuple(
        slice(edge.index(start), edge.index(end)) for start, end, edge in zip(box.offset, box.end, edges, strict=True)
    )


def _check_same_elements(key: str, old: list[tuple[int, Holding]], new: list[tuple[int, Holding]]) -> None:
    """Every new box is covered by now, so that all is there if it is as much."""
    sizes = [_absent(list({held.box for _, held in side}), []) * side[0][1].item_bytes for side in (old, new)]
    if sizes[0] != sizes[1]:
        raise TransferError(f"{key} has {sizes[0]} bytes in the old job and {sizes[1]} in the new one")
