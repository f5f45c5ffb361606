"""Checksums do not see how a tensor is cut, and see every change."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from copus_ext.adapters import checksum as module
from copus_ext.adapters.checksum import Checksums
from copus_ext.adapters.exchange import Piece
from copus_ext.core.reshard.geometry import Box, flat_range_boxes
from copus_ext.core.reshard.transfer import Holding

CPU = torch.device("cpu")
SHAPE = (6, 8, 5)
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def whole(tensor: torch.Tensor) -> Holding:
    start = (0,) * tensor.dim()
    return Holding("w", Box(start, tuple(tensor.shape)), 0, start, tensor.element_size())


def checksum(tensor: torch.Tensor, parts: list[Holding]) -> list[list[int]]:
    pieces = [Piece(tuple(tensor.shape), 0, (tensor.reshape(-1),))]
    return Checksums(("w",), [parts], 1, CPU).of(parts, pieces).tolist()


def whole_checksum(tensor: torch.Tensor) -> list[list[int]]:
    return checksum(tensor, [whole(tensor)])


def some_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)


def random_boxes(rng: random.Random, box: Box, depth: int) -> list[Box]:
    """Boxes that make up ``box``: cut across a random axis, again and again."""
    axes = [axis for axis, n in enumerate(box.shape) if n > 1]
    if not depth or not axes:
        return [box]
    axis = rng.choice(axes)
    low = rng.randrange(1, box.shape[axis])
    halves = []
    for first, count in ((0, low), (low, box.shape[axis] - low)):
        offset, shape = list(box.offset), list(box.shape)
        offset[axis], shape[axis] = offset[axis] + first, count
        halves += random_boxes(rng, Box(tuple(offset), tuple(shape)), depth - 1)
    return halves


def moved(rng: random.Random, tensor: torch.Tensor, box: Box) -> tuple[Piece, tuple[int, ...]]:
    """A copy of ``box`` of the tensor inside a larger local tensor that begins anywhere, and where it lies in it."""
    start = tuple(rng.randrange(3) for _ in box.shape)
    shape = tuple(s + n + rng.randrange(3) for s, n in zip(start, box.shape, strict=True))
    local = torch.ones(shape, dtype=tensor.dtype)
    inside = tuple(slice(s, s + n) for s, n in zip(start, box.shape, strict=True))
    local[inside] = tensor[tuple(slice(o, e) for o, e in zip(box.offset, box.end, strict=True))]
    before = rng.randrange(9)
    memory = torch.cat([local.new_ones(before), local.reshape(-1)])
    return Piece(shape, 0, (memory[before:],)), start


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (23,), (4, 16), (7, 9), (1, 31), (5, 1), SHAPE, (3, 2, 5, 4)], ids=str)
def test_any_cut_gives_the_same_checksum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rng = random.Random(0)
    tensor = some_tensor(shape, dtype)
    checksums = Checksums(("w",), [[whole(tensor)]], 1, CPU)
    expected = checksums.of([whole(tensor)], [Piece(shape, 0, (tensor.reshape(-1),))])
    for depth in (0, 0, 1, 2, 3, 5):
        parts: list[Holding] = []
        pieces: list[Piece] = []
        for box in random_boxes(rng, whole(tensor).box, depth):
            piece, start = moved(rng, tensor, box)
            parts.append(Holding("w", box, len(pieces), start, 1))
            pieces.append(piece)
        assert torch.equal(checksums.of(parts, pieces), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (12, 16)], ids=str)
def test_any_flat_ranges_give_the_same_checksum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rng = random.Random(0)
    tensor = some_tensor(shape, dtype)
    for _ in range(10):
        cuts = [0, *sorted(rng.sample(range(1, tensor.numel()), 3)), tensor.numel()]
        parts: list[Holding] = []
        pieces: list[Piece] = []
        for a, b in pairwise(cuts):
            boxes = flat_range_boxes(shape, a, b)
            parts += [whole(tensor).part(box)._replace(piece=len(pieces)) for box in boxes]
            pieces.append(Piece(shape, a, (tensor.reshape(-1)[a:b].clone(),)))
        assert Checksums(("w",), [parts], 1, CPU).of(parts, pieces).tolist() == whole_checksum(tensor)


def test_shares_of_ranks_add_up() -> None:
    tensor = some_tensor((4, 4), torch.float32)
    low, high = (Holding("w", Box((row, 0), (2, 4)), 0, (row, 0), 4) for row in (0, 2))
    pieces = [Piece((4, 4), 0, (tensor.view(-1),))]
    covers = [[low], [high]]
    checksums = Checksums(("w",), covers, 1, CPU)
    on_low, on_high = (checksums.of(parts, pieces) for parts in covers)
    assert torch.equal(on_low + on_high, checksums.of([low, high], pieces))


def test_every_tensor_that_travels_has_its_own_checksum() -> None:
    wide, narrow = some_tensor((4, 6), torch.float32), some_tensor((4, 6), torch.bfloat16)
    pieces = [Piece((4, 6), 0, (wide.view(-1), narrow.view(-1)))]
    part = whole(wide)
    sums = Checksums(("v", "w"), [[part]], 3, CPU).of([part], pieces).tolist()
    assert sums == [[0, 0, 0], [whole_checksum(wide)[0][0], whole_checksum(narrow)[0][0], 0]]


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
@pytest.mark.parametrize("shape", [(), (3, 5), (2, 8)], ids=str)
def test_every_single_bit_counts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = some_tensor(shape, dtype)
    checksums = Checksums(("w",), [[whole(tensor)]], 1, CPU)
    changed = tensor.reshape(-1).clone()
    octets = changed.view(torch.uint8)
    before = checksums.of([whole(tensor)], [Piece(shape, 0, (changed,))])
    for at in range(8 * len(octets)):
        octets[at // 8] ^= 1 << at % 8
        assert not torch.equal(checksums.of([whole(tensor)], [Piece(shape, 0, (changed,))]), before)
        octets[at // 8] ^= 1 << at % 8


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_rearranged_elements_are_noticed(dtype: torch.dtype) -> None:
    tensor = some_tensor((16, 16), dtype)
    before = whole_checksum(tensor)
    for a, b in ((0, 1), (1, 2), (1, 8), (0, 9)):
        order = list(range(16))
        order[a], order[b] = b, a
        assert whole_checksum(tensor[order]) != before
        assert whole_checksum(tensor[:, order]) != before
    blocks = tensor.clone()
    blocks[:8, :8], blocks[8:, 8:] = tensor[8:, 8:], tensor[:8, :8]
    for changed in (tensor.T, tensor.flip(0), tensor.roll(1, 0), tensor.roll(1, 1), tensor.roll(8, 1), blocks):
        assert whole_checksum(changed) != before


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_changes_that_no_row_or_column_sees_are_noticed(dtype: torch.dtype) -> None:
    tensor = torch.zeros(16, 16, dtype=dtype)
    tensor[0, 0] = tensor[8, 8] = 1
    other = tensor.roll(8, 0)
    assert tensor.sum(0).tolist() == other.sum(0).tolist()
    assert tensor.sum(1).tolist() == other.sum(1).tolist()
    assert whole_checksum(tensor) != whole_checksum(other)


LARGE = (300, 12)


@pytest.mark.parametrize("dtype", DTYPES[:-1], ids=str)
def test_rows_that_share_a_weight_add_up_in_any_cut(dtype: torch.dtype) -> None:
    tensor, rng = some_tensor(LARGE, dtype), random.Random(1)
    for _ in range(10):
        parts = [whole(tensor)._replace(box=box, start=box.offset) for box in random_boxes(rng, whole(tensor).box, 5)]
        pieces = [Piece(LARGE, 0, (tensor.flatten(),))]
        sums = Checksums(["w"], [[whole(tensor)]], 1, torch.device("cpu")).of(parts, pieces)
        assert sums.tolist() == whole_checksum(tensor)


def test_changes_of_large_matrices_are_noticed() -> None:
    tensor = some_tensor(LARGE, torch.float32)
    before, bits = whole_checksum(tensor), tensor.view(torch.int32)
    for row, column, bit in ((0, 0, 0), (17, 5, 31), (299, 11, 12)):
        bits[row, column] ^= 1 << bit if bit < 31 else -(2**31)
        assert whole_checksum(tensor) != before
        bits[row, column] ^= 1 << bit if bit < 31 else -(2**31)
    far = tensor.clone()
    far[3], far[19] = tensor[19], tensor[3]
    for changed in (tensor.flip(0), tensor.roll(1, 0), tensor.roll(1, 1), tensor.roll(16, 0), far):
        assert whole_checksum(changed) != before


def test_changed_signs_are_noticed() -> None:
    tensor = some_tensor((8, 8), torch.float32)
    assert whole_checksum(-tensor) != whole_checksum(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_of_any_size_give_the_same_checksum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = some_tensor((6, 51), dtype)
    expected = whole_checksum(tensor)
    for words in (1, 7, 60, 110):
        monkeypatch.setattr(module, "_PACKED_WORDS", words)
        assert whole_checksum(tensor) == expected


def test_sums_where_integer_matrices_have_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weights = torch.randint(-(2**62), 2**62, (6, 50)), torch.randint(-(2**62), 2**62, (50,))
    for words in (7, 120, 1 << 20):
        monkeypatch.setattr(module, "_PRODUCT_WORDS", words)
        assert torch.equal(module._multiplied_sums(rows, weights), module._weighted_sums(rows, weights))
