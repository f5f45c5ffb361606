"""Tests of the gradient's variance: the batch grows when a step's gradient is too noisy for its length.

**Norm test** (Byrd et al. 2012; for language models Lau, Li, Xu, Liu and Kolar 2024, arXiv 2412.21124): with g_B the
gradient of a step of B sequences,

    Var / B <= eta^2 |g_B|^2,        else the next batch is ceil(Var / (eta^2 |g_B|^2))

Var is the variance of single sequences' gradients, S here, and |g_B|^2 = N + S / B, which holds exactly for equal
groups. Both are means over the steps since the last decision. ``test=ddp`` takes S as it is, which is unbiased.
``test=fsdp`` takes (J - 1) / J of it: the second moment over J workers minus the squared mean, with J the data-parallel
size.

Not verified, for want of their code and of the paper's sections on it: that this is how DDP-Norm and FSDP-Norm differ;
whether theirs scales the scatter of the workers' gradients up to single sequences, as Var means (AdAdaGrad's published
code, github.com/timlautk/AdAdaGrad, takes gradients of single samples); and which eta they trained with.

**Inner product test** (Bollapragada, Byrd and Nocedal 2018, arXiv 1710.11258; AdAdaGrad, Lau, Liu and Kolar 2024, arXiv
2402.11215): with P the variance of a sequence's inner product with g_B,

    P / B <= theta^2 |g_B|^4,        else the next batch is ceil(P / (theta^2 |g_B|^4))

Of the whole gradient, as the papers write it; the published code adds up P of each weight matrix by itself.

Where noise rules, |g_B|^2 is about S / B, and the norm test asks for B / eta^2 at once: 25 times the batch at eta 0.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from copus_ext.core.plan import Plan
from copus_ext.core.planner.batch_change import grown_to, stay
from copus_ext.core.planner.decision import Decision, Situation
from copus_ext.core.planner.policy import Options, Policy, PolicySettings

DDP, FSDP, INNER_PRODUCT = "ddp", "fsdp", "inner-product"

ETA = 0.2  # our choice; the published scripts of AdAdaGrad have 0.1 to 0.5 on images
THETA = 0.9  # our choice; the published code of AdAdaGrad has 0.1 by default


@dataclass(frozen=True)
class NormTestPolicy(Policy):
    """Grows the batch where the norm test fails; layout fixed. ``biased``: (J - 1) / J of the variance."""

    searches = True
    needs_whole_gradient = True

    eta: float = ETA
    biased: bool = False

    def decide(self, situation: Situation) -> Decision:
        """Hold Var / B against eta^2 |g_B|^2."""
        workers = situation.current.layout.dp
        if self.biased and workers < 2:
            return stay(situation, "test=fsdp compares data-parallel workers, and there is only one")
        recent = situation.recent
        if recent is None:
            return stay(situation, "no step since the last decision was measured, so the norm test can't be made")
        variance = recent.S * (workers - 1) / workers if self.biased else recent.S
        square = recent.N + recent.S / situation.current.global_batch
        return _outcome(situation, f"Var / B, Var {variance:.4g},", variance, f"eta {self.eta:g}", self.eta, square, 1)


@dataclass(frozen=True)
class InnerProductPolicy(Policy):
    """Grows the batch where the inner product test fails; layout fixed."""

    searches = True
    needs_whole_gradient = True
    needs_inner_products = True

    theta: float = THETA

    def decide(self, situation: Situation) -> Decision:
        """Hold P / B against theta^2 |g_B|^4."""
        recent = situation.recent
        if recent is None or math.isnan(recent.P):
            return stay(situation, "no inner products were measured since the last decision")
        square = recent.N + recent.S / situation.current.global_batch
        return _outcome(
            situation, f"P / B, P {recent.P:.4g},", recent.P, f"theta {self.theta:g}", self.theta, square, 2
        )


def _outcome(
    situation: Situation, name: str, variance: float, parameter: str, bound: float, square: float, power: int
) -> Decision:
    """What a test says: ``variance`` / B against ``bound``^2 x ``square``^``power``, ``square`` being |g_B|^2."""
    batch = situation.current.global_batch
    allowed = bound**2 * square**power if square > 0 else math.nan
    if not (math.isfinite(variance) and 0 < allowed < math.inf):
        return stay(situation, f"|g|^2 {square:.4g} and variance {variance:.4g} make no test")
    said = f"{name} is {variance / batch:.4g} at batch {batch}, and {allowed:.4g} is allowed by {parameter}"
    if variance / batch <= allowed:
        return stay(situation, said)
    wanted = max(batch, math.ceil(variance / allowed))
    return grown_to(situation, wanted, f"{said}, which takes {wanted} sequences")


def make(settings: PolicySettings, base: Plan, options: Options) -> Policy:
    """Options ``test``: ddp, fsdp or inner-product; ``eta``, or ``theta`` with the last."""
    test = options.choice("test", (DDP, FSDP, INNER_PRODUCT))
    if test == INNER_PRODUCT:
        return InnerProductPolicy(options.positive("theta", THETA))
    return NormTestPolicy(options.positive("eta", ETA), biased=test == FSDP)
