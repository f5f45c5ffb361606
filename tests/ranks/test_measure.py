"""Measuring the machine tells something of it, the same on every rank, and leaves no trace in the run."""

from __future__ import annotations

from typing import Any

from copus_ext.core.cost.hardware import shared_cpu
from tests.ranks.harness import run_ranks


def measured() -> tuple[Any, bool]:
    """The figures, and whether the generator that training draws from was left where it was."""
    import torch

    from copus_ext.adapters.measure import measure_shared_cpu

    before = torch.get_rng_state()
    hardware = measure_shared_cpu(shared_cpu(cores=2, ranks=2, memory_bytes=8e9))
    return hardware, torch.equal(before, torch.get_rng_state())


def test_measuring_agrees_on_all_ranks_and_draws_no_random_numbers() -> None:
    figures = run_ranks(2, measured)
    assert figures[0][0] == figures[1][0]
    assert figures[0][0] != shared_cpu(cores=2, ranks=2, memory_bytes=8e9)
    assert [untouched for _, untouched in figures] == [True, True]
