"""Decisions in one sentence."""

from __future__ import annotations

import math

from copus_ext.core.planner.outlook import Outlook


def explain(outlook: Outlook, best: int | None, switch: bool, threshold: float | None) -> str:
    """Why the plan is switched to number ``best``, or stays though that one comes nearest; None: there is no other."""
    if best is None:
        return "stay: there is no other plan to choose from" + _caveat(outlook)
    plan, left = outlook.plans[best], duration(outlook.horizon_s)
    gain, cost = _gain(outlook, best), duration(float(outlook.cost_s[best]))
    needed = float(outlook.needed[best])
    if math.isinf(needed):
        reason = f"stay: a {cost} switch to {plan} takes all of the {left} left"
    elif threshold is not None:
        verb = f"switch to {plan}" if switch else f"stay: nearest is {plan}"
        reason = f"{verb}: gain {gain}, and the threshold is {percent(threshold)}"
    elif switch:
        reason = f"switch to {plan}: gain {gain}, and {percent(needed)} repays a {cost} switch in the {left} left"
    else:
        reason = (
            f"stay: nearest is {plan}: gain {gain}, needs {percent(needed)} to repay a {cost} switch in the {left} left"
        )
    return reason + _caveat(outlook)


def explain_trial(outlook: Outlook, trial: int) -> str:
    """Why a plan is tried out."""
    return (
        f"try {outlook.plans[trial]}: gain {_gain(outlook, trial)} is in doubt, and finding out is expected to win "
        f"{duration(float(outlook.trial_s[trial]))} of the {duration(outlook.horizon_s)} left"
    ) + _caveat(outlook)


def _gain(outlook: Outlook, row: int) -> str:
    """Median and quartiles."""
    low, high = (100 * float(values[row]) for values in (outlook.gain_low, outlook.gain_high))
    return f"{percent(float(outlook.gain[row]))} (quartiles {low:.1f} to {high:.1f})"


def _caveat(outlook: Outlook) -> str:
    """What was not open to decision."""
    if outlook.critical_batch is None:
        return "; the noise scale is not known yet, so the batch stays"
    return "" if outlook.batch_may_shrink else "; the noise scale has no upper bound yet, so the batch may only grow"


def percent(ratio: float) -> str:
    """Like ``1.3 %``."""
    return f"{100 * ratio:.1f} %"


def duration(seconds: float) -> str:
    """Like ``310 ms``, ``1.4 s``, ``70 s`` and ``2.5 h``."""
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    return f"{seconds:.0f} s" if seconds < 7200 else f"{seconds / 3600:.1f} h"
