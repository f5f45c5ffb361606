"""Loss curves of branches turned round: how many samples each of them needs to come to the same losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_TARGETS = 12  # losses at which branches are compared; they are correlated, so more of them add little


@dataclass(frozen=True, eq=False)
class BranchCurve:
    """What one branch did.

    Attributes:
        batch: its global batch.
        samples: [points] trained on since the snapshot, rising from 0; the same for all branches of a snapshot.
        losses: [points, blocks] validation losses; a block is the same sequences in every branch at every point.
    """

    batch: int
    samples: Array
    losses: Array


def falling(values: Array) -> Array:
    """The non-increasing sequence closest to ``values`` in least squares (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] < mean:
            before, number = blocks.pop()
            mean = (mean * count + before * number) / (count + number)
            count += number
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])


def samples_to_reach(samples: Array, losses: Array, targets: Array) -> Array:
    """Where a non-increasing curve first comes down to each target; linear between points, ``nan`` where it never does.

    Args:
        samples: [points], rising.
        losses: [points], non-increasing.
        targets: [targets].

    Returns:
        [targets] samples.
    """
    # The first point at or below a target ends the stretch that the target lies on.
    ends = np.minimum(np.searchsorted(-losses, -targets), losses.size - 1)
    starts = np.maximum(ends - 1, 0)
    drop = losses[starts] - losses[ends]
    share = np.divide(losses[starts] - targets, drop, out=np.ones_like(drop), where=drop > 0)
    reached = samples[starts] + share * (samples[ends] - samples[starts])
    return np.where(losses[ends] <= targets, reached, math.nan)


def cost_from_branch(reached: Array) -> Array:
    """[branches] log of samples to equal loss, all of them counted; ``reached``: [branches, targets], losses falling.

    What a branch loses while it recovers from the change of batch and learning rate is in it.
    """
    return np.asarray(np.log(reached).mean(axis=1))


def cost_after_settling(reached: Array) -> Array:
    """[branches] log of samples between equal losses: from the mean of the first half of the targets to the second's.

    Samples that were lost at the start, once for all, cancel in the difference.
    """
    half = reached.shape[1] // 2
    return np.asarray(np.log(reached[:, half:].mean(axis=1) - reached[:, :half].mean(axis=1)))


def compare(
    curves: Sequence[BranchCurve], settle: float, blocks: NDArray[np.int64] | None = None
) -> tuple[tuple[BranchCurve, ...], Array]:
    """The branches that share losses after settling, and the samples at which they come to them.

    Where there are no such losses the branch that ends highest is left out, and so on.

    Args:
        curves: of one snapshot.
        settle: samples after the snapshot whose losses are no targets.
        blocks: the validation blocks to average over; by default each of them once.

    Returns:
        The branches, and [branches, targets] samples, losses falling; one branch alone has no targets.
    """
    used = [(curve, _mean_curve(curve, blocks)) for curve in curves]
    while len(used) > 1:
        highest = min(float(np.interp(settle, curve.samples, mean)) for curve, mean in used)
        lowest = max(float(mean[-1]) for _, mean in used)
        if lowest < highest:
            targets = np.linspace(highest, lowest, _TARGETS + 1)[1:]
            reached = np.stack([samples_to_reach(curve.samples, mean, targets) for curve, mean in used])
            return tuple(curve for curve, _ in used), reached
        used.pop(int(np.argmax([mean[-1] for _, mean in used])))
    return tuple(curve for curve, _ in used), np.zeros((len(used), 0))


def _mean_curve(curve: BranchCurve, blocks: NDArray[np.int64] | None) -> Array:
    losses = curve.losses if blocks is None else curve.losses[:, blocks]
    return falling(losses.mean(axis=1))
