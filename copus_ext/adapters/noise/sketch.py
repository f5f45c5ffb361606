"""Random linear sketches of gradients: a few numbers a matrix whose square norm is unbiased for the gradient's.

A matrix G is contracted with random signs along one side: E |s'G|^2 = |G|^2 over the signs s, and since the sketch is
linear, the difference of two sketches of what accumulates is the sketch of what was added between them. So slices of
the accumulation window need no copy of the gradient. (After Alon, Matias and Szegedy 1996, "The space complexity of
approximating the frequency moments", with one sign per row.) All groups of a step share its signs, and so does the
mean gradient: N and S are those of the contracted gradients, and no exact norm is compared with a sketched one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.parameters import Counted
from copus_ext.adapters.noise.sums import ORDER, FeatureSums

_LEAST = 64  # numbers in a sketch, where its parameter has as many


class Preconditioner(Protocol):
    """Factors by which gradients are multiplied, element by element, before they are sketched."""

    @property
    def factors(self) -> Sequence[torch.Tensor]:
        """One per parameter, of its shape; the tensors stay the same."""

    def refresh(self, step: int) -> None:
        """A step begins; factors must not depend on its gradients."""


class _Place(NamedTuple):
    """Of a parameter: the matrix that is contracted along its first axis, with which signs, into which features."""

    matrix: torch.Tensor
    factor: torch.Tensor | None
    signs: torch.Tensor
    features: list[torch.Tensor]  # by slice


class Sketch:
    """Reads gradients as sketches of a few numbers for each row or column, whichever are fewer."""

    needs_grad_norm = False

    def __init__(
        self,
        counted: Sequence[Counted],
        groups: ProcessGroupCollection,
        slices: int,
        seed: int = 0,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        """``seed``: the same on all ranks."""
        self.slices, self._seed, self._preconditioner = slices, seed, preconditioner
        device = counted[0].param.main_grad.device
        shapes = [_matrix(param.main_grad).shape for param, _ in counted]
        ends = _spans(counted, [shape[1] for shape in shapes])
        self._features = torch.zeros(slices, ends[-1].stop, device=device)
        self._signs = {
            kind: torch.empty(sum(shapes[i][0] for i, c in enumerate(counted) if c.kind is kind), device=device)
            for kind in ORDER
        }
        self._random = torch.Generator(device)
        self._places = dict(self._lay_out(counted, shapes, ends))
        self._sums = FeatureSums(dict(zip(ORDER, ends, strict=True)), groups)

    def begin(self, step: int) -> None:
        """Draw the signs of a step: the same for the same step, whatever came before it."""
        for number, signs in enumerate(self._signs.values()):
            # By kind, since ranks that share a tied embedding have it in common and nothing else.
            # Of a seed, torch's CPU generator takes 32 bits.
            self._random.manual_seed(zlib.crc32(f"{self._seed} {step} {number}".encode()))
            signs.random_(0, 2, generator=self._random).mul_(2).sub_(1)
        self._features.zero_()
        if self._preconditioner is not None:
            self._preconditioner.refresh(step)

    def read(self, index: int, number: int) -> None:
        """Sketch what parameter ``index`` has accumulated up to the end of slice ``number``."""
        place = self._places[index]
        matrix = place.matrix if place.factor is None else place.matrix * place.factor
        if matrix.dtype != torch.float32:
            matrix = matrix.float()
        torch.mv(matrix.t(), place.signs, out=place.features[number])

    def attach(self) -> None:
        """No hooks of its own."""

    def detach(self) -> None:
        """None to take away."""

    def end(self, valid: bool) -> None:
        """Keep the step; as not a number where it is not ``valid``."""
        self._features[1:] -= self._features[:-1].clone()
        self._sums.add(self._features if valid else self._features * float("nan"))

    def clear(self) -> None:
        """Forget the steps kept."""
        self._sums.clear()

    def reduce(self) -> torch.Tensor:
        """Collective. [steps, 2 (dense, experts), 2]: square sum of the groups, and square of their sum."""
        return self._sums.reduce()

    def _lay_out(
        self, counted: Sequence[Counted], shapes: Sequence[torch.Size], ends: Sequence[slice]
    ) -> Iterator[tuple[int, _Place]]:
        for kind, span in zip(ORDER, ends, strict=True):
            sign, feature = 0, span.start
            for index, (param, its_kind) in enumerate(counted):
                if its_kind is not kind:
                    continue
                rows, columns = shapes[index]
                signs = self._signs[kind][sign : sign + rows]
                features = [values[feature : feature + columns] for values in self._features]
                factor = None if self._preconditioner is None else _matrix(self._preconditioner.factors[index])
                yield index, _Place(_matrix(param.main_grad), factor, signs, features)
                sign, feature = sign + rows, feature + columns


def _spans(counted: Sequence[Counted], lengths: Sequence[int]) -> list[slice]:
    """Where the features of each kind lie, in :data:`ORDER`."""
    spans, start = [], 0
    for kind in ORDER:
        stop = start + sum(length for (_, its), length in zip(counted, lengths, strict=True) if its is kind)
        spans.append(slice(start, stop))
        start = stop
    return spans


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """A view [rows, columns] with few columns, but not too few: what is left when rows are contracted."""
    if tensor.dim() < 2:
        columns = _LEAST if tensor.numel() % _LEAST == 0 else tensor.numel()
        return tensor.view(-1, columns)
    matrix = tensor.view(tensor.shape[0], -1)
    rows, columns = matrix.shape
    few, many = min(rows, columns), max(rows, columns)
    return matrix if columns == (few if few >= _LEAST else many) else matrix.t()
