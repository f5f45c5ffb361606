from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from copus_ext.core.errors import UserError
from copus_ext.core.planner.learning_rate import LR_RULES, adascale_gain, learning_rate_factor


def test_rules_at_four_times_the_batch_where_the_noise_scale_is_not_known() -> None:
    known = {rule: learning_rate_factor(rule, 64, 16) for rule in LR_RULES}
    assert known == {"sqrt": 2.0, "linear": 4.0, "adascale": 2.0, "none": 1.0}
    assert learning_rate_factor("adascale", 64, 16, optimizer="sgd") == 4.0


@pytest.mark.parametrize("rule", LR_RULES)
@pytest.mark.parametrize("noise_scale", [0.0, 0.1, 24.0, 1e9, math.inf])
def test_there_and_back_again_is_one(rule: str, noise_scale: float) -> None:
    there, back = (learning_rate_factor(rule, *batches, noise_scale) for batches in ((48, 16), (16, 48)))
    assert math.isclose(there * back, 1.0, rel_tol=1e-15)
    assert learning_rate_factor(rule, 16, 16, noise_scale) == 1.0


def test_adascale_is_the_gain_for_sgd_and_its_square_root_for_others() -> None:
    gain = (24 / 16 + 1) / (24 / 48 + 1)
    assert learning_rate_factor("adascale", 48, 16, 24.0, "sgd") == pytest.approx(gain, rel=1e-15)
    for optimizer in ("adam", "lion", "muon"):
        assert learning_rate_factor("adascale", 48, 16, 24.0, optimizer) == pytest.approx(gain**0.5, rel=1e-15)


@pytest.mark.parametrize("batch", [1, 8, 16, 48, 4096])
def test_the_gain_lies_between_its_limits(batch: int) -> None:
    assert adascale_gain(batch, 16, 0.0) == 1.0
    assert adascale_gain(batch, 16, math.inf) == batch / 16
    assert adascale_gain(batch, 16, 1e-9) == pytest.approx(1.0, abs=1e-9)
    assert adascale_gain(batch, 16, 1e12) == pytest.approx(batch / 16, rel=1e-6)
    gains = [adascale_gain(batch, 16, noise_scale) for noise_scale in (0.0, 0.5, 8.0, 200.0, math.inf)]
    assert gains == sorted(gains, reverse=batch < 16)


def test_the_gain_is_that_of_the_paper() -> None:
    """With sigma^2 and mu^2 of mean gradients of 16 drawn sequences, as Johnson et al. define them."""
    rng = np.random.default_rng(5)
    gradients = rng.normal(size=(4000, 30)) + 0.2
    mean, trace = gradients.mean(0), float(gradients.var(0).sum())
    sigma2, mu2, scale = trace / 16, float(mean @ mean), 48 / 16
    expected = (sigma2 + mu2) / (sigma2 / scale + mu2)
    assert adascale_gain(48, 16, trace / mu2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("noise_scale", [-1.0, math.nan])
def test_what_is_no_noise_scale_is_refused(noise_scale: float) -> None:
    with pytest.raises(ValueError, match="noise scale"):
        learning_rate_factor("adascale", 48, 16, noise_scale)


def test_an_unknown_rule_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--copus-lr-rule cubic.*sqrt, linear, adascale, none"):
        learning_rate_factor("cubic", 2, 1)


SHAPES: dict[str, dict[str, Any]] = {
    "cosine": {"lr_decay_style": "cosine"},
    "linear": {"lr_decay_style": "linear"},
    "inverse square root": {"lr_decay_style": "inverse-square-root"},
    "WSD": {"lr_decay_style": "WSD", "wsd_decay_steps": 300, "lr_wsd_decay_style": "minus_sqrt"},
}


def _scheduler(shape: dict[str, Any], factor: float) -> Any:
    """Upstream's, in samples: warm-up over 200 of 1000, rates times ``factor``."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    init, high, low = 1e-5 * factor, 3e-3 * factor, 2e-4 * factor
    group = {"max_lr": high, "min_lr": low}
    decay = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": 1000, "wd_incr_style": "constant"}
    rates = {"init_lr": init, "max_lr": high, "min_lr": low, "lr_warmup_steps": 200, "lr_decay_steps": 1000}
    return OptimizerParamScheduler(SimpleNamespace(param_groups=[group]), **rates, **decay, **shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_in_samples_keeps_its_shape_over_changes_of_the_batch(shape: str) -> None:
    """At every step the rate is that of the flags at as many samples, times the factor in force."""
    from copus_ext.run.switch import tell_optimizer

    base, running = _scheduler(SHAPES[shape], 1.0), _scheduler(SHAPES[shape], 1.0)
    args = SimpleNamespace(optimizer="sgd", decoupled_lr=None, decoupled_min_lr=None)
    job: Any = SimpleNamespace(optimizer=running.optimizer, scheduler=running)
    job.args = SimpleNamespace(**vars(args), lr=3e-3, min_lr=2e-4, lr_warmup_init=1e-5)
    for batch, steps in ((8, 10), (24, 8), (2, 20), (48, 9), (16, 10)):
        factor = learning_rate_factor("adascale", batch, 8, noise_scale=20.0)
        new: Any = SimpleNamespace(**vars(args), lr=3e-3 * factor, min_lr=2e-4 * factor, lr_warmup_init=1e-5 * factor)
        tell_optimizer(job, new)
        job.args = new
        for _ in range(steps):
            found, expected = (s.optimizer.param_groups[0]["lr"] for s in (running, base))
            assert found == pytest.approx(expected * factor, rel=1e-12)
            running.step(batch)
            base.step(batch)
    assert 900 < running.num_steps < 1000, "warm-up, plateau and decay were all seen"


@pytest.mark.parametrize(("rule", "power"), [("sqrt", -0.5), ("linear", 0.0), ("none", -1.0)])
def test_weight_decay_per_token_is_by_the_factor_over_the_batch(rule: str, power: float) -> None:
    """Of upstream's Adam: without a gradient, what is left of a weight after as many tokens."""
    import torch
    from megatron.core.optimizer import OptimizerConfig
    from megatron.training.arguments import parse_args

    assert OptimizerConfig().decoupled_weight_decay
    with mock.patch("sys.argv", ["prog"]):
        assert "decoupled_weight_decay" not in vars(parse_args()), "no flag turns it off"

    def decayed(batch: int) -> float:
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([weight], lr=1e-3 * learning_rate_factor(rule, batch, 8), weight_decay=0.1)
        for _ in range(960 // batch):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        return -math.log(float(weight.detach()))

    assert decayed(32) / decayed(8) == pytest.approx(4**power, rel=1e-3)
