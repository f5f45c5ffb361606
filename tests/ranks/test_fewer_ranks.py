"""Jobs on the first ranks of the world only: moved from fewer to more ranks and back, the others holding nothing."""

from __future__ import annotations

from math import lcm
from typing import Any

import pytest

from copus_ext.core.plan import Layout, Plan, parse_plan
from tests.ranks.faults import damage, no_memory, no_memory_behind
from tests.ranks.harness import run_ranks, skip_without_packages
from tests.ranks.moving import equal, is_hollow, moved, on_this_rank, seeded, start

_WORLD = 4
_OVERRIDES = {"padded_vocab_size": 128}
_GATED = "--swiglu --group-query-attention --num-query-groups 2 --disable-bias-linear "


def _plan(words: str) -> Plan:
    """``4:tp2,dp2`` is the layout on 4 ranks."""
    ranks, layout = words.split(":")
    return parse_plan(layout, Plan(Layout(dp=int(ranks)), micro_batch=1, global_batch=lcm(8, int(ranks))))


def _started(flags: str, words: str) -> tuple[Any, Any, list[Plan]]:
    """Upstream up on all ranks, and the plans; the first job may be on fewer."""
    raw, layouts = start(flags, _plan(f"{_WORLD}:dp{_WORLD}"))
    return raw, layouts, [_plan(word) for word in words.split()]


def _walk(flags: str, words: str) -> dict[str, Any]:
    from copus_ext.adapters.reshard import PlanCache
    from tests.ranks.gathering import full_state, full_weights, same
    from tests.ranks.steps import train_steps

    raw, layouts, plans = _started(flags, words)
    uninterrupted = train_steps(seeded(layouts, raw, plans[0]), layouts, 3)[2:]
    job = seeded(layouts, raw, plans[0])
    train_steps(job, layouts, 2)
    state, weights, home = full_state(job), full_weights(job), on_this_rank(job)
    kept, bytes_sent, held, scales = [], [], [], set()
    left: dict[Layout, Any] = {}
    cache = PlanCache()
    for number, plan in enumerate(plans[1:]):
        left[job.plan.layout] = job
        chunk = None if number % 2 else 100_000
        job, report = moved(job, plan, raw, layouts, left, plans=cache, chunk_bytes=chunk, staged=number == 2 or None)
        kept.append(same(full_state(job), state) and same(full_weights(job), weights))
        bytes_sent.append((report.bytes_moved, report.bytes_minimum))
        scales |= {float(job.optimizer.get_loss_scale())} if job.has_part else set()
        held.append((job.has_part, job.memory[True].held, all(map(is_hollow, left.values()))))
    return {
        "kept": kept,
        "bytes": bytes_sent,
        "held": held,
        "home": equal(home, on_this_rank(job)),
        "uninterrupted": uninterrupted,
        "returned": train_steps(job, layouts, 1, first_sample=16),
        "scales": scales,
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "4:dp4 2:tp2 4:pp4 1:dp1 2:dp2,zero1 4:dp4"),
        (_GATED + "--bf16 ", "2:dp2,zero1 4:tp2,pp2 3:dp3,zero1 1:dp1 4:dp4,zero1 2:dp2,zero1"),
        ("--fp16 --initial-loss-scale 1024 --loss-scale-window 2 ", "2:dp2 4:tp4 2:dp2"),
        (
            "--optimizer muon --muon-tp-mode duplicated --bf16 " + _GATED,
            "2:dp2,zero1 4:tp2,dp2,zero1 1:dp1 3:dp3,zero1 2:dp2,zero1",
        ),
    ],
)
def test_a_walk_over_fewer_and_more_ranks_keeps_every_bit(flags: str, words: str) -> None:
    skip_without_packages(flags)
    plans = [_plan(word) for word in words.split()]
    for rank, result in enumerate(run_ranks(_WORLD, _walk, flags, words)):
        assert all(result["kept"])
        assert result["home"]
        assert all(sent == least for sent, least in result["bytes"])
        assert any(sent for sent, _ in result["bytes"])
        for plan, (has_part, held, old_is_hollow) in zip(plans[1:], result["held"], strict=True):
            assert has_part == (rank < plan.layout.world_size) == bool(held)
            assert old_is_hollow
        assert result["returned"] == result["uninterrupted"]
        assert result["scales"] == {2048.0 if "fp16" in flags else 1.0}


def _switched() -> dict[str, Any]:
    """Two steps in one plan after the other, by ``Switcher``, beside a twin that never moves."""
    import torch

    from copus_ext.run.switch import Switcher, SwitchFailed
    from tests.ranks.steps import losses_and_norms

    raw, layouts, plans = _started("", "2:tp2 4:dp2,tp2 1:dp1 2:dp2,zero1 4:pp4")
    twin = losses_and_norms(seeded(layouts, raw, plans[0]), layouts, 2 * len(plans))
    job, switcher = seeded(layouts, raw, plans[0]), Switcher(raw, layouts)
    steps, rates, counts, drawn = [], [], [], {}
    with pytest.raises(SwitchFailed, match="takes 16 ranks, and there are 4"):
        switcher.switch(job, _plan("16:dp8,tp2"), _OVERRIDES)
    for number, plan in enumerate(plans):
        if plan != job.plan:
            if number == 2:
                switcher.prepare(job, plan, _OVERRIDES)
            job, _ = switcher.switch(job, plan, _OVERRIDES)
            drawn[number] = torch.rand(()).item(), torch.rand((), device="cuda").item()
        steps.append(losses_and_norms(job, layouts, 2, first_sample=16 * number))
        if job.has_part:
            job.args.iteration += 2  # as a training loop does
            job.args.consumed_train_samples += 16
            torch.distributed.new_group([0])  # as upstream may, which the others then have not counted
            rates.append((number, *{group["lr"] for group in job.optimizer.param_groups}))
        counts.append((job.args.iteration, job.args.consumed_train_samples))
    return {"twin": twin, "steps": steps, "rates": rates, "counts": counts, "drawn": drawn}


def test_training_goes_on_over_fewer_and_more_ranks() -> None:
    results = run_ranks(_WORLD, _switched)
    twin = results[0]["twin"]
    assert [len(result["twin"]) for result in results] == [10, 10, 0, 0]
    for rank, result in enumerate(results):
        for number, ranks in enumerate((2, 4, 1, 2, 4)):
            if rank < ranks:
                found, wanted = result["steps"][number], twin[2 * number : 2 * number + 2]
                assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in wanted], rel=1e-5)
                assert [norm for _, norm in found] == pytest.approx([norm for _, norm in wanted], rel=1e-4)
                assert result["counts"][number] == (2 * number + 2, 16 * number + 16)
                assert result["counts"][number] == results[0]["counts"][number]
            else:
                assert not result["steps"][number]
        assert set(result["rates"]) <= set(results[0]["rates"])
    assert len(results[0]["rates"]) == 5
    masks = [result["drawn"][1] for result in results]  # on dp2,tp2, whose tensor-parallel ranks compute some alike
    assert masks[0] == masks[1] != masks[2] == masks[3]


def _faults(words: str) -> list[tuple[str, bool, bool]]:
    """Moves that fail in one round after the other: what is said, and whether the old job is as it was."""
    from copus_ext.adapters.reshard import MoveFailed
    from tests.ranks.steps import build, train_steps

    raw, layouts, plans = _started("", words)
    twin = train_steps(seeded(layouts, raw, plans[0]), layouts, 3)
    job = seeded(layouts, raw, plans[0])
    train_steps(job, layouts, 2)
    found: list[tuple[str, bool, bool]] = []
    for number, plan in enumerate(plans[1:]):
        before, new = on_this_rank(job), build(layouts, raw, plan, initialise_weights=False)
        left = {plan.layout: new}
        options: dict[str, Any] = {"chunk_bytes": 100_000, "staged": number == 2}
        for fault, at in ((no_memory, 0), (no_memory, 3), (damage, 0), (damage, 3), (no_memory_behind, 0)):
            with fault(at), pytest.raises(MoveFailed) as failure:
                moved(job, plan, raw, layouts, {**left}, **options)
            found.append((str(failure.value), equal(before, on_this_rank(job)), is_hollow(new)))
        if number == 0:
            after = train_steps(job, layouts, 1, first_sample=16)
            found.append(("trains on", after == twin[2:], True))
        job, _ = moved(job, plan, raw, layouts, left)
    return found


def test_a_fault_brings_everything_back() -> None:
    """Where fewer ranks should have it, where more should, and by way of host memory."""
    faults = ["rank 2: out of memory"] * 2 + ["checksums differ"] * 2 + ["rank 2: out of memory"]
    expected = [*faults, "trains on", *faults, *faults]
    for found in run_ranks(_WORLD, _faults, "4:dp4,zero1 2:tp2 4:tp4 3:dp3,zero1"):
        for said, as_it_was, hollow in found:
            assert as_it_was, said
            assert hollow, said
        assert all(said.startswith(wanted) for (said, *_), wanted in zip(found, expected, strict=True))
