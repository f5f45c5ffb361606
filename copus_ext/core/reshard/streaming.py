"""In what order a transfer plan is carried out, and what can be let go on the way, so that no rank holds two copies.

Transfers go in rounds of bounded size. What a rank held before is released as soon as nobody reads it any more. Which
tensors come first decides how much a rank holds in between: the order is the greedy one, that takes next the tensor
that leaves the fullest rank least full. Where a rank's weights lie in one buffer, all weights go before all moments:
the buffer is taken with the first of them and let go with the last, and no moments should arrive in between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from copus_ext.core.reshard.transfer import Holding, Holdings, Transfer, TransferPlan

Array = NDArray[np.float64]
SMALL_ROUND = 64 * 2**20  # bytes; of rounds that need not be sure of their room
_LEAST_LIMIT, _LARGEST_LIMIT = 2**20, 2**30


@dataclass(frozen=True)
class Round:
    """What goes together. ``released`` are, by rank, the old pieces that nothing reads after this round."""

    transfers: tuple[Transfer, ...]
    released: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Stream:
    """A transfer plan in rounds, the same on every rank. ``unread``: by rank, old pieces that nobody reads at all."""

    plan: TransferPlan
    old: Holdings
    new: Holdings
    unread: tuple[tuple[int, ...], ...]
    rounds: tuple[Round, ...]
    limit_bytes: int
    weights_first: bool

    def lost_after(self, count: int) -> list[list[Holding]]:
        """By rank, what it held before and has released by the end of the first ``count`` rounds."""
        gone = [set(pieces) for pieces in self.unread]
        for done in self.rounds[:count]:
            for rank, pieces in enumerate(done.released):
                gone[rank].update(pieces)
        return [[held for held in side if held.piece in gone[r]] for r, side in enumerate(self.old)]

    def held_after(self, count: int) -> list[list[Holding]]:
        """By rank, what it holds then: old pieces, and new ones, whose numbers follow those of all old ones."""
        gone = [{held.piece for held in side} for side in self.lost_after(count)]
        held = [[h for h in side if h.piece not in gone[rank]] for rank, side in enumerate(self.old)]
        first = [self.first_new(rank) for rank in range(len(self.old))]
        for done in self.rounds[:count]:
            for t in done.transfers:
                held[t.target].append(t.given._replace(piece=t.given.piece + first[t.target]))
        return held

    def first_new(self, rank: int) -> int:
        """Where the numbers of new pieces begin on ``rank``, behind those of all old ones."""
        return 1 + max((held.piece for held in self.old[rank]), default=-1)

    def released_by(self, rank: int) -> list[tuple[int, ...]]:
        """The old pieces of ``rank`` that nobody reads at all, then those that nothing reads after each round."""
        return [self.unread[rank], *(done.released[rank] for done in self.rounds)]


def stream(
    plan: TransferPlan, old: Holdings, new: Holdings, limit_bytes: int, *, weights_first: bool = False
) -> Stream:
    """Put a plan's transfers in order and cut them into rounds.

    Args:
        plan: made from ``old`` and ``new``.
        old: by rank, what it holds now.
        new: by rank, what it will hold.
        limit_bytes: what a rank handles at most in one round; see :func:`default_limit`.
        weights_first: all weights, then all else. Otherwise what belongs to one parameter goes together, since what
            the optimizer keeps of it is let go at once.
    """
    place = {name: number for number, name in enumerate(_order(old, new))}

    def turn(transfer: Transfer) -> tuple[bool, int]:
        kind, _, name = transfer.given.key.partition(":")
        return weights_first and kind != "weight", place[name]

    ordered = sorted(plan.transfers, key=turn)
    batches = list(rounds(ordered, limit_bytes))
    last_read: list[dict[int, int]] = [{} for _ in old]
    for number, batch in enumerate(batches):
        for transfer in batch:
            last_read[transfer.source][transfer.taken.piece] = number
    unread = tuple(tuple(sorted({h.piece for h in side} - last_read[rank].keys())) for rank, side in enumerate(old))
    ends: list[list[list[int]]] = [[[] for _ in old] for _ in batches]
    for rank, reads in enumerate(last_read):
        for piece, number in reads.items():
            ends[number][rank].append(piece)
    done = (Round(tuple(b), tuple(map(tuple, e))) for b, e in zip(batches, ends, strict=True))
    return Stream(plan, old, new, unread, tuple(done), limit_bytes, weights_first)


def rounds(transfers: Iterable[Transfer], limit_bytes: int) -> Iterator[list[Transfer]]:
    """Cut transfers into rounds in which no rank handles more than ``limit_bytes``, and as many as can do something.

    A transfer larger than that is split, down to single elements. Every rank's transfers stay in order, and so what it
    holds in between; it is overtaken by ranks that have nothing to do with it.
    """
    waiting = [part for transfer in transfers for part in _parts(transfer, limit_bytes)]
    while waiting:
        ranks = {rank for transfer in waiting for rank in (transfer.source, transfer.target)}
        current: list[Transfer] = []
        later: list[Transfer] = []
        used: defaultdict[int, int] = defaultdict(int)
        full: set[int] = set()
        for number, transfer in enumerate(waiting):
            ends = {transfer.source, transfer.target}
            if ends & full or any(used[rank] and used[rank] + transfer.nbytes > limit_bytes for rank in ends):
                full |= ends  # for both, or what comes later would be there before this
                if full >= ranks:
                    later += waiting[number:]
                    break
                later.append(transfer)
                continue
            current.append(transfer)
            for rank in ends:
                used[rank] += transfer.nbytes
        yield current
        waiting = later


def _parts(transfer: Transfer, limit_bytes: int) -> Iterator[Transfer]:
    if transfer.nbytes <= limit_bytes or transfer.taken.box.volume == 1:
        yield transfer
        return
    for half in transfer.halves():
        yield from _parts(half, limit_bytes)


def default_limit(old: Holdings, new: Holdings, room_bytes: int) -> int:
    """So small that a round, and the memory to pack it, fits where gradients were; so large that rounds are few.

    Ranks agree in every round, which takes as long as hundreds of MiB take on the links within a node. Where large
    models leave room for that much (sharded over data parallelism, a rank's moments are far smaller than its
    gradients), a round takes a 4th of the room.

    Args:
        old: by rank, what it holds now.
        new: by rank, what it will hold.
        room_bytes: what the larger of the two jobs takes on every rank at least, beyond what is moved.
    """
    held = (max(sum(h.nbytes for h in side[rank]) for side in (old, new)) for rank in range(len(old)))
    least = min(filter(None, held), default=0)
    return max(_LEAST_LIMIT, min(least // 4, SMALL_ROUND), min(room_bytes // 4, _LARGEST_LIMIT))


def _tensor(key: str) -> str:
    """A parameter's weight and its moments are of one tensor."""
    return key.partition(":")[2]


def _order(old: Holdings, new: Holdings) -> list[str]:
    """Names of tensors, such that the rank that has come furthest above what it holds in the end stays lowest."""
    names = sorted({_tensor(held.key) for side in (*old, *new) for held in side})
    row = {name: number for number, name in enumerate(names)}
    gains, losses = (_bytes_of(side, row) for side in (new, old))
    level = losses.sum(0) - np.maximum(losses.sum(0), gains.sum(0))  # 0 is where a rank was, or will be
    left, ordered = np.arange(len(names)), []
    while len(left):
        during = np.maximum(0.0, (level + gains[left]).max(1))
        after = (level + gains[left] - losses[left]).max(1)
        place = np.lexsort((left, after, during))[0]
        pick = left[place]
        level = level + gains[pick] - losses[pick]
        ordered.append(names[pick])
        left = np.delete(left, place)
    return ordered


def _bytes_of(side: Holdings, row: dict[str, int]) -> Array:
    """[tensors, ranks], in bytes."""
    table = np.zeros((len(row), len(side)))
    for rank, holdings in enumerate(side):
        for held in holdings:
            table[row[_tensor(held.key)], rank] += held.nbytes
    return table
