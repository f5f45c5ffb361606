"""Random linear sketches of gradients: a few numbers a matrix whose square norm is unbiased for the gradient's.

A gradient G, seen as a matrix, is contracted with random signs s: E |s'G|^2 = |G|^2 over the signs, and since the
sketch is linear, the difference of two sketches of what accumulates is the sketch of what was added between them. So
slices of the accumulation window need no copy of the gradient. (After Alon, Matias and Szegedy 1996, "The space
complexity of approximating the frequency moments", with one sign per row.) All groups of a step share its signs, and so
does the mean gradient: N and S are those of the contracted gradients; no exact norm is compared with a sketched one.

The matrix is not the parameter's own. The gradient of a linear layer has low rank: its rows resemble each other, and a
sum of like rows with random signs has hardly a degree of freedom, however long they are. So the same numbers are cut
into rows of an odd width, each of which begins at another place of the layer's rows, and they are no longer alike
(``tests/unit/test_sketch.py`` has the difference).

A sketched inner product is unbiased as well, but the square of one is not: the signs add to it. Where inner products
are asked for, every gradient is sketched by several independent draws of signs, so that different ones can be
multiplied (:func:`copus_ext.core.noise.step_noise.inner_product_variance`).
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from copus_ext.adapters.noise.inner_products import DRAWS, InnerProducts
from copus_ext.adapters.noise.parameters import Counted, Kind
from copus_ext.adapters.noise.sums import ORDER, FeatureSums, Reduced, lay_out

_KEPT = 6  # vectors of features there are at a time: slices, and steps waiting to be reduced
_LEAST = 128  # numbers in a sketch, where its parameter has as many


class Preconditioner(Protocol):
    """Factors by which gradients are multiplied, element by element, before they are sketched."""

    @property
    def factors(self) -> Sequence[torch.Tensor]:
        """One per parameter, of its shape; the tensors stay the same."""

    def refresh(self, step: int) -> None:
        """A step begins; factors must not depend on its gradients."""


class _Cut(NamedTuple):
    """A parameter as a matrix, and what is left behind its last row. Views: they see what accumulates."""

    rows: torch.Tensor
    rest: torch.Tensor


class _Place(NamedTuple):
    """Of a parameter: what is contracted, with which signs, into which features."""

    gradient: _Cut
    factor: _Cut | None
    signs: torch.Tensor  # [draws, rows]
    features: list[torch.Tensor]  # [draws, width] by slice


class Sketch:
    """Reads gradients as sketches, each about as long as the root of its parameter's size."""

    needs_grad_norm = False

    def __init__(
        self,
        counted: Sequence[Counted],
        groups: ProcessGroupCollection,
        slices: int,
        seed: int = 0,
        preconditioner: Preconditioner | None = None,
        *,
        inner_products: bool = False,
    ) -> None:
        """``seed``: the same on all ranks."""
        draws = DRAWS if inner_products else 1
        self.slices, self._seed, self._preconditioner = slices, seed, preconditioner
        self.params = [param for param, _ in counted]
        device = counted[0].param.main_grad.device
        shapes = [_cut(param.main_grad).rows.shape for param, _ in counted]
        places, spans = lay_out([kind for _, kind in counted], [shape[1] for shape in shapes])
        self._features = torch.zeros(slices, draws, sum(shape[1] for shape in shapes), device=device)
        self._signs = {kind: torch.empty(draws, _signs(counted, shapes, kind), device=device) for kind in ORDER}
        self._random = torch.Generator(device)
        self._places = list(self._views(counted, shapes, places))
        self._sums = InnerProducts(spans, groups) if inner_products else FeatureSums(spans, groups)

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
        rows, rest = place.gradient
        if place.factor is not None:
            rows, rest = rows * place.factor.rows, rest * place.factor.rest
        features = place.features[number]
        torch.mm(place.signs, rows.float(), out=features)
        features[:, : len(rest)] += rest  # its sign does not matter: the others' are random

    def attach(self) -> None:
        """No hooks of its own."""

    def detach(self) -> None:
        """None to take away."""

    def end(self, valid: bool) -> None:
        """Keep the step; as not a number where it is not ``valid``."""
        self._features[1:] -= self._features[:-1].clone()
        features = self._features.flatten(0, 1)
        self._sums.add(features if valid else features * float("nan"))

    def reduce(self) -> Reduced:
        """Collective."""
        return self._sums.reduce()

    def _views(
        self, counted: Sequence[Counted], shapes: Sequence[torch.Size], places: Sequence[slice]
    ) -> Iterator[_Place]:
        before: Counter[Kind] = Counter()
        for index, (param, kind) in enumerate(counted):
            # Signs are shared, each parameter beginning one further on: no two see the same products of signs.
            signs = self._signs[kind][:, before[kind] : before[kind] + shapes[index][0]]
            before[kind] += 1
            factor = None if self._preconditioner is None else _cut(self._preconditioner.factors[index])
            yield _Place(_cut(param.main_grad), factor, signs, [values[:, places[index]] for values in self._features])


def _signs(counted: Sequence[Counted], shapes: Sequence[torch.Size], kind: Kind) -> int:
    """How many signs the parameters of a kind need, each beginning one further on than the one before."""
    rows = [shape[0] for shape, (_, its_kind) in zip(shapes, counted, strict=True) if its_kind is kind]
    return max(rows, default=0) + len(rows)


def _cut(tensor: torch.Tensor) -> _Cut:
    """Rows of the odd width for which signs and kept features together take about the least memory."""
    size = tensor.numel()
    width = min(size, max(_LEAST, math.isqrt(size // _KEPT)) | 1)
    whole = size - size % width
    flat = tensor.view(-1)
    return _Cut(flat[:whole].view(-1, width), flat[whole:])
