"""Memory that was let go comes back without being fresh: pages are found where they were put, and nothing faults."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from copus_ext.adapters import pages as module
from copus_ext.adapters.pages import Pages

MIB = 2**20


def tensor(nbytes: int, value: int) -> torch.Tensor:
    return torch.full((nbytes,), value, dtype=torch.uint8)


def taken(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@contextlib.contextmanager
def moving(before: int = 0, after: int = 0, pages: Pages | None = None) -> Iterator[Pages]:
    """A move on a CPU, of jobs of so many bytes."""
    pages = pages or Pages()
    with pages.between(before, after, torch.device("cpu")):
        yield pages


def faults_of_filling(one: torch.Tensor) -> int:
    """How many pages the kernel had to make, of those that a tensor lies in."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    one.fill_(7)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def _moves() -> None:
    """Only where the system can do it."""
    gone = tensor(8 * MIB, 3)
    with moving() as pages:
        pages.keep(gone.untyped_storage())
        if not pages._kept:
            pytest.skip("this system does not move pages")


@pytest.mark.usefixtures("_moves")
def test_what_is_taken_has_the_pages_of_what_is_gone_and_both_can_be_used() -> None:
    around, gone, new = tensor(8 * MIB, 1), tensor(8 * MIB, 3), taken(8 * MIB)
    with moving() as pages:
        pages.keep(gone.untyped_storage())
        pages.give(new.untyped_storage())
    # Where earlier tests cut the memory into mappings, small ones of these are not worth moving.
    assert float((new == 3).float().mean()) > 0.75
    assert faults_of_filling(new) < 8 * MIB // 4096 // 4
    gone.fill_(5)
    assert bool((new == 7).all())
    assert bool((gone == 5).all())
    assert bool((around == 1).all())


@pytest.mark.usefixtures("_moves")
def test_pages_from_several_places_go_on_together_and_on_their_own() -> None:
    small = [tensor(n * MIB // 4, n) for n in (3, 9, 5, 12, 7)]
    whole = taken(9 * MIB)
    again = [taken(n * MIB) for n in (2, 1, 5)]
    with moving() as pages:
        for one in small:
            pages.keep(one.untyped_storage())
        pages.give(whole.untyped_storage())
    assert {3, 5, 7, 9, 12} <= set(whole.unique().tolist())
    whole.fill_(1)
    with moving() as pages:
        pages.keep(whole.untyped_storage())
        for one in again:
            pages.give(one.untyped_storage())
        assert all(bool((one[MIB // 2 : -MIB // 4] == 1).all()) for one in again)
    assert sum(map(faults_of_filling, again)) < 8 * MIB // 4096 / 10, "but for a few around the seams none is fresh"


def size_of(pages: Pages) -> int:
    return sum(size for size, _ in pages._kept)


@pytest.mark.usefixtures("_moves")
def test_what_a_smaller_job_has_no_use_for_is_there_for_the_next_move() -> None:
    pages, large, small = Pages(), tensor(32 * MIB, 3), taken(8 * MIB)
    with moving(large.nbytes, small.nbytes, pages):
        pages.keep(large.untyped_storage())
        pages.give(small.untyped_storage())
    assert 20 * MIB < size_of(pages) <= 24 * MIB
    small.fill_(7)
    again = taken(32 * MIB)
    with moving(small.nbytes, again.nbytes, pages):
        pages.keep(small.untyped_storage())
        pages.give(again.untyped_storage())
    assert not size_of(pages)
    assert faults_of_filling(again) < 32 * MIB // 4096 // 4


@pytest.mark.usefixtures("_moves")
def test_no_more_stays_than_the_largest_job_had_beyond_the_one_that_is_there() -> None:
    pages, gone = Pages(), [tensor(MIB // 2, 3), *(tensor(4 * MIB, 3) for _ in range(2))]
    with moving(9 * MIB, 4 * MIB, pages):
        for one in gone:
            pages.keep(one.untyped_storage())
        assert size_of(pages) > 6 * MIB
    assert MIB < size_of(pages) <= 5 * MIB
    with moving(4 * MIB, 9 * MIB, pages):
        pass
    assert not size_of(pages)


@pytest.mark.usefixtures("_moves")
def test_where_memory_is_short_nothing_stays() -> None:
    gone = tensor(8 * MIB, 3)
    with moving(before=8 * MIB) as pages:
        pages.keep(gone.untyped_storage())
        pages.free()
        pages.keep(tensor(8 * MIB, 3).untyped_storage())
        assert not pages._kept
    with moving(pages=pages):
        pages.keep(tensor(8 * MIB, 3).untyped_storage())
        assert pages._kept


@pytest.mark.usefixtures("_moves")
def test_pages_that_the_system_can_not_have_back_when_it_needs_them_do_not_stay() -> None:
    gone, pages = tensor(8 * MIB, 3), Pages()
    with mock.patch.object(pages, "_madvise", return_value=-1), moving(before=8 * MIB, pages=pages):
        pages.keep(gone.untyped_storage())
    assert not pages._kept


@pytest.mark.usefixtures("_moves")
def test_going_to_and_fro_does_not_cut_memory_into_ever_more_mappings() -> None:
    sizes = [
        [int(n * MIB / 3) for n in order] for order in ((1, 2, 3, 4, 5, 6), (6, 5, 4, 3, 2, 1), (9, 4, 2, 2, 2, 2))
    ]
    held, before = [tensor(n, 0) for n in sizes[0]], len(module._mappings())
    for number in range(1, 60):
        with moving() as pages:
            new = [taken(n) for n in sizes[number % 3]]
            for one in held:
                pages.keep(one.untyped_storage())
            for one in new:
                pages.give(one.untyped_storage())
            held = new
    assert len(module._mappings()) - before < 5 * sum(sizes[0]) / module._LEAST


@pytest.mark.usefixtures("_moves")
def test_a_process_of_many_mappings_takes_fresh_pages() -> None:
    gone = [tensor(MIB, 3) for _ in range(4)]
    with mock.patch.object(module, "_MOST_MAPPINGS", len(module._mappings()) + 2), moving() as pages:
        for one in gone:
            pages.keep(one.untyped_storage())
        assert 0 < len(pages._kept) < 4


def test_memory_that_others_see_is_let_be(tmp_path: Path) -> None:
    shared = tensor(MIB, 3).share_memory_()
    mapped = torch.from_file(str(tmp_path / "file"), shared=True, size=MIB, dtype=torch.uint8).fill_(3)
    array = torch.from_numpy(np.full(MIB, 3, dtype=np.uint8))
    with moving() as pages:
        for seen in (shared, mapped, array):
            pages.keep(seen.untyped_storage())
            assert bool((seen == 3).all())
        assert not pages._kept


@pytest.mark.usefixtures("_moves")
def test_what_was_given_can_be_kept_again() -> None:
    gone, new = [tensor(32 * MIB, n) for n in (3, 4)], taken(64 * MIB)
    with moving() as pages:
        for one in gone:
            pages.keep(one.untyped_storage())
        pages.give(new.untyped_storage())
        pages.keep(new.untyped_storage())
        assert size_of(pages) > 48 * MIB


@pytest.mark.usefixtures("_moves")
def test_pages_that_this_move_will_not_take_may_be_taken_by_the_system_at_once() -> None:
    gone = [tensor(8 * MIB, 3) for _ in range(3)]
    with moving(before=24 * MIB, after=9 * MIB) as pages:
        with mock.patch.object(pages, "_madvise", side_effect=pages._madvise) as asked:
            for one in gone:
                pages.keep(one.untyped_storage())
        assert 10 * MIB < sum(call.args[1] for call in asked.call_args_list) <= 16 * MIB
        assert size_of(pages) > 20 * MIB


@pytest.mark.usefixtures("_moves")
def test_a_pool_that_lives_on_is_not_cut_into_ever_more_mappings() -> None:
    pages, before = Pages(), len(module._mappings())
    large, small = [int(n * MIB / 3) for n in (9, 4, 7, 5, 6)], [int(n * MIB / 3) for n in (2, 1, 3)]
    held = [tensor(n, 0) for n in large]
    for sizes in (small, large) * 20:
        with moving(sum(one.nbytes for one in held), sum(sizes), pages):
            for one in held:
                pages.keep(one.untyped_storage())
            held = [taken(n) for n in sizes]
            for one in held:
                pages.give(one.untyped_storage())
    assert len(module._mappings()) - before < 5 * sum(large) / module._LEAST


def test_without_a_list_of_mappings_memory_is_fresh() -> None:
    gone = tensor(8 * MIB, 3)
    with mock.patch.object(module, "_mappings", side_effect=OSError), moving() as pages:
        pages.keep(gone.untyped_storage())
        assert not pages._kept


@pytest.mark.parametrize("system", [{"side_effect": OSError("no library")}, {"return_value": object()}])
def test_on_another_system_memory_is_fresh(system: dict[str, Any]) -> None:
    gone, new = tensor(MIB, 3), taken(MIB)
    with mock.patch.object(module.ctypes, "CDLL", **system), moving() as pages:
        pages.keep(gone.untyped_storage())
        pages.give(new.untyped_storage())
    new.fill_(7)
    assert bool((gone == 3).all())


def test_a_kernel_that_can_not_leave_a_place_empty_is_asked_once() -> None:
    gone = tensor(8 * MIB, 3)
    with moving() as pages:
        with mock.patch.object(pages, "_mremap", return_value=module._NOWHERE) as asked:
            pages.keep(gone.untyped_storage())
            pages.keep(gone.untyped_storage())
        assert asked.call_count == 1
    assert bool((gone == 3).all())


@pytest.mark.usefixtures("_moves")
def test_pages_that_can_not_be_put_leave_usable_memory() -> None:
    gone, new = tensor(8 * MIB, 3), taken(8 * MIB)
    with moving() as pages:
        pages.keep(gone.untyped_storage())
        with mock.patch.object(pages, "_mremap", return_value=module._NOWHERE):
            pages.give(new.untyped_storage())
        assert not pages._kept
    new.fill_(7)
    assert bool((new == 7).all())
    gone.fill_(5)
    assert bool((gone == 5).all())
