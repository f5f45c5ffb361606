"""Learning rates and betas of a run whose batch changes: in the optimizer, over switches, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from copus_ext.core.plan import Layout, Plan, parse_plan
from copus_ext.core.planner.betas import beta_at_batch
from copus_ext.core.planner.learning_rate import learning_rate_factor
from tests.end_to_end.launch import MOCK, MODEL, TRAINING, Outcome, losses_of, run_main
from tests.ranks.harness import run_ranks

_LR, _MIN_LR, _BETAS = 1e-3, 1e-4, (0.9, 0.95)
CASES = {
    "fp32": (Layout(dp=2), ""),
    "bf16, experts, optimizers shared out": (
        Layout(dp=2, distributed_optimizer=True),
        "--bf16 --use-distributed-optimizer --num-experts 4 --disable-bias-linear ",
    ),
}


def _overrides(batch: int, noise_scale: float = 20.0) -> dict[str, Any]:
    factor = learning_rate_factor("adascale", batch, 8, noise_scale)
    betas = [beta_at_batch("half-life", beta, batch, 8) for beta in _BETAS]
    rates = {"lr": _LR * factor, "min_lr": _MIN_LR * factor, "lr_warmup_init": 0.0}
    return {"padded_vocab_size": 128, "adam_beta1": betas[0], "adam_beta2": betas[1], **rates}


def _settings(job: Any) -> tuple[Any, ...]:
    """Of all groups: betas and bounds, and the steps that the optimizer has counted."""
    from copus_ext.adapters.carry import optimizer_step

    groups = job.optimizer.param_groups
    return {(*group["betas"], group["max_lr"], group["min_lr"]) for group in groups}, optimizer_step(job)


def _travelled(layout: Layout, flags: str) -> dict[str, Any]:
    """Settings on a way over batches and layouts, on jobs that are kept, new, left and taken up again."""
    from copus_ext.adapters.snapshot import Snapshot
    from copus_ext.run.switch import Switcher, change_rates, put_in_charge
    from tests.ranks.steps import build, train_steps
    from tests.ranks.tiny import raw_arguments, start_upstream

    base = Plan(layout, 1, 8)
    raw = raw_arguments("--adam-beta2 0.95 " + flags)
    _, layouts, _ = start_upstream(raw, base)
    job, switcher = build(layouts, raw, base), Switcher(raw, layouts)
    train_steps(job, layouts, 4)
    found: dict[str, Any] = {"base": _settings(job)}
    for words in ("gbs16", "dp1,tp2,gbs16", "dp1,tp2,gbs8", "dp2,gbs32"):
        plan = parse_plan(words, base)
        job, _ = switcher.switch(job, plan, _overrides(plan.global_batch))
        found[words] = _settings(job)
    snapshot = Snapshot.take(job)
    job, _ = switcher.switch(job, parse_plan("gbs4", base), _overrides(4))
    train_steps(job, layouts, 1)
    found["away"] = _settings(job)
    snapshot.restore(job)
    put_in_charge(job, layouts)
    found["back"] = _settings(job)
    args, train_iters = job.args, job.args.train_iters
    change_rates(job, _overrides(32, noise_scale=5.0))
    found["same arguments"] = job.args is args and args.train_iters == train_iters
    found["other noise"], found["plan"] = _settings(job), job.plan
    found["rates"] = [(group["lr"], job.scheduler.get_lr(group)) for group in job.optimizer.param_groups]
    return found


def _expected(batch: int, steps: int, noise_scale: float = 20.0) -> tuple[Any, ...]:
    said = _overrides(batch, noise_scale)
    return {tuple(said[name] for name in ("adam_beta1", "adam_beta2", "lr", "min_lr"))}, steps


@pytest.mark.parametrize("case", CASES)
def test_the_optimizer_has_the_betas_and_bounds_of_its_plan_to_the_last_bit(case: str) -> None:
    for found in run_ranks(2, _travelled, *CASES[case]):
        assert found["base"] == _expected(8, 4)
        assert found["gbs16"] == found["dp1,tp2,gbs16"] == _expected(16, 2), "as many tokens, in larger steps"
        assert found["dp1,tp2,gbs8"] == _expected(8, 4)
        assert found["dp2,gbs32"] == found["back"] == _expected(32, 1)
        assert found["away"] == _expected(4, 9)
        assert found["same arguments"], "upstream's train() holds on to them"
        assert found["other noise"] == _expected(32, 1, noise_scale=5.0)
        assert found["plan"] == Plan(CASES[case][0], 1, 32)
        assert all(lr == scheduled for lr, scheduled in found["rates"]), "at once, and not a step later"


RUN = (
    MODEL + TRAINING + MOCK + "--lr-warmup-samples 40 --lr-warmup-init 1e-5 --adam-beta2 0.95 --micro-batch-size 1 "
    "--global-batch-size 8 --train-samples 184 --save-interval 7 --ckpt-format torch_dist --copus-interval 3 "
    "--copus-policy schedule --copus-lr-rule adascale --copus-beta-rule half-life "
)
PLANS = "0:dp2,gbs8 24:dp2,gbs16 88:tp2,gbs24"
SAVED = 7  # under the second plan, which is left at once; where that was decided, the noise scale was read anew


def _recorded(words: list[str]) -> tuple[Outcome, list[tuple[Any, ...]]]:
    """A run of the entry point, with what stands in its optimizer before every step."""
    from copus_ext.adapters.carry import optimizer_step
    from copus_ext.run.controller import Controller

    seen: list[tuple[Any, ...]] = []
    names = ("lr", "max_lr", "min_lr", "betas", "weight_decay")

    def before_step(self: Any, model: Any, optimizer: Any) -> None:
        groups = [tuple(group[name] for name in names) for group in optimizer.param_groups]
        seen.append((str(self._job.plan), groups, optimizer_step(self._job), self._known.rate_noise_scale))

    with mock.patch.object(Controller, "before_step", before_step):
        return run_main(words), seen


def test_a_resumed_run_has_the_rates_and_betas_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    """To the last bit at every step: the noise scale that rates are by is read beside the checkpoint."""
    words = [*RUN.split(), f"--save={tmp_path / 'saved'}", "--copus-schedule", PLANS]
    whole = run_ranks(2, _recorded, [*words, f"--copus-dir={tmp_path / 'whole'}"])
    resume = [f"--load={tmp_path / 'saved'}", f"--ckpt-step={SAVED}", f"--copus-dir={tmp_path / 'rest'}"]
    rest = run_ranks(2, _recorded, [*words, *resume])
    assert [outcome.status for outcome, _ in (*whole, *rest)] == [0] * 4, rest[0][0].err
    for (_, every), (_, later) in zip(whole, rest, strict=True):
        assert later == every[SAVED:]
    steps = whole[0][1]
    assert [seen for _, seen in whole] == [steps, steps], "the same on every rank"
    assert losses_of(tmp_path / "rest") == losses_of(tmp_path / "whole")[SAVED:]

    by_plan = {plan: groups[0] for plan, groups, *_ in steps}
    assert [betas for *_, betas, _ in by_plan.values()] == [
        tuple(beta_at_batch("half-life", beta, batch, 8) for beta in _BETAS) for batch in (8, 16, 24)
    ]
    scales = [scale for *_, scale in steps]
    assert scales[0] == float("inf")
    assert len(set(scales[SAVED:])) > 1, "and is followed"
    for plan, groups, _, scale in steps:
        factor = learning_rate_factor("adascale", int(plan.rsplit("gbs", 1)[1]), 8, scale)
        assert {(group[1], group[2]) for group in groups} == {(_LR * factor, _MIN_LR * factor)}
    state = json.loads((tmp_path / "saved" / f"iter_{SAVED:07d}" / "copus_state.json").read_text())
    assert state["rate_noise_scale"] == scales[SAVED] != scales[SAVED - 1]
