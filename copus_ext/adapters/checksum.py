"""Checksums of logical tensors that do not depend on how they are cut.

The checksum of a tensor is the sum over its elements of (bits as an integer) x (weight of the position), modulo 2^64,
so that of a box added to that of the rest is that of the whole. The weight of a position is the product of one random
odd number per axis. Any single changed element changes the sum, for an odd weight is invertible modulo 2^64; exchanged
or transposed pieces change it because their weights differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from copus_ext.adapters.exchange import Piece
from copus_ext.core.transfer import Holding

_SEED = 20260917
_SCRATCH_ELEMENTS = 1 << 20  # 8 MiB: stays in cache, where a cast of the whole tensor would not
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Checksums:
    """Checksums over the parts that this rank answers for; all ranks must use the same ``keys``.

    Args:
        keys: the logical tensors, in an order that all ranks share.
        covers: every rank's parts, which give the extent of the coordinates.
        together: the most tensors that travel together.
        device: where the pieces lie.
    """

    def __init__(
        self, keys: Sequence[str], covers: Sequence[Sequence[Holding]], together: int, device: torch.device
    ) -> None:
        self._row = {key: row for row, key in enumerate(keys)}
        self._together = together
        boxes = [part.box for parts in covers for part in parts]
        extent = max((n for box in boxes for n in box.end), default=1)
        axes = max((len(box.shape) for box in boxes), default=1)
        random = np.random.default_rng(_SEED).integers(-(2**62), 2**62, size=(max(axes, 1), extent))
        self._weights = torch.from_numpy(2 * random + 1).to(device)
        self._scratch = torch.empty(_SCRATCH_ELEMENTS, dtype=torch.int64, device=device)

    def of(self, parts: Sequence[Holding], pieces: Sequence[Piece]) -> torch.Tensor:
        """This rank's share: int64 of shape [keys, together]; their sums over ranks are the checksums."""
        sums = torch.zeros(len(self._row), self._together, dtype=torch.int64, device=self._weights.device)
        for part in parts:
            for column, view in enumerate(pieces[part.piece].views(part.start, part.box.shape)):
                sums[self._row[part.key], column] += self._box_sum(view, part.box.offset)
        return sums

    def _box_sum(self, view: torch.Tensor, offset: tuple[int, ...]) -> torch.Tensor:
        bits = view.view(_BITS[view.element_size()])
        if not offset:
            return bits.to(torch.int64)
        along = [self._weights[axis, o : o + n] for axis, (o, n) in enumerate(zip(offset, view.shape, strict=True))]
        *leading, last = along
        rows = torch.ones(1, dtype=torch.int64, device=view.device)
        for weights in leading:
            rows = (rows[:, None] * weights).reshape(-1)
        bits = bits.reshape(-1, last.numel())
        step = max(1, _SCRATCH_ELEMENTS // last.numel())
        total = torch.zeros((), dtype=torch.int64, device=view.device)
        for first in range(0, bits.shape[0], step):
            chunk = bits[first : first + step]
            total += (self._weighted(chunk, last).sum(1) * rows[first : first + step]).sum()
        return total

    def _weighted(self, bits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if bits.numel() > _SCRATCH_ELEMENTS:  # one row longer than the scratch space
            return bits * weights
        return torch.mul(bits, weights, out=self._scratch[: bits.numel()].view(bits.shape))


def agree(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Add both up over all ranks, in one all-reduce; the rows (logical tensors) in which they differ."""
    both = torch.stack([before, after])
    dist.all_reduce(both)
    differs = (both[0] != both[1]).any(dim=1)
    return list(itertools.compress(range(len(differs)), differs.tolist()))
