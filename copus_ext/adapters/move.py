"""Carrying a stream out: memory is filled as pieces arrive, given back as they are read, and a fault undoes it all."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator

import torch

from copus_ext.adapters.agreement import first_said
from copus_ext.adapters.arguments import first_line
from copus_ext.adapters.checksum import Checksums
from copus_ext.adapters.copying import same_bits
from copus_ext.adapters.exchange import Exchange, Scratch
from copus_ext.adapters.hollow import Storages
from copus_ext.adapters.job_memory import Side
from copus_ext.adapters.pages import Pages
from copus_ext.adapters.phases import Phases
from copus_ext.adapters.wire import ReadFailed, TorchWire, Wire
from copus_ext.adapters.world import whole_world
from copus_ext.core.reshard.streaming import SMALL_ROUND, Stream, stream
from copus_ext.core.reshard.transfer import plan_transfer

_NAMED = 3  # tensors that a message names at most


class MoveFailed(RuntimeError):
    """A rank had no memory for what should arrive, or no leave to read it, or bits differ. All is as it was."""


class Ledger:
    """Takes memory and lets it go, and knows the bytes that this rank holds of it, and the most that it ever held."""

    def __init__(self, held: int, pages: Pages) -> None:
        self.held = self.peak = held
        self.pages = pages

    def take(self, storages: Storages, numbers: Iterable[int] | None = None) -> None:
        """Memory for these (default: all), from the pages of what was let go."""
        self.add(storages.fill(numbers, self.pages))

    def let_go(self, storages: Storages, numbers: Iterable[int] | None = None) -> None:
        """The memory of these (default: all)."""
        self.add(-storages.empty(numbers, self.pages))

    def add(self, nbytes: int) -> None:
        """Taken (or, below 0, given back)."""
        self.held += nbytes
        self.peak = max(self.peak, self.held)


class Move:
    """One stream on this rank, from ``old`` to ``new``, both sides' gradients being gone already.

    ``staged``: what is held before goes to host memory first, for where the device has no room for a stream.
    """

    def __init__(
        self,
        plan: Stream,
        old: Side,
        new: Side,
        checksums: Checksums,
        wire: Wire,
        ledger: Ledger,
        phases: Phases,
        staged: bool,
    ) -> None:
        self._stream, self._old, self._new = plan, old, new
        self._checksums_before = checksums.on(torch.device("cpu")) if staged else checksums
        self._checksums_after = checksums
        self._wire, self._ledger, self._phases = wire, ledger, phases
        self._staged = staged
        self._device = old.memory.device
        self._rank = whole_world().rank()
        self._freed = [] if staged else old.freed_with(plan.released_by(self._rank))
        self._scratch, self._exchanges = Scratch(self._device), list[Exchange]()
        self._sums = checksums.none()
        self._failure: str | None = None  # since the ranks last agreed

    def run(self) -> None:
        """Move everything. Collective.

        Raises:
            MoveFailed: on all ranks alike, when it has been undone.
        """
        self._begin()
        count, messages = len(self._stream.rounds), TorchWire()
        for number in range(count):
            self._prepare(number)
            # On this round's memory, and that all have received the last round, with checksums that agree: only now
            # may what was sent be let go, and memory for packing be written to.
            # The first time by a message: over the wire nobody could be told that it has failed since the last move.
            self._go_on_or_undo(max(0, number - 1), self._wire if number else messages)
            if number:
                self._release(number)
            self._carry_out(self._exchanges[number])
        self._go_on_or_undo(max(0, count - 1), self._wire if count else messages)
        self._release(count)
        self._finish()
        self._go_on_or_undo(count, messages)  # behind which nobody reads the old job any more

    def _prepare(self, number: int) -> None:
        """Memory for a round."""
        with self._phases("move"), self._heard_of():
            exchange = self._exchanges[number]
            self._ledger.take(self._new.memory.kept, self._new.of(held.piece for held in exchange.given))
            exchange.prepare()

    def _finish(self) -> None:
        """Memory for what comes behind the last round, when nothing is left of the old job."""
        with self._phases("move"), self._heard_of():
            self._ledger.add(-self._scratch.release())
            self._ledger.take(self._new.memory.kept)
            self._ledger.take(self._new.memory.gradients)

    def _go_on_or_undo(self, ready: int, wire: Wire) -> None:
        """Agree over ``wire`` that all is well so far; ``ready`` rounds are known to be right, and their sources gone.

        Raises:
            MoveFailed: it is not, and has been undone.
        """
        if failure := self._agree(wire):
            self._undo(ready)
            raise MoveFailed(failure)

    @contextlib.contextmanager
    def _heard_of(self) -> Iterator[None]:
        """What fails in the block is told to the others when ranks agree, or they would wait for this one."""
        try:
            yield
        except Exception as error:  # whatever it is
            self._failure = self._failure or f"rank {self._rank}: {first_line(error)}"

    def _begin(self) -> None:
        """Let go what nothing reads, and take memory for packing, which others read: so once, for the largest round."""
        with self._phases("move"), self._heard_of():
            if self._staged:
                self._old.stage()
                self._ledger.let_go(self._old.memory.kept)
            else:
                self._release(0)
            pieces = self._old.pieces, self._new.pieces
            same = self._same if self._device.type == "cpu" else None
            self._exchanges = [Exchange(this.transfers, *pieces, same) for this in self._stream.rounds]
            packed = (exchange.packed_bytes(self._device) for exchange in self._exchanges)
            self._ledger.add(self._scratch.reserve(max(packed, default=0)))

    def _carry_out(self, exchange: Exchange) -> None:
        self._sums = self._checksums_after.none()
        with self._phases("verify"), self._heard_of():
            self._sums += self._checksums_before.of(exchange.unchecked_sources, self._old.pieces).to(self._device)
        with self._phases("move"):
            try:
                if damaged := exchange.run(self._wire, self._scratch):
                    self._failure = f"rank {self._rank}: copies differ: {', '.join(damaged[:_NAMED])}"
            except ReadFailed as error:  # of anything else this rank is behind the others, and can't tell them
                self._failure = f"rank {self._rank}: {error}"
        with self._phases("verify"), self._heard_of():
            self._sums -= self._checksums_after.of(exchange.unchecked_targets, self._new.pieces)

    def _same(self, copy: torch.Tensor, source: torch.Tensor) -> bool:
        start = time.perf_counter()
        same = same_bits(copy, source)
        self._phases.add("verify", time.perf_counter() - start)
        return same

    def _agree(self, wire: Wire) -> str | None:
        """What went wrong on any rank since the last time; ``None`` where all is well."""
        with self._phases("move"):  # waiting for the slowest rank is part of moving
            failed = torch.tensor([self._failure is not None], device=self._device)
            try:
                votes = wire.added_up(torch.cat([self._sums.flatten(), failed]))
            except ReadFailed:
                if not self._failure:
                    raise
                return first_said(self._failure)  # which all others come to, who could hear of it
            if not votes.any():
                return None
            return first_said(self._failure if votes[-1] else self._differing(votes[:-1].view(self._sums.shape)))

    def _differing(self, sums: torch.Tensor) -> str:
        rows = sums.flatten(1).any(dim=1).tolist()
        return f"checksums differ: {', '.join(list(itertools.compress(self._stream.plan.keys, rows))[:_NAMED])}"

    def _release(self, number: int) -> None:
        """Let go what nothing reads after round ``number``, counted from 1; with 0, what nothing reads at all."""
        if not self._staged:
            self._ledger.let_go(self._old.memory.kept, self._freed[number])

    def _undo(self, ready: int) -> None:
        """Bring back what was released, from wherever it is by now; a stream too, for memory may have run out."""
        self._ledger.pages.free()
        self._ledger.add(-self._scratch.release())
        if self._staged:
            self._new.memory.empty()
            self._old.unstage()
            return
        lost, held = self._stream.lost_after(ready), self._stream.held_after(ready)
        limit, weights_first = min(self._stream.limit_bytes, SMALL_ROUND), self._stream.weights_first  # memory is short
        back = stream(plan_transfer(held, lost, partial=True), held, lost, limit, weights_first=weights_first)
        first = self._stream.first_new(self._rank)
        there, kept = self._new.memory, self._new.memory.kept
        there.gradients.empty()
        kept.empty(kept.numbers - set(self._new.of(_from(first, (h.piece for h in held[self._rank])))))
        unread, *freed = self._new.freed_with(_from(first, pieces) for pieces in back.released_by(self._rank))
        kept.empty(unread)
        sources = [*self._old.pieces[:first], *self._new.pieces]
        for this, then_free in zip(back.rounds, freed, strict=True):
            exchange = Exchange(this.transfers, sources, self._old.pieces)
            self._old.memory.kept.fill(self._old.of(h.piece for h in exchange.given))
            exchange.prepare()
            self._scratch.reserve(exchange.packed_bytes(self._device))
            exchange.run(TorchWire(), self._scratch)  # which can't be forbidden
            kept.empty(then_free)
        there.empty()


def _from(first: int, pieces: Iterable[int]) -> list[int]:
    """Numbers of new pieces among those of both sides, where new ones begin at ``first``."""
    return [piece - first for piece in pieces if piece >= first]
