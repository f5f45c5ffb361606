"""What of a job's state takes memory on this rank, and giving it back or filling it, all at once or piece by piece."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from copus_ext.adapters.exchange import Piece
from copus_ext.adapters.hollow import Storages, WithoutMemory, is_hollow
from copus_ext.adapters.job import Job
from copus_ext.adapters.job_state import JobState, job_state
from copus_ext.adapters.optimizer_shards import inner_optimizers, optimizer_shards


class JobMemory:
    """The storages of a job on this rank.

    Attributes:
        state: the pieces that have to be moved to another layout, and what they hold.
        kept: storages of parameters, main parameters and moments.
        gradients: storages of gradient buffers, whose content does not outlive a step.
        derived: numbers of those in ``kept`` that no piece lies in: half-precision weights.
    """

    def __init__(self, job: Job, *, with_moments: bool) -> None:
        """Look at ``job``, which may be hollow; moments that it does not have yet are made, hollow then.

        Raises:
            UnsupportedReshard: a tensor that cannot be placed in logical coordinates.
        """
        self._job = job
        self._parameters = [parameter for chunk in job.model for parameter in chunk.parameters()]
        with WithoutMemory() if any(map(is_hollow, self._parameters)) else contextlib.nullcontext():
            self.state: JobState = job_state(job, with_moments=with_moments)
        self.kept = Storages(self._tensors_kept())
        self.gradients = gradients(job)
        in_pieces = self.kept.sizes(tensor for piece in self.state.pieces for tensor in piece.tensors)
        self.derived = self.kept.numbers - in_pieces.keys()

    @property
    def is_current(self) -> bool:
        """Parameters and the optimizer's tensors are where they were: nothing was loaded that brought its own."""
        return {tensor.untyped_storage()._cdata for tensor in self._tensors_kept()} == self.kept.numbers

    @property
    def device(self) -> torch.device:
        """Where the state lies, or would."""
        if self._parameters:
            return self._parameters[0].device
        return torch.empty(0, device=torch.cuda.current_device()).device

    @property
    def is_held_elsewhere(self) -> bool:
        """Something outside of torch, such as a numpy array, shares memory with it, so that it can't be given back."""
        return not (self.kept.resizable and self.gradients.resizable)

    @property
    def nbytes(self) -> int:
        """Of a job that is not hollow."""
        return self.kept.nbytes + self.gradients.nbytes

    @property
    def moved_nbytes(self) -> int:
        """Of these, bytes of what is moved: all but gradients and derived weights."""
        return self.kept.nbytes - self.kept.total(self.derived)

    @property
    def held(self) -> int:
        """Bytes that the job takes now."""
        return self.kept.held + self.gradients.held

    def fill(self) -> int:
        """Memory for all that has none; the bytes it took."""
        return self.kept.fill() + self.gradients.fill()

    def empty(self) -> None:
        """Make the job hollow."""
        self.gradients.empty()
        self.kept.empty()

    def _tensors_kept(self) -> Iterator[torch.Tensor]:
        yield from self._parameters
        yield from (buffer.param_data for buffer in _buffers(self._job) if buffer.param_data is not None)
        for shard in optimizer_shards(self._job.optimizer).values():
            yield shard.main
            kept = shard.optimizer.state.get(shard.main, {})
            yield from (t for t in kept.values() if isinstance(t, torch.Tensor) and t.numel() == shard.main.numel() > 1)


class Side:
    """Which storages of a job are needed while its pieces arrive, or are read, one after the other."""

    def __init__(self, memory: JobMemory) -> None:
        self.memory = memory
        self.pieces: Sequence[Piece] = memory.state.pieces
        self._storages = [list(memory.kept.sizes(piece.tensors)) for piece in self.pieces]

    def of(self, pieces: Iterable[int]) -> list[int]:
        """The storages of these pieces, each once."""
        return list(dict.fromkeys(storage for piece in pieces for storage in self._storages[piece]))

    def freed_with(self, released: Iterable[Iterable[int]]) -> list[list[int]]:
        """For pieces that are released one group after the other, the storages that each leaves without a piece."""
        readers = Counter(storage for storages in self._storages for storage in storages)
        freed = []
        for pieces in released:
            gone = Counter(storage for piece in pieces for storage in self._storages[piece])
            readers.subtract(gone)
            freed.append([storage for storage in gone if not readers[storage]])
        return freed

    def stage(self) -> None:
        """Copy all pieces into host memory, pinned where there is a device, and read them from there from now on."""
        self.pieces = [
            replace(piece, tensors=tuple(_on_host(tensor) for tensor in piece.tensors)) for piece in self.pieces
        ]

    def unstage(self) -> None:
        """Copy everything back."""
        self.memory.kept.fill()
        for piece, staged in zip(self.memory.state.pieces, self.pieces, strict=True):
            for tensor, copy in zip(piece.tensors, staged.tensors, strict=True):
                tensor.copy_(copy)
        self.pieces = self.memory.state.pieces


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor)


def gradients(job: Job) -> Storages:
    """Gradient buffers, whose content does not outlive a step; whatever else refers to gradients forgets them."""
    for wrapper in inner_optimizers(job.optimizer):
        for group in wrapper.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
    return Storages(tensor for buffer in _buffers(job) for tensor in (buffer.grad_data, *buffer.extra_main_grads))


def _buffers(job: Job) -> Iterator[Any]:
    """Where upstream's DDP lays out gradients, and parameters where the optimizer is distributed, padding included."""
    for chunk in job.model:
        yield from chunk.buffers
        yield from chunk.expert_parallel_buffers
