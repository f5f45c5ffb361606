"""Carry a transfer plan out: pack, send point to point, unpack, in rounds of bounded size."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from copus_ext.core.geometry import strides
from copus_ext.core.transfer import Holding, Transfer, rounds


class Piece(NamedTuple):
    """Flat range ``[first, first + n)`` of a local tensor of ``shape``, in each of ``tensors`` (1-D, n long)."""

    shape: tuple[int, ...]
    first: int
    tensors: tuple[torch.Tensor, ...]

    def views(self, start: tuple[int, ...], shape: tuple[int, ...]) -> list[torch.Tensor]:
        """The box of ``shape`` that starts at local index ``start``, in each of the tensors, without copying."""
        steps = strides(self.shape)
        first = sum(i * s for i, s in zip(start, steps, strict=True)) - self.first
        return [t.as_strided(shape, steps, t.storage_offset() + first) for t in self.tensors]


class _Message(NamedTuple):
    """What goes between this rank and ``peer`` in one round: views of one dtype, packed one behind the other."""

    peer: int
    buffer: torch.Tensor
    views: list[torch.Tensor]


def exchange(transfers: Sequence[Transfer], old: Sequence[Piece], new: Sequence[Piece], chunk_bytes: int) -> None:
    """Fill ``new`` from ``old`` and from the other ranks' pieces, as the plan says. Collective.

    Args:
        transfers: of all ranks, in the plan's order, the same on every rank.
        old: this rank's pieces before; not changed.
        new: this rank's pieces after.
        chunk_bytes: what a rank sends and receives at most in one round, and so the memory for packing.
    """
    rank = dist.get_rank()
    for batch in rounds(transfers, chunk_bytes):
        for transfer in batch:
            if transfer.source == transfer.target == rank:
                for target, source in zip(_views(new, transfer.given), _views(old, transfer.taken), strict=True):
                    target.copy_(source)
        outgoing = [t for t in batch if t.on_wire and t.source == rank]
        incoming = [t for t in batch if t.on_wire and t.target == rank]
        sends = list(_messages((t.target, v) for t in outgoing for v in _views(old, t.taken)))
        receives = list(_messages((t.source, v) for t in incoming for v in _views(new, t.given)))
        _run(sends, receives)


def _run(sends: list[_Message], receives: list[_Message]) -> None:
    for message in sends:
        for part, view in _parts(message):
            part.copy_(view)
    operations = [dist.P2POp(dist.isend, message.buffer, message.peer) for message in sends]
    operations += [dist.P2POp(dist.irecv, message.buffer, message.peer) for message in receives]
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    for message in receives:
        for part, view in _parts(message):
            view.copy_(part)


def _views(pieces: Sequence[Piece], holding: Holding) -> list[torch.Tensor]:
    return pieces[holding.piece].views(holding.start, holding.box.shape)


def _messages(views: Iterator[tuple[int, torch.Tensor]]) -> Iterator[_Message]:
    """One message per peer and dtype; both ends sort them alike, so the n-th sent is the n-th received."""
    grouped: defaultdict[tuple[int, str], list[torch.Tensor]] = defaultdict(list)
    for peer, view in views:
        grouped[peer, str(view.dtype)].append(view)
    for peer, dtype in sorted(grouped):
        parts = grouped[peer, dtype]
        buffer = torch.empty(sum(v.numel() for v in parts), dtype=parts[0].dtype, device=parts[0].device)
        yield _Message(peer, buffer, parts)


def _parts(message: _Message) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The buffer's part for each view, in its shape."""
    ends = itertools.accumulate(view.numel() for view in message.views)
    for end, view in zip(ends, message.views, strict=True):
        yield message.buffer[end - view.numel() : end].view(view.shape), view
