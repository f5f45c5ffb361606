"""N, S, P of every step of a Megatron-Core model: hooks that read gradients, one small reduction every few steps.

::

    noise = GradientNoise(model, optimizer, groups, micro_batch_size=2, num_microbatches=8)
    with noise:
        ...                                    # zero_grad_buffer, forward and backward, optimizer.step
        estimates = noise.step(grad_norm)      # of the steps since the last reduction; mostly none
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.adam import AdamFactors
from copus_ext.adapters.noise.bucket_norms import BucketNorms
from copus_ext.adapters.noise.norm_layers import NormLayers
from copus_ext.adapters.noise.overrides import override
from copus_ext.adapters.noise.parameters import Counted, Kind, counted_parameters, holds_tied_embeddings
from copus_ext.adapters.noise.sketch import Sketch
from copus_ext.adapters.noise.square_norms import SquareNorms
from copus_ext.adapters.noise.sums import Reduced
from copus_ext.adapters.noise.taps import GradientTaps
from copus_ext.core.noise.grouping import (
    ADAM,
    AUTO,
    DP_GROUPS,
    LAYERNORM,
    MIN_GROUPS,
    SKETCH,
    Grouping,
    StepShape,
    grouping_of,
    why_unmeasurable,
    with_inner_products,
)
from copus_ext.core.noise.step_noise import StepEstimate, inner_product_variance, step_estimate

if TYPE_CHECKING:  # jobs know megatron.training, which a training loop of one's own does without
    from copus_ext.adapters.job import Job

_STEPS_BETWEEN_REDUCTIONS = 4


class Collector(Protocol):
    """Reads the gradients of a step's groups, and adds up their squares over all ranks."""

    slices: int
    params: list[Any]  # whose accumulated gradients are to be read
    needs_grad_norm: bool  # the square of the dense parameters' sum is to come from upstream's gradient norm

    def attach(self) -> None:
        """Hooks of its own."""

    def detach(self) -> None:
        """Take them away."""

    def begin(self, step: int) -> None:
        """A forward-backward pass begins; it may be the second one of a step."""

    def read(self, index: int, number: int) -> None:
        """Parameter ``index`` holds in ``main_grad`` what was accumulated up to the end of slice ``number``."""

    def end(self, valid: bool) -> None:
        """The step has been taken: keep it; as not a number where ``valid`` is false."""

    def reduce(self) -> Reduced:
        """Collective. Of the steps kept since the last time."""


class _Step(NamedTuple):
    """What turns sums of accumulated gradients into those of the mean loss, and upstream's norm of that."""

    scale: float | torch.Tensor
    grad_norm: float | None


class GradientNoise:
    """Reads a model's gradients between :meth:`attach` and :meth:`detach`, or inside a ``with`` block.

    One object serves steps of one shape; after a change of batch size or layout make another.
    """

    def __init__(
        self,
        model: Sequence[Any],
        optimizer: Any,
        groups: ProcessGroupCollection,
        *,
        micro_batch_size: int,
        num_microbatches: int,
        estimator: str = AUTO,
        min_groups: int = MIN_GROUPS,
        first_step: int = 0,
        seed: int = 0,
        inner_products: bool = False,
    ) -> None:
        """With ``estimator="adam"`` second moments are gathered by all ranks together when a step begins, every 16.

        Args:
            model: DDP-wrapped chunks of this rank.
            optimizer: Megatron-Core's, for the loss scale and Adam's second moments.
            groups: the process groups that the model was built with.
            micro_batch_size: sequences in a micro-batch.
            num_microbatches: micro-batches that each data-parallel rank accumulates in a step.
            estimator: one of :data:`copus_ext.core.noise.grouping.ESTIMATORS`.
            min_groups: cut accumulation windows into slices until a step has so many groups, if it can be.
            first_step: number of the next step. Sketches of a step depend on it and on ``seed`` alone.
            seed: of the sketches; the same on all ranks.
            inner_products: measure P, too. Then ``auto`` is the sketch, and gradients are sketched more than once.

        Raises:
            ValueError: such steps can't be measured, and why; or this estimator can't measure P.
        """
        estimator = with_inner_products(estimator) if inner_products else estimator
        shape = StepShape(
            dp=groups.dp.size(),
            edp=groups.expt_dp.size(),
            cp=groups.cp.size(),
            ep=groups.ep.size(),
            micro_batch=micro_batch_size,
            num_microbatches=num_microbatches,
            tied=holds_tied_embeddings(model, groups),
        )
        if reason := why_unmeasurable(shape, estimator) or _why_experts_are_not(model, groups):
            raise ValueError(reason)
        self.grouping: Grouping = grouping_of(shape, estimator, min_groups)
        self.batch = shape.dp * micro_batch_size * num_microbatches
        self._model, self._optimizer, self._step = model, optimizer, first_step
        self._ranks = groups.dp_cp.size()  # that a gradient is averaged over
        self.collector = self._make_collector(counted_parameters(model, groups), groups, shape, seed, inner_products)
        self._taps = GradientTaps(model, self.collector.params, self.collector, num_microbatches, _weakly(self._begin))
        self._steps: list[_Step] = []
        self._loss_scale = 1.0
        self._per_token_scale: float | torch.Tensor | None = None
        self._undo = contextlib.ExitStack()

    @staticmethod
    def of_job(job: Job, estimator: str = AUTO, **options: Any) -> GradientNoise:
        """For the steps of a job under its plan; ``options`` as for the constructor."""
        return GradientNoise(
            job.model,
            job.optimizer,
            job.groups,
            micro_batch_size=job.plan.micro_batch,
            num_microbatches=job.plan.num_microbatches,
            estimator=estimator,
            **{"first_step": job.args.iteration, **options},
        )

    def attach(self) -> GradientNoise:
        """Start reading. The model must not have a step under way."""
        self._wrap_scaling(self._model[0])
        self.collector.attach()
        self._taps.attach()
        return self

    def detach(self) -> None:
        """Stop reading and leave the model as it was."""
        self._taps.detach()
        self.collector.detach()
        self._undo.close()

    def __enter__(self) -> GradientNoise:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def step(self, grad_norm: float | None) -> list[StepEstimate]:
        """A step has been taken. Collective over all ranks in every fourth call.

        Args:
            grad_norm: upstream's norm of the averaged gradient before clipping; ``None`` where the step was skipped.

        Returns:
            Estimates of this step and those before it, in order, when they have been added up; else none.
        """
        self.collector.end(self._taps.complete())
        scale = 1.0 / self._ranks if self._per_token_scale is None else self._per_token_scale
        self._steps.append(_Step(scale / self._loss_scale, grad_norm))
        self._step += 1
        return self.flush() if len(self._steps) == _STEPS_BETWEEN_REDUCTIONS else []

    def flush(self) -> list[StepEstimate]:
        """Estimates of the steps that have not been told yet. Collective over all ranks.

        Per sequence, for the mean loss per token; not finite where a gradient was not.
        """
        if not self._steps:
            return []
        squares, products = self.collector.reduce()
        estimates = [self._estimate(step, *sums) for step, sums in zip(self._steps, squares.tolist(), strict=True)]
        if products is not None:
            told = zip(self._steps, estimates, products.cpu().numpy(), strict=True)
            estimates = [one._replace(P=self._variance(step, of_step)) for step, one, of_step in told]
        self._steps.clear()
        return estimates

    def _variance(self, step: _Step, products: Any) -> float:
        """P from [draws, groups] products of what the groups add to the mean gradient with that."""
        groups = products.shape[1]
        return inner_product_variance(float(step.scale) ** 2 * groups * products, self.batch / groups)

    def _estimate(self, step: _Step, dense: list[float], experts: list[float]) -> StepEstimate:
        """Dense parameters and experts have groups of their own; squares of both add up."""
        scale = float(step.scale) ** 2
        mean_square = scale * dense[1]
        if self.collector.needs_grad_norm:
            norm = float("nan") if step.grad_norm is None else step.grad_norm
            mean_square = norm**2 - scale * experts[1]
        parts = [self._part(self.grouping.dense_groups, scale * dense[0], mean_square)]
        parts.append(self._part(self.grouping.expert_groups, scale * experts[0], scale * experts[1]))
        return StepEstimate(sum(part.N for part in parts), sum(part.S for part in parts))

    def _part(self, groups: int, square_sum: float, mean_square: float) -> StepEstimate:
        """``square_sum``: of what the groups add to the mean gradient, each a ``groups``-th of its own mean."""
        return step_estimate([square_sum * groups] * groups, [self.batch / groups] * groups, mean_square)

    def _make_collector(
        self,
        counted: Sequence[Counted],
        groups: ProcessGroupCollection,
        shape: StepShape,
        seed: int,
        inner_products: bool,
    ) -> Collector:
        kind, slices = self.grouping.estimator, self.grouping.slices
        if kind == DP_GROUPS:
            return BucketNorms(self._model, counted, groups)
        counted = [one for one in counted if one.kind is not Kind.DUPLICATE]
        if kind == LAYERNORM:
            return NormLayers(self._model, counted, groups, shape.micro_batch * shape.num_microbatches)
        if kind in (SKETCH, ADAM):
            factors = AdamFactors(counted, self._optimizer, groups) if kind == ADAM else None
            return Sketch(counted, groups, slices, seed, factors, inner_products=inner_products)
        return SquareNorms(self._model, counted, groups, slices)

    def _begin(self) -> None:
        config = self._model[0].config
        # Now: the optimizer may change it before the step is told of.
        self._loss_scale = float(self._optimizer.get_loss_scale()) if config.fp16 else 1.0
        self._per_token_scale = None
        self.collector.begin(self._step)

    def _wrap_scaling(self, chunk: Any) -> None:
        """With ``--calculate-per-token-loss`` gradients are sums until upstream divides by the number of tokens."""
        scale_gradients = chunk.scale_gradients

        def scale_and_tell(factor: Any) -> None:
            scale_gradients(factor)
            self._per_token_scale = factor.clone() if isinstance(factor, torch.Tensor) else factor

        self._undo.callback(override(chunk, "scale_gradients", scale_and_tell))


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """A call that does not keep the object alive: collectors that are done with free their memory at once."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        if alive := reference():
            alive()

    return call


def _why_experts_are_not(model: Sequence[Any], groups: ProcessGroupCollection) -> str | None:
    """Why experts that are spread in other ways than by expert parallelism can't be measured."""
    if not any(chunk.expert_parallel_bucket_groups for chunk in model):
        return None
    if groups.expt_tp.size() != groups.tp.size():
        return "the noise scale can't be measured: experts' tensor parallel size is another than that of the layers"
    if model[0].ddp_config.num_distributed_optimizer_instances > 1:
        return "the noise scale can't be measured: experts with several distributed optimizer instances"
    return None
