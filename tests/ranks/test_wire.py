"""What is sent arrives, over every wire, and one is found that all ranks have."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest

from tests.ranks.harness import run_ranks

_SIZES = (1, 3, 5000, 700_000)


def _carried() -> dict[str, Any]:
    """Tensors between all ranks but from and to rank 3, which has nothing; twice, with what was sent overwritten."""
    import torch
    import torch.distributed as dist

    from copus_ext.adapters.agreement import largest
    from copus_ext.adapters.wire import Parcel, TorchWire, open_wire

    rank, world = dist.get_rank(), dist.get_world_size()
    peers = [peer for peer in reversed(range(world)) if rank != 3 and peer not in (3, rank)]
    wrong, meanwhile = 0, []
    wires = open_wire(torch.device("cpu")), TorchWire()
    for number, wire in enumerate((*wires, *wires)):
        sent = [Parcel(peer, torch.full((n,), 100.0 * rank + peer + number)) for peer in peers for n in _SIZES]
        received = [Parcel(peer, torch.zeros(n)) for n in _SIZES for peer in peers]
        wire.carry(sent, received, lambda: meanwhile.append(1))
        assert largest(rank) == world - 1  # all have come here, so what was sent has arrived
        for parcel in sent:
            parcel.tensor.zero_()
        wrong += sum(bool((tensor != 100.0 * peer + rank + number).any()) for peer, tensor in received)
    return {"wires": [wire.name for wire in wires], "wrong": wrong, "meanwhile": len(meanwhile)}


def test_what_is_sent_arrives_over_every_wire() -> None:
    for result in run_ranks(4, _carried):
        assert (result["wrong"], result["meanwhile"]) == (0, 4)
        if result["wires"] != ["memory", "torch"]:
            pytest.skip("this system does not let processes read each other's memory")


def _opened() -> list[str]:
    import torch
    import torch.distributed as dist

    from copus_ext.adapters import wire as module

    names = [module.open_wire(torch.device("meta")).name]
    forbidden = mock.patch.object(module.MemoryWire, "read", side_effect=PermissionError("by the sandbox"))
    wrong = mock.patch.object(module.MemoryWire, "read", lambda self, peer, address, into: into.fill_(1))
    missing = mock.patch.object(module.ctypes, "CDLL", side_effect=OSError("another system"))
    for fault in (forbidden, wrong, missing):
        with fault if dist.get_rank() == 1 else contextlib.nullcontext():
            names.append(module.open_wire(torch.device("cpu")).name)
    return names


def test_messages_are_sent_where_one_rank_may_not_read_another() -> None:
    assert run_ranks(2, _opened) == [["torch"] * 4] * 2
