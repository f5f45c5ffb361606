from __future__ import annotations

import ctypes
import threading
from datetime import timedelta

import pytest
import torch

from copus_ext.adapters.board import Board


def read(address: int, into: torch.Tensor) -> None:
    """As another process would."""
    ctypes.memmove(into.data_ptr(), address, into.nbytes)


def board() -> Board:
    return Board(timedelta(seconds=0.1))


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_what_is_told_is_heard() -> None:
    here, there = board(), board()
    for turn in range(10):
        here.tell(numbers(turn, 7, 8))
        there.tell(numbers(*range(turn)))
        assert here.heard(read, there.address).tolist() == list(range(turn))
        assert there.heard(read, here.address).tolist() == [turn, 7, 8]


def test_who_hears_first_waits() -> None:
    here, there = board(), board()
    here.tell(numbers(1))
    later = threading.Timer(0.02, lambda: there.tell(numbers(2)))
    later.start()
    assert here.heard(read, there.address).tolist() == [2]
    later.join()


def test_what_was_told_stays_while_somebody_is_one_agreement_behind() -> None:
    """The other one has told twice more, which it may: once without anybody having heard it."""
    here, there = board(), board()
    here.tell(numbers(1))
    for value in (5, 6, 7):
        there.tell(numbers(value) + 0)  # nobody else holds what is told
    assert here.heard(read, there.address).tolist() == [5]


def test_a_rank_that_tells_nothing_is_given_up() -> None:
    here, there = board(), board()
    here.tell(numbers(1))
    with pytest.raises(RuntimeError, match="told nothing for"):
        here.heard(read, there.address)
