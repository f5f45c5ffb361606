"""Where gradients are read: behind DDP's accumulation, before its reduction, and so before clipping.

A parameter is read when the last micro-batch of a slice has been added to its ``main_grad``: its bytes are then still
in the cache. With overlapped reduction the last of a bucket starts its all-reduce before our hook runs, so what was not
read by then is read just before ``start_grad_sync``. Both serve 1F1B and interleaved schedules alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from copus_ext.adapters.noise.overrides import override


class Reader(Protocol):
    """Takes in the gradients of a step."""

    slices: int  # a rank's accumulation window is cut into so many

    def read(self, index: int, number: int) -> None:
        """Parameter ``index`` holds in ``main_grad`` what was accumulated up to the end of slice ``number``."""


class Tap:
    """Counts the micro-batches of one parameter, and has it read at the end of each slice."""

    __slots__ = ("_index", "_micro_batches", "_next_end", "_reader", "_window", "number")

    def __init__(self, index: int, reader: Reader, window: int) -> None:
        self._index, self._reader, self._window = index, reader, window
        self.reset()

    def reset(self) -> None:
        """A forward-backward pass begins."""
        self._micro_batches, self._next_end, self.number = 0, self._window, 0

    def accumulated(self, *_: Any) -> None:
        """One more micro-batch is in ``main_grad``."""
        self._micro_batches += 1
        if self._micro_batches == self._next_end and self.number < self._reader.slices:
            self._read()

    def about_to_reduce(self) -> None:
        """``main_grad`` is complete, and will be scaled and reduced next."""
        if self.number == self._reader.slices - 1:
            self._read()

    def complete(self) -> bool:
        """Whether the slices that were read are those that were meant."""
        slices = self._reader.slices
        return slices == 1 or self._micro_batches in (0, self._window * slices)

    def _read(self) -> None:
        self._reader.read(self._index, self.number)
        self.number += 1
        self._next_end += self._window


def before_reduction(group: Any, action: Callable[[], Any]) -> Callable[[], None]:
    """Have ``action`` done just before a bucket group's gradients are scaled and reduced; what undoes that."""
    start_grad_sync = group.start_grad_sync

    def act_then_start(*args: Any, **kwargs: Any) -> Any:
        already_started = group.is_first_batch and group.grad_reduce_handle is not None
        if not already_started:
            action()
        return start_grad_sync(*args, **kwargs)

    return override(group, "start_grad_sync", act_then_start)


class GradientTaps:
    """Hooks on the parameters of DDP-wrapped model chunks, between :meth:`attach` and :meth:`detach`."""

    def __init__(
        self,
        model: Sequence[Any],
        params: Sequence[torch.nn.Parameter],
        reader: Reader,
        num_microbatches: int,
        on_begin: Callable[[], None],
    ) -> None:
        """``params``: those to read, whose place in the sequence is the reader's index; ``on_begin``: a pass starts."""
        self._model, self._on_begin = model, on_begin
        window = num_microbatches // reader.slices
        self._taps = {param: Tap(index, reader, window) for index, param in enumerate(params)}
        self._undo = contextlib.ExitStack()

    def attach(self) -> None:
        """Start reading. No step may be under way."""
        self._wrap_zeroing(self._model[0])
        for chunk in self._model:
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                self._wrap_grad_sync(group)
            self._hook_accumulation(chunk)

    def detach(self) -> None:
        """Stop reading and leave the model as it was."""
        self._undo.close()

    def complete(self) -> bool:
        """Whether every parameter got a gradient from each micro-batch of the last pass, or from none.

        Where one was left out (an expert without tokens, in some implementations), slices can't be told apart.
        """
        return all(tap.complete() for tap in self._taps.values())

    def _begin(self) -> None:
        for tap in self._taps.values():
            tap.reset()
        self._on_begin()

    def _wrap_zeroing(self, chunk: Any) -> None:
        """Begin anew with every forward-backward pass: upstream's rerun state machine may do a step's a second time."""
        zero_grad_buffer = chunk.zero_grad_buffer

        def begin_then_zero() -> None:
            self._begin()
            zero_grad_buffer()

        self._undo.callback(override(chunk, "zero_grad_buffer", begin_then_zero))

    def _wrap_grad_sync(self, group: Any) -> None:
        taps = [self._taps[p] for bucket in group.buckets for p in bucket.params_list if p in self._taps]

        def read() -> None:
            for tap in taps:
                tap.about_to_reduce()

        self._undo.callback(before_reduction(group, read))

    def _hook_accumulation(self, chunk: Any) -> None:
        """Hooks registered now run behind DDP's own, which adds the micro-batch to ``main_grad``."""
        trainable = [param for param in chunk.module.parameters() if param.requires_grad]
        for param, accumulator in zip(trainable, chunk.grad_accs, strict=True):
            if param in self._taps:
                self._undo.callback(accumulator.register_hook(self._taps[param].accumulated).remove)
