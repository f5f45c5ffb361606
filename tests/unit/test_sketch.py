"""What a sketch of a gradient is worth: how its square scatters about the gradient's."""

from __future__ import annotations

import pytest
import torch

from copus_ext.adapters.noise.sketch import _cut
from copus_ext.adapters.noise.squares import square_norm

DRAWS = 2000


def relative_squares(rows: torch.Tensor, rest: torch.Tensor, seed: int) -> torch.Tensor:
    """[DRAWS] square norm of a sketch over that of what is sketched."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (DRAWS, rows.shape[0]), generator=random).float() * 2 - 1
    features = signs @ rows
    features[:, : len(rest)] += rest
    return features.square().sum(1) / (rows.square().sum() + rest.square().sum())


@pytest.mark.parametrize("shape", [(512, 256), (384, 128), (96,), (7, 33), (128, 64, 3), (1,)])
def test_its_square_is_unbiased(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    squares = relative_squares(*_cut(gradient), seed=2)
    error = float(squares.std()) / DRAWS**0.5
    assert abs(float(squares.mean()) - 1.0) < max(4 * error, 1e-5)


def test_rows_that_are_alike_do_not_spoil_it() -> None:
    """A gradient of rank one: along its own rows a sketch is one random number squared, of relative variance 2."""
    random = torch.Generator().manual_seed(3)
    gradient = torch.outer(torch.randn(512, generator=random), torch.randn(256, generator=random))
    along_rows = relative_squares(gradient, gradient[:0, 0], seed=4)
    cut = relative_squares(*_cut(gradient), seed=4)
    assert float(along_rows.var()) == pytest.approx(2.0, rel=0.2)
    assert float(cut.var()) < 2.0 / 50


def test_it_is_short() -> None:
    for shape in ((8192, 4096), (512, 1408), (2048, 2048)):
        rows, rest = _cut(torch.empty(shape, device="meta"))
        assert rows.shape[0] + rows.shape[1] < 7 * (shape[0] * shape[1]) ** 0.5
        assert rows.shape[1] % 2 == 1
        assert rows.numel() + rest.numel() == shape[0] * shape[1]


def test_square_norms_of_many_millions_of_numbers_keep_their_digits() -> None:
    values = torch.full((3 * 2**23 + 5,), 1e-3)
    values[::2] *= -1.0
    exact = 1e-6 * values.numel()
    assert float(square_norm(values)) == pytest.approx(exact, rel=1e-5)
    assert float(square_norm(values.bfloat16())) == pytest.approx(exact, rel=1e-2)
    assert float(square_norm(values[:0])) == 0.0
