"""Gradients of single sequences, of the weights of normalisation layers only.

They cost next to nothing: a norm's weight enters each token by a product, so the gradient of one sequence is a sum over
its tokens of what backward has at hand anyway (Gray et al. 2024, "Normalization Layer Per-Example Gradients are
Sufficient to Predict Gradient Noise Scale in Transformers", arXiv 2411.00999). Every sequence is a group. But the noise
scale of these weights is not the model's: it has to be corrected by a full measurement now and then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import functional

from copus_ext.adapters.noise.parameters import Counted, Kind
from copus_ext.adapters.noise.sums import FeatureSums, Reduced, lay_out


class _Norm(NamedTuple):
    """A layer, and where its weight's and bias's gradients lie in a feature vector; ``None``: not counted here."""

    module: torch.nn.Module
    weight: slice | None
    bias: slice | None


class NormLayers:
    """Reads each sequence's gradient of norm weights and biases. Memory: sequences of this rank x norm parameters."""

    slices = 1
    needs_grad_norm = False

    def __init__(
        self, model: Sequence[Any], counted: Sequence[Counted], groups: ProcessGroupCollection, sequences: int
    ) -> None:
        """``sequences``: that this rank sees in a step.

        Raises:
            ValueError: no norm stands by itself in this model (Transformer Engine fuses them with linear layers).
        """
        self.params: list[Any] = []  # of which accumulated gradients are read: none
        modules = [m for chunk in model for m in chunk.module.modules() if is_norm(m)]
        of_norms = {id(p) for m in modules for p in m.parameters(recurse=False)}
        mine = [one for one in counted if id(one.param) in of_norms]
        if not modules:
            raise ValueError("--copus-gns-estimator layernorm: this model has no norm layer of its own; use sketch")
        slices, spans = lay_out([kind for _, kind in mine], [param.numel() for param, _ in mine])
        places = {id(param): place for (param, _), place in zip(mine, slices, strict=True)}
        self._norms = [_Norm(m, places.get(id(m.weight)), places.get(id(getattr(m, "bias", None)))) for m in modules]
        device = next(modules[0].parameters()).device
        self._features = torch.zeros(sequences, spans[Kind.TIED].stop, device=device)
        self._sums = FeatureSums(spans, groups)
        self._sequences: dict[torch.nn.Module, int] = {}  # whose backward has passed this layer in this step
        self._undo = contextlib.ExitStack()

    def attach(self) -> None:
        """Hook the layers."""
        for norm in self._norms:
            self._undo.callback(norm.module.register_forward_hook(self._watch(norm)).remove)

    def detach(self) -> None:
        """Let them go."""
        self._undo.close()

    def begin(self, step: int) -> None:
        """A step begins, whatever its number."""
        self._sequences.clear()
        self._features.zero_()

    def read(self, index: int, number: int) -> None:
        """Nothing is read of accumulated gradients."""

    def end(self, valid: bool) -> None:
        """Keep the step."""
        whole = all(count == len(self._features) for count in self._sequences.values())
        self._sums.add(self._features if valid and whole else self._features * float("nan"))

    def reduce(self) -> Reduced:
        """Collective."""
        return self._sums.reduce()

    def _watch(self, norm: _Norm) -> Callable[..., None]:
        def after_forward(_: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.requires_grad:  # not evaluation, not before a recompute
                hidden = inputs[0].detach()
                output.register_hook(lambda gradient: self.take(norm, hidden, gradient))

        return after_forward

    @torch.no_grad()
    def take(self, norm: _Norm, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        """[tokens, micro-batch, (heads,) hidden] before the norm, and the gradient behind it."""
        first = self._sequences.get(norm.module, 0)
        count = gradient.shape[1]
        self._sequences[norm.module] = first + count
        if norm.weight is not None:
            self._features[first : first + count, norm.weight] = _per_sequence(
                gradient.float() * _normalised(norm.module, hidden.float())
            )
        if norm.bias is not None:
            self._features[first : first + count, norm.bias] = _per_sequence(gradient.float())


def is_norm(module: torch.nn.Module) -> bool:
    """Whether a module is a normalisation layer by itself, with a weight that is trained."""
    weight = getattr(module, "weight", None)
    trainable = isinstance(weight, torch.nn.Parameter) and weight.dim() == 1 and weight.requires_grad
    return trainable and type(module).__name__.endswith("Norm")


def _normalised(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    if "RMS" in type(module).__name__:
        return functional.rms_norm(hidden, hidden.shape[-1:], eps=module.eps)
    return functional.layer_norm(hidden, hidden.shape[-1:], eps=module.eps)


def _per_sequence(values: torch.Tensor) -> torch.Tensor:
    """[tokens, micro-batch, ..., hidden] summed to [micro-batch, hidden]."""
    return values.sum(dim=[0, *range(2, values.dim() - 1)])
