"""Checksums of logical tensors that do not depend on how they are cut.

The last axis of a tensor is read in words of 8 bytes (two fp32 numbers or four bf16 numbers; the last word of a row is
filled up with zeros). The checksum is the sum over all words of (word as an integer) x (weight of its position), modulo
2^64, and the weight of a position is the product of one random odd number per axis. A box that ends inside a word
counts its own part of the word with the rest as zeros, so that the sum of a box added to that of the rest is always
that of the whole.

What is noticed:

* Surely: any change inside one word, and so any single changed element and any single changed bit. An odd weight is
  invertible modulo 2^64.
* Very likely: anything else, such as exchanged, transposed, shifted or doubled pieces. With ``k`` the lowest bit that
  differs in any word, about one in 2^(57 - k) choices of weights misses it in a matrix, and one in 2^(47 - k) in a
  tensor of four axes. ``k`` is 0 for fp32 numbers of full precision and 16 for those that were once bf16.
* Not for sure: changes only in the highest bits of words, for which ``k`` is large: two bf16 numbers exchanged that
  are both the last of their words have a ``k`` of 48 or more. An even number of words that differ in their highest bit
  alone, the sign of their last number, is missed.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch

from copus_ext.adapters.exchange import Piece
from copus_ext.core.geometry import Box
from copus_ext.core.transfer import Holding

_SEED = 20260917
_WORD = 8  # bytes
_PACKED_WORDS = 1 << 16  # 512 KiB: what is packed is still in the cache when it is read
_PRODUCT_WORDS = 1 << 21  # 16 MiB: large enough that starting kernels costs little
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Checksums:
    """Checksums over the parts that this rank answers for; all ranks must use the same ``keys``.

    An object holds nothing of the tensors and may be used again for other tensors in the same coordinates.

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
        self._device = device
        ends = {part.box.end[::-1] for parts in covers for part in parts}
        extents = [max(along) for along in itertools.zip_longest((1,), *ends, fillvalue=1)]
        self._columns, *self._leading = (_odd_numbers(axis, n).to(device) for axis, n in enumerate(extents))
        self._one = torch.ones(1, dtype=torch.int64, device=device)

    def on(self, device: torch.device) -> Checksums:
        """The same for pieces that lie on another device."""
        other = copy.copy(self)
        other._device = device
        other._columns, *other._leading = (table.to(device) for table in (self._columns, *self._leading))
        other._one = self._one.to(device)
        return other

    def of(self, parts: Sequence[Holding], pieces: Sequence[Piece]) -> torch.Tensor:
        """This rank's share: int64 of shape [keys, together]; their sums over ranks are the checksums."""
        sums = torch.zeros(len(self._row), self._together, dtype=torch.int64, device=self._device)
        by_key = sums.unbind()
        for part in parts:
            views = pieces[part.piece].views(part.start, part.box.shape)
            first = part.box.offset[-1] if part.box.offset else 0
            by_row = torch.stack([self._row_sums(view, first) for view in views])
            by_box = _weighted_sums(by_row, self._row_weights(part.box))
            total = by_key[self._row[part.key]]
            (total if len(views) == self._together else total[: len(views)]).add_(by_box)
        return sums

    def _row_weights(self, box: Box) -> torch.Tensor:
        """Products of the weights along all axes but the last, in C order: [rows]."""
        if len(box.shape) < 2:
            return self._one
        inside_out = zip(box.offset[-2::-1], box.shape[-2::-1], self._leading, strict=False)
        return functools.reduce(_outer, [table[o : o + n] for o, n, table in inside_out])

    def _row_sums(self, view: torch.Tensor, first: int) -> torch.Tensor:
        """Weighted sums of the words of each row, for rows that begin at column ``first``: [rows]."""
        columns = view.shape[-1] if view.dim() else 1
        rows = view if view.dim() == 2 else view.reshape(-1, columns)
        per_word = _WORD // view.element_size()
        before = first % per_word
        weights = self._columns[first // per_word : -(-(first + columns) // per_word)]
        if before == columns % per_word == rows.stride(0) % per_word == 0 and _dense_words(rows):
            return _weighted_sums(rows.view(torch.int64), weights)
        return _packed_row_sums(rows, before, weights)


def _odd_numbers(axis: int, count: int) -> torch.Tensor:
    random = np.random.default_rng((_SEED, axis)).integers(-(2**62), 2**62, size=count)
    return torch.from_numpy(2 * random + 1)


def _outer(inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    return torch.outer(outer, inner).view(-1)


def _dense_words(rows: torch.Tensor) -> bool:
    """Rows lie one behind the other and begin where a word does, in the storage and in memory."""
    # Rows that lie apart would be right too, but multiplying waits for memory at each; copying does not.
    start = rows.storage_offset() * rows.element_size()
    return rows.is_contiguous() and (start | rows.data_ptr()) % _WORD == 0


def _packed_row_sums(rows: torch.Tensor, before: int, weights: torch.Tensor) -> torch.Tensor:
    """As for rows of whole words, for [rows, columns] that begin ``before`` elements into a word or lie apart."""
    step = min(max(1, _PACKED_WORDS // len(weights)), len(rows))
    packed = torch.zeros(step, len(weights), dtype=torch.int64, device=rows.device)
    bits = _BITS[rows.element_size()]
    inside = packed.view(bits)[:, before : before + rows.shape[1]]  # what is around it stays zero
    sums = []
    for chunk in rows.view(bits).split(step):
        inside[: len(chunk)].copy_(chunk)
        sums.append(_weighted_sums(packed[: len(chunk)], weights))
    return _joined(sums)


def _weighted_sums(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Along each row, modulo 2^64: int64 of shape [rows, n] and [n] to [rows]."""
    return torch.mv(rows, weights) if rows.is_cpu else _multiplied_sums(rows, weights)


def _multiplied_sums(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same where there is no product of integer matrices, in chunks that bound the memory for products."""
    step = max(1, _PRODUCT_WORDS // len(weights))
    return _joined([(chunk * weights).sum(1) for chunk in rows.split(step)])


def _joined(chunks: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]
