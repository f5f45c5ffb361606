"""Tensors without memory. A hollow tensor has its shape, its views and its place in every list; only its storage has
no bytes, until it is filled again. Going from layout to layout, a job is built hollow, filled with what arrives, and
hollow again when it has been left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import BuiltinFunctionType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from copus_ext.adapters.pages import Pages

_LARGE = 256  # elements: what is smaller may be a flag or a counter, which has to have its value
# By name, since on a CPU torch's own functions are behind redirected ones; each with one that does not write zeros,
# which would touch memory that is given back at once.
_MAKES = {"empty": "empty", "zeros": "empty", "empty_like": "empty_like", "zeros_like": "empty_like"}
_OVERWRITES = (torch.Tensor.copy_, torch.Tensor.zero_, torch.Tensor.fill_)
_COPIES = (torch.clone, torch.Tensor.clone)
_CONVERTS = (
    *_COPIES,
    torch.Tensor.float,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
    torch.Tensor.to,
    torch.Tensor.cuda,
    torch.Tensor.contiguous,
)
_VIEWS = (  # torch makes these only where the storage is large enough for them
    torch.Tensor.__getitem__,
    torch.Tensor.as_strided,
    torch.Tensor.expand,
    torch.Tensor.expand_as,
    torch.Tensor.narrow,
    torch.Tensor.split,
    torch.split,
    torch.narrow,
    torch.Tensor.t,
    torch.Tensor.transpose,
)


def is_hollow(tensor: Any) -> bool:
    """A tensor that has elements and no memory for them."""
    return isinstance(tensor, torch.Tensor) and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def empty(tensor: torch.Tensor) -> torch.Tensor:
    """Give the memory of ``tensor``, and of all that share it, back."""
    tensor.untyped_storage().resize_(0)
    return tensor


class Storages:
    """Storages of some tensors, each once, that can be emptied, and filled to the size they had.

    Where they are hollow from the start, the tensors must reach to their ends.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._sizes: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            number = storage._cdata
            self._storages[number] = storage
            self._sizes[number] = max(self._sizes.get(number, 0), storage.nbytes() or _extent(tensor))

    @property
    def numbers(self) -> set[int]:
        """Of all, as the other methods take and give them."""
        return set(self._storages)

    @property
    def nbytes(self) -> int:
        """Bytes of all when filled."""
        return sum(self._sizes.values())

    @property
    def resizable(self) -> bool:
        """All of them can be emptied."""
        return all(storage.resizable() for storage in self._storages.values())

    @property
    def held(self) -> int:
        """Bytes of all as they are now."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def sizes(self, tensors: Iterable[torch.Tensor]) -> dict[int, int]:
        """Bytes, when filled, of those storages here that ``tensors`` lie in, by number."""
        numbers = (tensor.untyped_storage()._cdata for tensor in tensors)
        return {number: self._sizes[number] for number in numbers if number in self._sizes}

    def total(self, numbers: Iterable[int]) -> int:
        """Bytes of these when filled."""
        return sum(self._sizes[number] for number in numbers)

    def fill(self, numbers: Iterable[int] | None = None, pages: Pages | None = None) -> int:
        """Memory for these (default: all), of any content where there was none, from ``pages``; the bytes it took."""
        taken = 0
        for number in self._storages if numbers is None else numbers:
            missing = self._sizes[number] - self._storages[number].nbytes()
            if missing:
                self._storages[number].resize_(self._sizes[number])
                if pages is not None and missing == self._sizes[number]:
                    pages.give(self._storages[number])
            taken += missing
        return taken

    def empty(self, numbers: Iterable[int] | None = None, pages: Pages | None = None) -> int:
        """Let the memory of these (default: all) go, into ``pages``; the bytes that were freed."""
        freed = 0
        for number in self._storages if numbers is None else numbers:
            freed += self._storages[number].nbytes()
            if pages is not None:
                pages.keep(self._storages[number])
            self._storages[number].resize_(0)
        return freed


def _extent(tensor: torch.Tensor) -> int:
    """Bytes that a hollow tensor's storage must have for it."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


class WithoutMemory(TorchFunctionMode):
    """Inside, large tensors of numbers get no memory when made, and nothing is copied to or from those that have none.

    It covers what upstream does to wrap a model whose parameters are hollow already and to build its optimizer; not
    computing with such tensors. Memory for a view, or for what is made, is taken for the moment.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """As torch calls it for every function."""
        kwargs = kwargs or {}
        if func in _OVERWRITES and any(map(is_hollow, args)):
            return args[0]
        if func in _CONVERTS and is_hollow(args[0]):
            return _converted(func, args, kwargs)
        if func in _VIEWS and is_hollow(args[0]):
            return _viewed(func, args, kwargs)
        if isinstance(func, BuiltinFunctionType) and func.__name__ in _MAKES:
            made: torch.Tensor = getattr(torch, _MAKES[func.__name__])(*args, **kwargs)
            if made.numel() >= _LARGE and made.is_floating_point():  # what ranks tell each other meanwhile is bytes
                return empty(made)
        return func(*args, **kwargs)


def _converted(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    tensor = args[0]
    example = func(torch.empty(0, dtype=tensor.dtype, device=tensor.device), *args[1:], **kwargs)
    if func not in _COPIES and (example.dtype, example.device) == (tensor.dtype, tensor.device):
        return tensor
    return empty(torch.empty(tensor.shape, dtype=example.dtype, device=example.device))


def _viewed(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    storage = args[0].untyped_storage()
    storage.resize_(_extent(args[0]))
    try:
        return func(*args, **kwargs)
    finally:
        storage.resize_(0)
