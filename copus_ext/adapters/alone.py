"""torch's collectives and messages, carried out by this rank alone: nothing is sent, and nobody is waited for.

All of them end in a method of the process group, under whatever name they were imported. So it is these that are
replaced, which also covers coalesced and batched ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

# What in a method's name says that it needs other ranks.
_TALK = "reduce gather scatter all_to alltoall broadcast send recv barrier split_group merge_remote coalescing".split()


class Done:
    """In place of the handle of an operation under way: it has ended."""

    def wait(self, *_: Any) -> bool:
        """At once."""
        return True

    is_completed = is_success = synchronize = block_current_stream = wait


_DONE = Done()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In the block, what ranks do together is done as if all of them gave what this one gives.

    Sums leave tensors as they are, gathering repeats what was given, scattering and exchanging take a part of it.
    What is received from one rank is random numbers of variance 1 (integers: 0), drawn from torch's generator.
    Sizes that ranks tell each other are thereby those of equal ranks. Process groups still say who belongs to them.

    The replacement is for the whole process: no other thread may use torch.distributed meanwhile.

    Raises:
        RuntimeError: inside, by an operation that is none of these, such as making a group.
    """
    found = {name: method for name, method in vars(dist.ProcessGroup).items() if any(word in name for word in _TALK)}
    try:
        for name in found:
            setattr(dist.ProcessGroup, name, _METHODS.get(name) or partial(_refuse, name))
        yield
    finally:
        for name, method in found.items():  # from the class's dictionary: an attribute would no longer be a method
            setattr(dist.ProcessGroup, name, method)


def _refuse(name: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(f"{name} of a process group can't be done by one rank alone")


def _leave(*_: Any, **__: Any) -> Done:
    """Of a sum, a broadcast, or what is sent."""
    return _DONE


def _fill_each(_: Any, outputs: Any, inputs: Any, *__: Any, **___: Any) -> Done:
    for output, given in zip(_listed(outputs), _listed(inputs), strict=True):
        _fill(output, given)
    return _DONE


def _fill_lists(_: Any, outputs: Sequence[Iterable[torch.Tensor]], inputs: Iterable[Any], *__: Any) -> Done:
    for several, given in zip(outputs, inputs, strict=True):
        for output in several:
            _fill(output, given)
    return _DONE


def _fill_from_lists(group: Any, outputs: Any, inputs: Iterable[Sequence[torch.Tensor]], *_: Any) -> Done:
    for output, several in zip(outputs, inputs, strict=True):
        _fill(output, several[group.rank()])
    return _DONE


@torch.no_grad()
def _receive(_: Any, tensors: Iterable[torch.Tensor], *__: Any) -> Done:
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.element_size() > 1:
            tensor.data.normal_()
        else:
            tensor.data.zero_()
    return _DONE


def _listed(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


@torch.no_grad()
def _fill(output: torch.Tensor, given: torch.Tensor) -> None:
    """``given``, again and again until ``output`` is full; nothing where they are parts of one piece of memory."""
    if output.untyped_storage()._cdata == given.untyped_storage()._cdata:
        return
    filled, source = output.data.view(-1), given.data.reshape(-1)  # .data: no version of theirs counts as changed
    if not source.numel():
        filled.zero_()
        return
    whole = filled.numel() - filled.numel() % source.numel()
    filled[:whole].view(-1, source.numel()).copy_(source)
    filled[whole:].copy_(source[: filled.numel() - whole])


_METHODS = {
    **dict.fromkeys("allreduce allreduce_coalesced broadcast reduce send barrier monitored_barrier".split(), _leave),
    **dict.fromkeys(("_start_coalescing", "_end_coalescing"), _leave),
    **dict.fromkeys("_allgather_base all_gather_single _reduce_scatter_base reduce_scatter_single".split(), _fill_each),
    **dict.fromkeys("allgather_into_tensor_coalesced all_gather_single_coalesced".split(), _fill_each),
    **dict.fromkeys("reduce_scatter_tensor_coalesced reduce_scatter_single_coalesced".split(), _fill_each),
    **dict.fromkeys("alltoall_base all_to_all_single alltoall".split(), _fill_each),
    "allgather": _fill_lists,
    "reduce_scatter": _fill_from_lists,
    **dict.fromkeys(("recv", "recv_anysource"), _receive),
}
