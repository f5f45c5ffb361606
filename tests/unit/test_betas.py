from __future__ import annotations

import argparse
import math
from types import SimpleNamespace
from typing import Any

import pytest

from copus_ext.core.errors import UserError
from copus_ext.core.planner.betas import beta_at_batch, check_beta_rule, steps_of_like_age


@pytest.mark.parametrize("beta", [0.9, 0.95, 0.999])
@pytest.mark.parametrize("batch", [1, 8, 24, 512])
def test_half_of_a_step_is_forgotten_after_as_many_tokens(beta: float, batch: int) -> None:
    half_life = batch * math.log(0.5) / math.log(beta_at_batch("half-life", beta, batch, 8))
    assert half_life == pytest.approx(8 * math.log(0.5) / math.log(beta), rel=1e-12)


def test_betas_of_the_flags_are_those_of_their_batch() -> None:
    assert beta_at_batch("half-life", 0.95, 8, 8) == 0.95
    assert beta_at_batch("none", 0.95, 64, 8) == 0.95
    assert beta_at_batch("half-life", 0.9, 16, 8) == pytest.approx(0.81)
    assert beta_at_batch("half-life", 0.0, 16, 8) == 0.0, "no average at all stays none"


def test_the_memory_grows_with_the_batch_as_in_the_square_root_rule() -> None:
    """Malladi et al. let 1 - beta grow with the batch, which is the same to first order."""
    assert 1 - beta_at_batch("half-life", 0.999, 32, 8) == pytest.approx(4 * (1 - 0.999), rel=2e-3)


def test_steps_are_counted_anew_by_what_is_forgotten() -> None:
    beta = 0.95
    for batch, steps in ((16, 20), (8, 40), (4, 80), (3, 107)):
        new = beta_at_batch("half-life", beta, batch, 8)
        assert steps_of_like_age(40, beta, new) == steps
        assert new**steps == pytest.approx(beta**40, rel=0.01)
    assert steps_of_like_age(1, beta, beta_at_batch("half-life", beta, 64, 8)) == 1, "a step was made"
    assert [steps_of_like_age(steps, beta, 0.5) for steps in (0, -1)] == [0, -1], "none was"
    assert steps_of_like_age(7, 0.0, 0.0) == steps_of_like_age(7, 0.9, 0.0) == 7


def test_adam_makes_a_step_of_the_learning_rate_on_a_constant_gradient_whatever_the_batch_was() -> None:
    """Then both averages, divided by the weight of what they have seen, are exact, and so is their ratio: a sign."""
    import torch

    from copus_ext.adapters.carry import optimizer_step, recount_steps

    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    inner = torch.optim.AdamW([weight], lr=1e-2, betas=(0.9, 0.999), eps=0.0, weight_decay=0.0)
    job: Any = SimpleNamespace(optimizer=SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]))
    job.args = SimpleNamespace(optimizer="adam", adam_beta2=0.999)
    for batch, more, counted, off in ((8, 12, 12, 1e-12), (16, 4, 10, 1e-12), (4, 8, 48, 1e-12), (12, 2, 18, 0.02)):
        before = job.args
        beta1, beta2 = (beta_at_batch("half-life", beta, batch, 8) for beta in (0.9, 0.999))
        job.args = SimpleNamespace(optimizer="adam", adam_beta2=beta2)
        inner.param_groups[0]["betas"] = (beta1, beta2)
        recount_steps(job, before)
        for _ in range(more):
            start = weight.detach().clone()
            weight.grad = torch.tensor([3.0, -0.5], dtype=torch.float64)
            inner.step()
            assert (start - weight.detach()).tolist() == pytest.approx([1e-2, -1e-2], rel=off)
        assert optimizer_step(job) == counted


def test_what_can_not_be_is_told() -> None:
    check_beta_rule("none", "sgd")
    check_beta_rule("half-life", "adam")
    with pytest.raises(UserError, match=r"--copus-beta-rule third-life: there is no such rule.*none, half-life"):
        check_beta_rule("third-life", "adam")
    with pytest.raises(UserError, match=r"--copus-beta-rule half-life .*--optimizer muon .*use --copus-beta-rule none"):
        check_beta_rule("half-life", "muon")


def test_a_run_refuses_the_rule_for_other_optimizers() -> None:
    from copus_ext.run.config import add_arguments, check_flags

    args = add_arguments(argparse.ArgumentParser()).parse_args(["--copus-beta-rule", "half-life"])
    args.optimizer = "sgd"
    with pytest.raises(UserError, match=r"--copus-beta-rule half-life .*--optimizer sgd"):
        check_flags(args)
