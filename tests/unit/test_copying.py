"""Copies are compared with what they were made of, to the last bit, wherever the two lie."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from copus_ext.adapters import copying as module
from copus_ext.adapters.copying import copied, same_bits

_LAID_OUT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "in one": lambda t: t[:, :96].contiguous(),
    "columns": lambda t: t[:, 8:104],
    "odd columns": lambda t: t[:, 7:102],
    "columns apart": lambda t: t[:, ::2],
    "vector": lambda t: t.view(-1)[3:77],
    "number": lambda t: t[3, 4],
    "one row": lambda t: t[5:6],
    "nothing": lambda t: t[:0],
    "cube": lambda t: t.view(6, 5, 128)[:, 1:3, 5:9],
}


def numbers(kind: torch.dtype) -> torch.Tensor:
    """Every bit pattern, those that are no numbers too."""
    return torch.randint(-128, 128, (30, 128 * kind.itemsize), dtype=torch.int8).view(kind)


@pytest.mark.parametrize("part_bytes", [2**19, 64])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("lies", list(_LAID_OUT))
def test_every_bit_is_copied_and_found_the_same(lies: str, kind: torch.dtype, part_bytes: int) -> None:
    source, among_others = _LAID_OUT[lies](numbers(kind)), _LAID_OUT[lies](numbers(kind))
    for target in (torch.zeros(source.shape, dtype=kind), among_others):
        with mock.patch.object(module, "_PART_BYTES", part_bytes):
            assert copied(target, source, same_bits)
        assert torch.equal(*(side.contiguous().view(-1).view(torch.int8) for side in (target, source)))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("lies", [lies for lies in _LAID_OUT if lies != "nothing"])
def test_a_single_other_bit_is_seen(lies: str, kind: torch.dtype) -> None:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kind.itemsize]
    for place in (0, -1):
        left = _LAID_OUT[lies](numbers(kind))
        right = left.clone(memory_format=torch.contiguous_format)
        right.view(-1).view(integers)[place] ^= 1
        assert not same_bits(left, right)
        assert not same_bits(right, left)


def test_tensors_of_another_shape_or_type_are_not_the_same() -> None:
    assert not same_bits(torch.zeros(4, 2), torch.zeros(1, 2))
    assert not same_bits(torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16))


def test_zeros_of_other_signs_are_not_the_same() -> None:
    assert not same_bits(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert not same_bits(torch.zeros(4, 8)[:, :4], -torch.zeros(4, 8)[:, :4])


def test_a_copy_that_goes_wrong_in_one_part_is_told() -> None:
    source, target = torch.arange(1024.0).view(64, 16), torch.zeros(64, 16)
    copy, calls = torch.Tensor.copy_, []

    def wrong_once(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        calls.append(copy(self, other))
        if len(calls) == 3:
            self.view(-1)[-1] += 1
        return self

    with mock.patch.object(module, "_PART_BYTES", 64), mock.patch.object(torch.Tensor, "copy_", wrong_once):
        assert not copied(target, source, same_bits)
