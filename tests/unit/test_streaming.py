"""Streams of random transfer plans: what is in memory, round by round, and getting back from the middle of one."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from copus_ext.core.reshard.geometry import Box
from copus_ext.core.reshard.streaming import Stream, default_limit, rounds, stream
from copus_ext.core.reshard.transfer import Holding, Holdings, plan_transfer
from tests.unit.test_transfer import ITEM_BYTES, SHAPES, carry_out, contents, random_plan, random_side

Arrays = list[list[np.ndarray]]


def logical_tensors() -> dict[str, np.ndarray]:
    return {key: np.arange(1, 1 + int(np.prod(shape))).reshape(shape) for key, shape in SHAPES.items()}


def zeros(side: Holdings) -> Arrays:
    return [[np.zeros(held.box.shape, dtype=np.int64) for held in holdings] for holdings in side]


def equal(left: Arrays, right: Arrays) -> bool:
    return all(np.array_equal(a, b) for p, q in zip(left, right, strict=True) for a, b in zip(p, q, strict=True))


def test_ranks_that_have_nothing_to_do_with_each_other_move_at_once() -> None:
    """Stages of a pipeline exchange layers in pairs: the tensors of one pair all come first, by number."""
    old, new = layers([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4), layers([1] * 4 + [0] * 4 + [3] * 4 + [2] * 4)
    moving = stream(plan_transfer(old, new), old, new, 800)
    assert len(moving.rounds) == 4
    assert all({t.source for t in this.transfers} == {0, 1, 2, 3} for this in moving.rounds)


@pytest.mark.parametrize("limit", [1, 50, 200, 10**9])
def test_rounds_keep_order_and_limit(limit: int) -> None:
    _, _, plan = random_plan(3)
    everything = []
    for transfers in rounds(plan.transfers, limit):
        used: Counter[int] = Counter()
        for transfer in transfers:
            for rank in {transfer.source, transfer.target}:
                used[rank] += transfer.nbytes
        assert max(used.values()) <= max(limit, *ITEM_BYTES.values())
        everything += transfers
    assert sum(t.nbytes for t in everything) == sum(t.nbytes for t in plan.transfers)
    if limit == 10**9:
        assert everything == list(plan.transfers)


@pytest.mark.parametrize("seed", range(30))
def test_what_was_released_is_not_read_again(seed: int) -> None:
    """The ground truth: everything arrives although each piece is overwritten as soon as it is released."""
    old, new, plan = random_plan(seed)
    logical, arrived = logical_tensors(), zeros(new)
    held = contents(old, logical)
    moving = stream(plan, old, new, 100)
    for rank, pieces in enumerate(moving.unread):
        for piece in pieces:
            held[rank][piece][...] = -1000
    for this in moving.rounds:
        carry_out(list(this.transfers), held, arrived)
        for rank, pieces in enumerate(this.released):
            for piece in pieces:
                held[rank][piece][...] = -1000
    assert equal(arrived, contents(new, logical))
    assert all((array == -1000).all() for arrays in held for array in arrays), "everything was released"


@pytest.mark.parametrize("seed", range(30))
def test_from_any_round_there_is_a_way_back(seed: int) -> None:
    old, new, plan = random_plan(seed)
    logical, moving = logical_tensors(), stream(plan, old, new, 100)
    for count in range(len(moving.rounds) + 1):
        held, arrived = contents(old, logical), zeros(new)
        for this in moving.rounds[:count]:
            carry_out(list(this.transfers), held, arrived)
        lost = moving.lost_after(count)
        for rank, holdings in enumerate(lost):
            for holding in holdings:
                held[rank][holding.piece][...] = 0
        sources = [before + after for before, after in zip(held, arrived, strict=True)]
        back = plan_transfer(moving.held_after(count), lost, partial=True)
        carry_out(list(back.transfers), sources, held)
        assert equal(held, contents(old, logical))


def peak_over_ends(moving: Stream) -> float:
    """The most that any rank holds at any time, relative to what it held before or holds in the end."""
    worst = 0.0
    for rank in range(len(moving.old)):
        old, new = ({h.piece: h.box.volume * h.item_bytes for h in side[rank]} for side in (moving.old, moving.new))
        before, after = sum(old.values()), sum(new.values())
        held = before - sum(old[piece] for piece in moving.unread[rank])
        filled: set[int] = set()
        for this in moving.rounds:
            arriving = {t.given.piece for t in this.transfers if t.target == rank} - filled
            filled |= arriving
            held += sum(new[piece] for piece in arriving)
            worst = max(worst, held / max(before, after))
            held -= sum(old[piece] for piece in this.released[rank])
    return worst


def layers(owner: list[int]) -> Holdings:
    """Layer by layer on the rank that ``owner`` names, as pipeline parallelism has it."""
    side: list[list[Holding]] = [[] for _ in range(max(owner) + 1)]
    for layer, rank in enumerate(owner):
        side[rank].append(Holding(f"weight:layer[{layer:02}]", Box((0,), (100,)), len(side[rank]), (0,), 4))
    return side


def test_the_order_keeps_memory_low_where_layers_change_places() -> None:
    """From a pipeline of two stages to an interleaved one: by number, a rank would get half of its layers too early."""
    old, new = layers([0] * 8 + [1] * 8), layers([0, 0, 1, 1] * 4)
    plan = plan_transfer(old, new)
    assert peak_over_ends(stream(plan, old, new, 400)) <= 1 + 1 / 8


@pytest.mark.parametrize("seed", range(10))
def test_every_rank_makes_the_same_stream(seed: int) -> None:
    rng = random.Random(seed)
    old, new = random_side(rng), random_side(rng)
    assert stream(plan_transfer(old, new), old, new, 64) == stream(plan_transfer(old, new), old, new, 64)


def test_weights_go_before_moments_where_one_buffer_has_them_all() -> None:
    weights = [layers(owner) for owner in ([0] * 8 + [1] * 8, [1] * 8 + [0] * 8)]
    moments = [
        [[h._replace(key=h.key.replace("weight", "moments"), piece=h.piece + 8) for h in s] for s in w] for w in weights
    ]
    old, new = ([[*a, *b] for a, b in zip(*sides, strict=True)] for sides in zip(weights, moments, strict=True))
    for weights_first in (True, False):
        moving = stream(plan_transfer(old, new), old, new, 800, weights_first=weights_first)
        kinds = [{t.given.key.partition(":")[0] for t in this.transfers} for this in moving.rounds]
        last_weights = max(number for number, kind in enumerate(kinds) if "weight" in kind)
        first_moments = min(number for number, kind in enumerate(kinds) if "moments" in kind)
        assert (last_weights < first_moments) == weights_first


def test_rounds_are_as_large_as_there_is_room() -> None:
    mib = 2**20

    def limit(held_mib: int, room_mib: int) -> int:
        held = Holding("weight:w", Box((0,), (held_mib * mib,)), 0, (0,), 1)
        return default_limit([[held], []], [[held], []], room_mib * mib) // mib  # the second rank has no part in it

    assert limit(1, 0) == 1, "small ones would be nothing but agreeing"
    assert limit(100, 0) == 25
    assert limit(10_000, 0) == 64
    assert limit(10_000, 3000) == limit(1500, 3000) == 750
    assert limit(100_000, 50_000) == 1024
