"""Gradients and series with a noise scale that is known, for the tests."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from copus_ext.core.noise.noise_scale import step_estimate

# A gradient of five numbers: its mean, and the variances of one sequence's.
MEAN = np.array([0.5, -0.3, 0.2, 0.0, 0.1])
VARIANCES = np.array([4.0, 2.0, 1.0, 0.5, 0.25])
TRUE_N = float(MEAN @ MEAN)
TRUE_S = float(VARIANCES.sum())


def draw_steps(batches: list[int], draws: int, seed: int = 0) -> np.ndarray:
    """[draws, 2] N and S of steps with groups of these sizes."""
    rng = np.random.default_rng(seed)
    sizes = np.array(batches, dtype=float)
    noise = rng.standard_normal((draws, len(batches), MEAN.size)) * np.sqrt(VARIANCES / sizes[:, None])
    groups = MEAN + noise
    whole = np.einsum("j,djk->dk", sizes / sizes.sum(), groups)
    norms, whole_norms = (groups**2).sum(-1), (whole**2).sum(-1)
    return np.array([step_estimate(norms[d], batches, whole_norms[d])[:2] for d in range(draws)])


def autocorrelated(rng: np.random.Generator, shape: tuple[int, ...], memory: float) -> np.ndarray:
    """[shape] AR(1) noise of unit variance, with time along the first axis."""
    noise = rng.standard_normal(shape)
    for before, after in pairwise(noise):
        after *= math.sqrt(1 - memory**2)
        after += memory * before
    return noise
