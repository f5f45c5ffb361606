"""Square norms of data-parallel ranks' gradients at no cost: upstream takes them anyway, to look for NaN.

With ``--check-for-nan-in-loss-and-grad``, which is upstream's default, DDP computes the norm of each bucket just before
it reduces it. That is the gradient of this rank's group. The norm is taken here instead, and upstream is told: its own
loses digits over many millions of numbers on a CPU (:mod:`copus_ext.adapters.noise.squares`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.exact_sums import ExactSums
from copus_ext.adapters.noise.overrides import override
from copus_ext.adapters.noise.parameters import IN_PARTS, WHOLE, Counted
from copus_ext.adapters.noise.squares import square_norm
from copus_ext.adapters.noise.sums import CLASSES, Reduced
from copus_ext.adapters.noise.taps import before_reduction


class BucketNorms:
    """Reads a whole bucket at a time, and by themselves only parameters that lie in parts on several ranks.

    Those are added up in every step: exact, and costly for tied embeddings.
    """

    slices = 1
    needs_grad_norm = True

    def __init__(self, model: Sequence[Any], counted: Sequence[Counted], groups: ProcessGroupCollection) -> None:
        """``counted``: all trainable parameters of the model."""
        self._model = model
        in_parts = [one for one in counted if one.kind in IN_PARTS]
        self.params = [param for param, _ in in_parts]
        self._not_whole = {id(param) for param, kind in counted if kind not in WHOLE}
        device = counted[0].param.main_grad.device
        self._squares = torch.zeros(CLASSES, dtype=torch.float64, device=device)
        self._sums = ExactSums(model, [kind for _, kind in in_parts], groups)
        self._undo = contextlib.ExitStack()

    def attach(self) -> None:
        """Be there when buckets are checked, or reduced."""
        self._sums.attach()
        for chunk in self._model:
            for number, groups in enumerate((chunk.bucket_groups, chunk.expert_parallel_bucket_groups)):
                for group in groups:
                    self._watch(group, number)

    def detach(self) -> None:
        """Be there no longer."""
        self._undo.close()
        self._sums.detach()

    def begin(self, step: int) -> None:
        """A step begins, whatever its number."""
        self._squares.zero_()
        self._sums.begin()

    def read(self, index: int, number: int) -> None:
        """Take in a parameter that lies in parts."""
        self._sums.add_part(index, number, self.params[index].main_grad)

    def end(self, valid: bool) -> None:
        """Keep the step; as not a number where it is not ``valid``. Collective where gradients lie in parts."""
        dense, experts = self._squares
        self._sums.end(dense, experts, valid)

    def reduce(self) -> Reduced:
        """Collective; as of :meth:`ExactSums.reduce`."""
        return self._sums.reduce()

    def _watch(self, group: Any, number: int) -> None:
        """Take in each bucket of a group before it is scaled and reduced; ``number``: 0 for dense, 1 for experts."""
        config = group.ddp_config
        if config.check_for_nan_in_grad or config.check_for_large_grads:
            check_grads = group.check_grads

            def take_then_check(*args: Any, **kwargs: Any) -> None:
                with _told(group.buckets, self._take_all(group.buckets, number)):
                    check_grads(*args, **kwargs)

            self._undo.callback(override(group, "check_grads", take_then_check))
        else:
            self._undo.callback(before_reduction(group, partial(self._take_all, group.buckets, number)))

    def _take_all(self, buckets: Sequence[Any], number: int) -> list[torch.Tensor]:
        return [self._take(bucket, number) for bucket in buckets]

    def _take(self, bucket: Any, number: int) -> torch.Tensor:
        """Take in a bucket without what is counted elsewhere; its norm as a whole."""
        square = square_norm(bucket.grad_data)
        elsewhere = [square_norm(param.main_grad) for param in bucket.params_list if id(param) in self._not_whole]
        self._squares[number] += square - sum(elsewhere)
        return square.sqrt().float()


class _Known:
    """Stands for a bucket's gradients while upstream asks for their norm, and for nothing else."""

    def __init__(self, norm: torch.Tensor) -> None:
        self._norm = norm

    def norm(self, p: int) -> torch.Tensor:
        """The Euclidean one."""
        assert p == 2
        return self._norm


@contextlib.contextmanager
def _told(buckets: Sequence[Any], norms: Sequence[torch.Tensor]) -> Iterator[None]:
    """Have upstream's check find the norms that are known."""
    with contextlib.ExitStack() as undo:
        for bucket, norm in zip(buckets, norms, strict=True):
            undo.callback(override(bucket, "grad_data", _Known(norm)))
        yield
