"""Copies within a rank, compared bit by bit with what they were made of while both are still in the processor's cache.

A checksum of each would read both from memory once more, which costs as much as the copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

_PART_BYTES = 2**19  # a copy of it and what it was made of fit into the cache of one core
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)

Comparison = Callable[[torch.Tensor, torch.Tensor], bool]  # True where both have the same bits


def copied(target: torch.Tensor, source: torch.Tensor, same: Comparison) -> bool:
    """Copy ``source`` into ``target``, of the same shape and type, part by part: True if each is the ``same`` then."""
    if source.nbytes <= _PART_BYTES:
        return same(target.copy_(source), source)
    if target.is_contiguous() and source.is_contiguous():
        target, source = target.view(-1), source.view(-1)
    return all(same(there.copy_(here), here) for there, here in zip(_parts(target), _parts(source), strict=True))


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors on a CPU have the same shape, type and bits. NaNs of the same bits are the same."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.is_contiguous() and right.is_contiguous():
        return not _memcmp()(left.data_ptr(), right.data_ptr(), left.nbytes)
    return torch.equal(*(_as_integers(left, right)))


def _as_integers(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same bits as integers, and as few of them as can be."""
    for kind in _INTEGERS:
        with contextlib.suppress(RuntimeError):  # rows end inside of one, or do not begin with one
            return [tensor.view(kind) for tensor in tensors]
    raise ValueError(f"numbers of {tensors[0].element_size()} bytes")


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Along the first axis; rows are not cut further."""
    return tensor.split(max(1, _PART_BYTES // tensor[0].nbytes))


@functools.cache
def _memcmp() -> Callable[[int, int, int], int]:
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes, compare.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    return compare
