"""Square norms of data-parallel ranks' gradients at no cost: upstream takes them anyway, to look for NaN.

With ``--check-for-nan-in-loss-and-grad``, which is upstream's default, DDP computes the norm of each bucket just before
it reduces it. That is the gradient of this rank's group. The norm is taken here instead, and upstream is told: its own
loses digits over many millions of numbers on a CPU (:mod:`copus_ext.adapters.noise.squares`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.experts import ReducedExperts
from copus_ext.adapters.noise.overrides import override
from copus_ext.adapters.noise.parameters import Counted, Kind
from copus_ext.adapters.noise.parts import Parts
from copus_ext.adapters.noise.squares import square_norm
from copus_ext.adapters.noise.sums import CLASSES, ExactSums

_WHOLE = (Kind.OWN, Kind.EXPERT)


class BucketNorms:
    """Reads a whole bucket at a time, and by themselves only parameters that lie in parts on several ranks.

    Those are added up in every step: exact, and costly for tied embeddings.
    """

    slices = 1
    needs_grad_norm = True

    def __init__(self, model: Sequence[Any], counted: Sequence[Counted], groups: ProcessGroupCollection) -> None:
        """``counted``: all trainable parameters of the model."""
        self._model = model
        in_parts = [one for one in counted if one.kind not in (*_WHOLE, Kind.DUPLICATE)]
        self.params = [param for param, _ in in_parts]
        self._parts = Parts([kind for _, kind in in_parts], groups)
        self._not_whole = {id(param) for param, kind in counted if kind not in _WHOLE}
        device = counted[0].param.main_grad.device
        self._squares = torch.zeros(CLASSES, dtype=torch.float64, device=device)
        self._reduced_experts = ReducedExperts(model, groups)
        self._sums = ExactSums()
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Be there when buckets are checked, or reduced."""
        self._reduced_experts.attach()
        for chunk in self._model:
            for number, groups in enumerate((chunk.bucket_groups, chunk.expert_parallel_bucket_groups)):
                for group in groups:
                    self._watch(group, number)

    def detach(self) -> None:
        """Be there no longer."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._reduced_experts.detach()

    def begin(self, step: int) -> None:
        """A step begins, whatever its number."""
        self._squares.zero_()
        self._parts.clear()
        self._reduced_experts.square.zero_()

    def read(self, index: int, number: int) -> None:
        """Take in a parameter that lies in parts."""
        self._parts.add(index, number, self.params[index].main_grad)

    def end(self, valid: bool) -> None:
        """Keep the step; as not a number where it is not ``valid``. Collective where gradients lie in parts."""
        dense, experts = self._squares
        self._sums.add(dense + self._parts.squares(), experts, self._reduced_experts.square, valid)

    def reduce(self) -> torch.Tensor:
        """Collective. [steps, 2 (dense, experts), 2]: square sum of the groups, and square of their sum.

        The latter is left 0 for dense parameters: with the experts' it makes up upstream's own gradient norm.
        """
        return self._sums.reduce()

    def _watch(self, group: Any, number: int) -> None:
        """Take in each bucket of a group before it is scaled and reduced; ``number``: 0 for dense, 1 for experts."""
        config = group.ddp_config
        if config.check_for_nan_in_grad or config.check_for_large_grads:
            check_grads = group.check_grads

            def take_then_check(*args: Any, **kwargs: Any) -> None:
                norms = [self._take(bucket, number) for bucket in group.buckets]
                with _told(group.buckets, norms):
                    check_grads(*args, **kwargs)

            self._undo.append(override(group, "check_grads", take_then_check))
            return
        start_grad_sync = group.start_grad_sync

        def take_then_start(*args: Any, **kwargs: Any) -> Any:
            if not (group.is_first_batch and group.grad_reduce_handle is not None):  # else it has started already
                for bucket in group.buckets:
                    self._take(bucket, number)
            return start_grad_sync(*args, **kwargs)

        self._undo.append(override(group, "start_grad_sync", take_then_start))

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
    undo = [override(bucket, "grad_data", _Known(norm)) for bucket, norm in zip(buckets, norms, strict=True)]
    try:
        yield
    finally:
        for take_back in undo:
            take_back()
