"""Checksums do not see how a tensor is cut, and see every change."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from copus_ext.adapters.checksum import Checksums
from copus_ext.adapters.exchange import Piece
from copus_ext.core.geometry import Box, flat_range_boxes
from copus_ext.core.transfer import Holding

SHAPE = (6, 8, 5)
WHOLE = Holding("w", Box((0, 0, 0), SHAPE), 0, (0, 0, 0), 4)


def checksum(tensor: torch.Tensor, parts: list[Holding]) -> list[list[int]]:
    pieces = [Piece(tuple(tensor.shape), 0, (tensor.view(-1),))]
    return Checksums(("w",), [parts], 1, torch.device("cpu")).of(parts, pieces).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_any_cut_gives_the_same_checksum(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    tensor = torch.randn(SHAPE).mul(50).to(dtype)
    for _ in range(20):
        cuts = [0, *sorted(rng.sample(range(1, tensor.numel()), 3)), tensor.numel()]
        boxes = [box for a, b in pairwise(cuts) for box in flat_range_boxes(SHAPE, a, b)]
        assert checksum(tensor, [WHOLE.part(box) for box in boxes]) == checksum(tensor, [WHOLE])


def test_shares_of_ranks_add_up() -> None:
    tensor = torch.randn(4, 4)
    low, high = (Holding("w", Box((row, 0), (2, 4)), 0, (row, 0), 4) for row in (0, 2))
    pieces = [Piece((4, 4), 0, (tensor.view(-1),))]
    covers = [[low], [high]]
    checksums = Checksums(("w",), covers, 1, torch.device("cpu"))
    on_low, on_high = (checksums.of(parts, pieces) for parts in covers)
    assert torch.equal(on_low + on_high, checksums.of([low, high], pieces))


def test_every_single_bit_counts() -> None:
    tensor = torch.zeros(SHAPE)
    before = checksum(tensor, [WHOLE])
    for bit in range(32):
        changed = tensor.clone()
        changed.view(torch.int32).view(-1)[77] = 1 << bit if bit < 31 else -(1 << 31)
        assert checksum(changed, [WHOLE]) != before


def test_rearranged_elements_are_noticed() -> None:
    tensor = torch.randn(8, 8)
    whole = Holding("w", Box((0, 0), (8, 8)), 0, (0, 0), 4)
    before = checksum(tensor, [whole])
    quarters = torch.cat(
        [torch.cat([tensor[4:, 4:], tensor[4:, :4]], 1), torch.cat([tensor[:4, 4:], tensor[:4, :4]], 1)]
    )
    for changed in (tensor.T, tensor.flip(0), tensor.roll(1, 1), quarters, tensor * -1):
        assert checksum(changed.contiguous(), [whole]) != before


def test_rows_longer_than_the_scratch_space(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(6, 50)
    whole = Holding("w", Box((0, 0), (6, 50)), 0, (0, 0), 4)
    expected = checksum(tensor, [whole])
    for size in (7, 120):
        monkeypatch.setattr("copus_ext.adapters.checksum._SCRATCH_ELEMENTS", size)
        assert checksum(tensor, [whole]) == expected
