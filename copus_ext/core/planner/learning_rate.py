"""What a change of the batch size does to the learning rate."""

from __future__ import annotations

import math

from copus_ext.core.errors import UserError

ADASCALE = "adascale"
LR_RULES = ("sqrt", "linear", ADASCALE, "none")
_SGD = "sgd"


def learning_rate_factor(
    rule: str, batch: int, base_batch: int, noise_scale: float = math.inf, optimizer: str = "adam"
) -> float:
    """Factor on the learning rate that was chosen for ``base_batch``, both batches in sequences.

    ``sqrt``: for Adam, noise of the update kept equal (Malladi et al. 2022, arXiv 2205.10287). ``linear``: for SGD
    (Goyal et al. 2017, arXiv 1706.02677). ``adascale``: :func:`adascale_gain` for SGD (Johnson et al. 2020, arXiv
    2007.05105), and its square root for Adam and what else divides an update by its own size, as AdaptDL's AdamScale
    has it (github.com/petuum/adaptdl); there is no derivation of that known to us beyond its limits, which are those
    of ``sqrt`` and of a batch that does not matter. ``none``: 1.

    Args:
        rule: one of :data:`LR_RULES`.
        batch: that steps are made with.
        base_batch: that the learning rate was chosen for.
        noise_scale: tr(Sigma) / |G|^2, in sequences; ``inf`` where it is not known, which makes ``adascale`` equal to
            ``linear`` for SGD and to ``sqrt`` for others. Only ``adascale`` looks at it.
        optimizer: upstream's name. Only ``adascale`` looks at it.

    Raises:
        UserError: a rule that does not exist.
        ValueError: a noise scale below 0, or none at all.
    """
    if rule not in LR_RULES:
        raise UserError(f"--copus-lr-rule {rule}: there is no such rule; choose one of {', '.join(LR_RULES)}")
    if rule == "none":
        return 1.0
    gain = adascale_gain(batch, base_batch, noise_scale if rule == ADASCALE else math.inf)
    linear = rule == "linear" or (rule == ADASCALE and optimizer == _SGD)
    return gain if linear else math.sqrt(gain)


def adascale_gain(batch: int, base_batch: int, noise_scale: float) -> float:
    """How many steps of ``base_batch`` one step of ``batch`` is worth: (n / base_batch + 1) / (n / batch + 1).

    Between 1, where there is no noise, and ``batch / base_batch``, where there is nothing else. It is the gain
    (sigma^2 + mu^2) / (sigma^2 / S + mu^2) of Johnson et al. 2020 (arXiv 2007.05105), there with sigma^2 the variance
    of the gradient of ``base_batch`` sequences, mu its mean and S = batch / base_batch: n = base_batch sigma^2 / mu^2.

    Raises:
        ValueError: a noise scale below 0, or ``nan``.
    """
    if not noise_scale >= 0:
        raise ValueError(f"a noise scale of {noise_scale} sequences can't be")
    if math.isinf(noise_scale):
        return batch / base_batch
    return (noise_scale / base_batch + 1) / (noise_scale / batch + 1)
