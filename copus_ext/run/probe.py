"""A probe: the run is branched to another batch for a while, to learn what c is, and goes on where it left."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from copus_ext.adapters.snapshot import Snapshot
from copus_ext.core.efficiency.critical_batch import fit_critical_batch
from copus_ext.core.efficiency.critical_ratio import EfficiencyRatio, from_probe
from copus_ext.core.efficiency.loss_curves import BranchCurve
from copus_ext.core.errors import UserError
from copus_ext.core.noise.noise_scale import NoiseEstimate
from copus_ext.core.plan import Plan
from copus_ext.core.planner.decision import Probe
from copus_ext.core.planner.explain import duration
from copus_ext.core.planner.probing import EVALUATIONS
from copus_ext.run.branching import Branches, BranchFailed, BranchStopped
from copus_ext.run.host import Host, Iterators

_BLOCKS = 8  # of validation sequences in an evaluation: resampling fewer tells little of how uncertain their mean is
_SETTLE = 0.25  # of the branches: losses that are compared come later


def make_probe(host: Host, probe: Probe) -> Iterators:
    """Train under the probe's plan, go back, and train the same samples under the run's own. Collective.

    The second is the run itself, with nothing decided on the way; so what a probe costs is the first, and evaluations.

    Returns:
        What the job reads on with.
    """
    start, samples = time.perf_counter(), host.job.args.consumed_train_samples
    noise = host.knowledge.noise.estimate()
    own = host.job.plan
    try:
        branches = Branches(host, _BLOCKS)
        first, other = _branch(host, branches, probe, samples)
    except BranchStopped:  # which the next step of the run itself looks after
        return host.iterators()
    except (UserError, BranchFailed) as error:
        fields = {"plan": str(probe.plan), "parts": probe.plan.to_json()}
        host.telemetry.event("fault", kind="probe", message=str(error), **fields)
        return host.iterators()
    seconds, evaluated_s = time.perf_counter() - start, branches.evaluated_s
    mine, iterators = branches.train(own, probe.samples, EVALUATIONS)
    seconds += branches.evaluated_s - evaluated_s
    curves = [_curve(plan, probe.samples, first, losses) for plan, losses in ((own, mine), (probe.plan, other))]
    _tell(host, probe, samples, seconds, _learned(host, curves, samples, noise))
    return iterators


def _branch(host: Host, branches: Branches, probe: Probe, samples: int) -> tuple[list[float], list[list[float]]]:
    """The losses before the branch, and [evaluations][blocks] those on its way; the job is back where it was."""
    first, snapshot = branches.losses(), Snapshot.take(host.job)
    folder = host.config.directory / "probes" / f"{samples}-gbs{probe.plan.global_batch}"
    try:
        with branches.leaving_nothing(), branches.logged_apart(folder):
            losses, _ = branches.train(probe.plan, probe.samples, EVALUATIONS)
    finally:
        branches.go_back(snapshot)
    return first, losses


def _curve(plan: Plan, samples: int, first: list[float], losses: list[list[float]]) -> BranchCurve:
    spaced = np.linspace(0.0, float(samples), EVALUATIONS + 1)
    return BranchCurve(plan.global_batch, spaced, np.array([first, *losses], dtype=np.float64))


def _learned(
    host: Host, curves: list[BranchCurve], samples: int, noise: NoiseEstimate | None
) -> EfficiencyRatio | None:
    """What the two branches say; None on ranks that have no losses, or where they say nothing."""
    if noise is None or not host.telemetry.leads:
        return None
    return from_probe(fit_critical_batch(curves, _SETTLE * float(curves[0].samples[-1])), samples, noise)


def _tell(host: Host, probe: Probe, samples: int, seconds: float, found: EfficiencyRatio | None) -> None:
    own, told = host.job.plan.global_batch, dict[str, Any]()
    names = ("batch_from", "batch_to", "log_ratio", "log_sd")
    if found is None:
        told = dict(zip(names, (own, probe.plan.global_batch, None, None), strict=True)) | {"noise_scale": [None] * 3}
    else:
        told = {name: getattr(found, name) for name in names}
        told["noise_scale"] = [found.noise_scale, found.noise_low, found.noise_high]
    host.telemetry.event(
        "probe",
        plan=str(probe.plan),
        parts=probe.plan.to_json(),
        start_samples=samples,
        samples=probe.samples,
        seconds=seconds,
        **told,
    )
    c, low, high = host.knowledge.critical_ratio.interval(samples)
    result = "which said nothing of c" if found is None else f"c is {c:.2g} ({low:.2g} to {high:.2g}) by now"
    branch = f"global batch {probe.plan.global_batch} for {probe.samples} sequences"
    host.telemetry.say(f"branched to {branch} in {duration(seconds)}: {result}")
