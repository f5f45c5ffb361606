"""Checksums of logical tensors that do not depend on how they are cut.

The last axis of a tensor is read in words of 8 bytes (two fp32 numbers or four bf16 numbers; the last word of a row is
filled up with zeros). The checksum is the sum over all words of (word as an integer) x (weight of its position), modulo
2^64, and the weight of a position is the product of one random odd number per axis. In a matrix of 256 rows or more,
each 16 of them share one, so that they can be added up first, at the speed of memory. A box that ends inside a word
counts its own part of the word with the rest as zeros, so that the sum of a box added to that of the rest is always
that of the whole.

What is noticed:

* Surely: any change inside one word, and so any single changed element and any single changed bit. An odd weight is
  invertible modulo 2^64.
* Very likely: anything else, such as exchanged, transposed, shifted or doubled pieces. With ``k`` the lowest bit that
  differs in any word, about one in 2^(57 - k) choices of weights misses it in a matrix, and one in 2^(47 - k) in a
  tensor of four axes. ``k`` is 0 for fp32 numbers of full precision and 16 for those that were once bf16.
* Not: elements of the same column exchanged among 16 rows that share a number.
* Not for sure: changes only in the highest bits of words, for which ``k`` is large: two bf16 numbers exchanged that
  are both the last of their words have a ``k`` of 48 or more. An even number of words that differ in their highest bit
  alone, the sign of their last number, is missed.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from copus_ext.adapters.exchange import Piece
from copus_ext.core.reshard.geometry import Box
from copus_ext.core.reshard.transfer import Holding

_SEED = 20260917
_WORD = 8  # bytes
_GROUP = 16  # rows
_GROUPED_FROM = 256  # rows
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
        matrices = [part for parts in covers for part in parts if len(part.box.shape) == 2]
        self._grouped = {part.key for part in matrices if part.box.end[0] >= _GROUPED_FROM}
        rows = max((part.box.end[0] for part in matrices), default=1)
        self._rows = _odd_numbers(len(extents), -(-rows // _GROUP)).repeat_interleave(_GROUP).to(device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._known: dict[tuple[Box, bool, int], _Weights] = {}  # slices of these; boxes come again and again

    def on(self, device: torch.device) -> Checksums:
        """The same for pieces that lie on another device."""
        other = copy.copy(self)
        other._device = device
        other._columns, *other._leading = (table.to(device) for table in (self._columns, *self._leading))
        other._known = {}
        other._rows, other._one = self._rows.to(device), self._one.to(device)
        return other

    def none(self) -> torch.Tensor:
        """What no part adds up to: zeros of shape [keys, together]."""
        return torch.zeros(len(self._row), self._together, dtype=torch.int64, device=self._device)

    def of(self, parts: Iterable[Holding], pieces: Sequence[Piece]) -> torch.Tensor:
        """This rank's share: int64 of shape [keys, together]; their sums over ranks are the checksums.

        What is in ``parts`` more than once counts as often, and is read once.
        """
        cells: list[int] = []
        found: list[torch.Tensor] = []
        for part, times in Counter(parts).items():
            first = self._row[part.key] * self._together
            for column, view in enumerate(pieces[part.piece].views(part.start, part.box.shape)):
                weights = self._weights(part.box, part.key in self._grouped, view.element_size())
                cells += [first + column] * times
                found += [_sum(view, weights)] * times
        sums = self.none()
        if found:
            sums.view(-1).index_add_(0, torch.tensor(cells, device=self._device), torch.stack(found))
        return sums

    def _weights(self, box: Box, grouped: bool, size: int) -> _Weights:
        """For the words of a box whose elements have ``size`` bytes."""
        if (box, grouped, size) not in self._known:
            first, columns = (box.offset[-1], box.shape[-1]) if box.shape else (0, 1)
            per_word = _WORD // size
            before, behind = first % per_word, (first + columns) % per_word
            of_columns = self._columns[first // per_word : -(-(first + columns) // per_word)]
            by_row = self._row_weights(box, grouped)
            head = min(-box.offset[0] % _GROUP, box.shape[0]) if grouped else 0
            by_group = torch.cat([by_row[: min(head, 1)], by_row[head::_GROUP]]) if grouped else None
            self._known[box, grouped, size] = _Weights(
                of_columns, by_row, before, bool(before or behind), by_group, head
            )
        return self._known[box, grouped, size]

    def _row_weights(self, box: Box, grouped: bool) -> torch.Tensor:
        """Products of the weights along all axes but the last, in C order: [rows]."""
        if len(box.shape) < 2:
            return self._one
        if grouped:
            return self._rows[box.offset[0] : box.offset[0] + box.shape[0]]
        inside_out = zip(box.offset[-2::-1], box.shape[-2::-1], self._leading, strict=False)
        return functools.reduce(_outer, [table[o : o + n] for o, n, table in inside_out])


class _Weights(NamedTuple):
    """Of a box: by word [n], and by row [rows]. Its rows begin ``before`` elements into a word.

    ``ragged``: they begin or end inside of a word. ``by_group``: where rows share weights, those of each group; the
    first ``head`` rows are the end of one.
    """

    by_word: torch.Tensor
    by_row: torch.Tensor
    before: int
    ragged: bool
    by_group: torch.Tensor | None
    head: int


def _sum(view: torch.Tensor, weights: _Weights) -> torch.Tensor:
    """Weighted sum of the words of a box: a scalar. With as few calls as can be, for most tensors are small."""
    rows = view if view.dim() == 2 else view.reshape(-1, view.shape[-1] if view.dim() else 1)
    if weights.ragged or not _in_words(rows):
        return _product(_packed_row_sums(rows, weights.before, weights.by_word), weights.by_row)
    if rows.shape[0] == 1:
        return _product(rows[0].view(torch.int64), weights.by_word) * weights.by_row[0]
    words = rows.view(torch.int64)
    if weights.by_group is None:
        return _product(_weighted_sums(words, weights.by_word), weights.by_row)
    return _product(_weighted_sums(_grouped(words, weights.head), weights.by_word), weights.by_group)


def _odd_numbers(axis: int, count: int) -> torch.Tensor:
    random = np.random.default_rng((_SEED, axis)).integers(-(2**62), 2**62, size=count)
    return torch.from_numpy(2 * random + 1)


def _outer(inner: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    return torch.outer(outer, inner).view(-1)


def _in_words(rows: torch.Tensor) -> bool:
    """Every row begins where a word does, in the storage and in memory, and has its elements side by side."""
    (count, length), (row, one), size = rows.shape, rows.stride(), rows.element_size()
    if length > 1 and one != 1:
        return False
    starts = rows.storage_offset() * size | rows.data_ptr() | (row * size if count > 1 else 0)
    return starts % _WORD == 0


def _grouped(words: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of equal weight added up: [rows, n] to [groups, n]; a group ends behind ``head`` rows."""
    whole, tail = divmod(len(words) - head, _GROUP)
    end = len(words) - tail
    row, one = words.stride()
    inner = words[head:end] if head or tail else words
    groups = inner.as_strided((whole, _GROUP, words.shape[1]), (_GROUP * row, row, one))
    sums = [words[:head].sum(0, keepdim=True)] if head else []
    sums += [groups.sum(1)] if whole else []
    sums += [words[end:].sum(0, keepdim=True)] if tail else []
    return _joined(sums)


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


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Of two vectors, modulo 2^64: a scalar."""
    return torch.dot(left, right) if left.is_cpu else (left * right).sum()


def _multiplied_sums(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same where there is no product of integer matrices, in chunks that bound the memory for products."""
    step = max(1, _PRODUCT_WORDS // len(weights))
    return _joined([(chunk * weights).sum(1) for chunk in rows.split(step)])


def _joined(chunks: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(chunks) if len(chunks) > 1 else chunks[0]
