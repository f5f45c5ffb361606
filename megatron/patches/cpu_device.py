"""Upstream Megatron, unmodified, on a machine without an accelerator.

Upstream asks CUDA for its device, memory, streams and random generator in places that no flag reaches. Where there is
no CUDA those questions are answered by the CPU: the redirections below are the whole list, one function per kind.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from megatron.patches.registry import Patch

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_FACTORIES = (
    "tensor as_tensor zeros ones empty full arange linspace rand randn randint randperm empty_strided "
    "zeros_like ones_like empty_like full_like rand_like randn_like Generator"
).split()


class CpuStream:
    """A stream of a device that does everything at once: nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def synchronize(self) -> None:
        """All work is done already."""

    def wait_stream(self, _: CpuStream) -> None:
        """All work is done already."""

    def wait_event(self, _: CpuEvent) -> None:
        """All work is done already."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """An event that has happened, as CUDA's returns one (MoE's all-to-all dispatcher uses it)."""
        event = event or CpuEvent()
        event.record()
        return event


class CpuEvent:
    """A moment on the CPU's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._time_s = 0.0

    def record(self, _: CpuStream | None = None) -> None:
        """Take the time."""
        self._time_s = time.perf_counter()

    def elapsed_time(self, end: CpuEvent) -> float:
        """Milliseconds from here to ``end``."""
        return (end._time_s - self._time_s) * 1e3

    def query(self) -> bool:
        """Everything recorded has happened."""
        return True

    def wait(self, _: CpuStream | None = None) -> None:
        """All work is done already."""

    def synchronize(self) -> None:
        """All work is done already."""


def on_cpu(device: Any) -> Any:
    """The device to use where upstream names a CUDA one (a string, an index or a ``torch.device``)."""
    named = isinstance(device, str) and device.startswith("cuda")
    is_cuda = isinstance(device, torch.device) and device.type == "cuda"
    is_index = isinstance(device, int) and not isinstance(device, bool)
    return _CPU if named or is_cuda or is_index else device


def _redirect_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its ``device=`` argument sent through :func:`on_cpu`, and in memory that need not be pinned."""

    @functools.wraps(function)
    def redirected(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return redirected


def _redirect_factories() -> None:
    for name in _FACTORIES:
        factory = getattr(torch, name)
        if not isinstance(factory, type):  # torch.Generator is a class that others subclass and test against
            setattr(torch, name, _redirect_arguments(factory))


def _redirect_tensors_and_modules() -> None:
    plain_type = torch.Tensor.type

    @functools.wraps(plain_type)
    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Upstream's optimizers take a parameter only when its type reads torch.cuda.FloatTensor and the like.
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        name: str = plain_type(self)  # under a torch function mode, what we redirect comes back through us
        return name if name.startswith("torch.cuda.") else name.replace("torch.", "torch.cuda.", 1)

    plain_to = torch.Tensor.to

    @functools.wraps(plain_to)
    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], str | torch.device):
            args = (on_cpu(args[0]), *args[1:])
        return plain_to(self, *args, **{k: on_cpu(v) if k == "device" else v for k, v in kwargs.items()})

    torch.Tensor.type = cuda_type
    torch.Tensor.to = to_cpu
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.Tensor.pin_memory = lambda self, *_, **__: self


def resident_bytes() -> int:
    """Memory this process holds now."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes() -> int:
    """The most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_stats(*_: Any, **__: Any) -> dict[str, int]:
    now, peak = resident_bytes(), peak_resident_bytes()
    current = {f"{kind}_bytes.all.current": now for kind in ("reserved", "allocated")}
    return {**current, "allocated_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "allocation.all.current": 0}


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _device_properties(*_: Any, **__: Any) -> SimpleNamespace:
    # 8.0 is the oldest capability for which upstream takes no special path.
    name = platform.processor() or platform.machine()
    cores = os.cpu_count() or 1
    return SimpleNamespace(major=8, minor=0, name=name, total_memory=_total_memory(), multi_processor_count=cores)


@contextlib.contextmanager
def _no_stream(_: Any) -> Iterator[None]:
    yield


def _nothing(*_: Any, **__: Any) -> None:
    """What synchronising, emptying caches or choosing a device comes to on a CPU."""


def _redirect_cuda_module() -> None:
    stream = CpuStream()
    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "get_device_capability": lambda *_: (8, 0),
        "get_device_properties": _device_properties,
        "get_device_name": lambda *_: platform.processor() or platform.machine(),
        "Event": CpuEvent,
        "Stream": CpuStream,
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "stream": _no_stream,
        "memory_stats": _memory_stats,
        "mem_get_info": lambda *_: (
            _total_memory() - resident_bytes(),
            _total_memory(),
        ),
        "device_memory_used": lambda *_: resident_bytes(),
        "memory_allocated": lambda *_: resident_bytes(),
        "memory_reserved": lambda *_: resident_bytes(),
        "max_memory_allocated": lambda *_: peak_resident_bytes(),
        "max_memory_reserved": lambda *_: peak_resident_bytes(),
    }
    for name in ("synchronize", "empty_cache", "set_device", "set_stream", "reset_peak_memory_stats", "ipc_collect"):
        replacements[name] = _nothing
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)


def _redirect_rng() -> None:
    """Upstream's RNG tracker forks the CUDA generator; here it forks the CPU's."""
    torch.cuda.default_generators = (torch.default_generator,)
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # torch's own seeds devices that are not there as well: it keeps a stack trace for each, formatted, for ever.
    torch.manual_seed = torch.random.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = torch.manual_seed
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state

    import megatron.core.tensor_parallel.random as tracker

    tracker._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tracker._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _redirect_start_up() -> None:
    """Let upstream initialise without CUDA, and leave out warming up kernels that are not there."""
    import megatron.training.training as training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    training.set_jit_fusion_options = _nothing


def _keep_freed_memory() -> None:
    """Let the C library use freed memory again instead of giving it back, page by page, and taking page faults on it.

    A step frees and takes the same sizes again and again; a switch takes what it has just freed.
    """
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such switch
        set_option = ctypes.CDLL(None).mallopt
        set_option(_M_MMAP_MAX, 0)
        set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


def _run_eagerly() -> None:
    """Upstream compiles small kernels for speed; on a CPU that takes a C++ compiler and more time than it saves."""
    torch.compiler.set_stance("force_eager")


def apply() -> None:
    """Answer upstream's questions to CUDA on the CPU. Does nothing where there is a CUDA device."""
    if torch.cuda.is_available():
        return
    _redirect_factories()
    _redirect_tensors_and_modules()
    _redirect_cuda_module()
    _redirect_rng()
    _redirect_start_up()
    _keep_freed_memory()
    _run_eagerly()


PATCH = Patch(
    name="cpu_device",
    upstream=(
        "megatron.training.initialize.initialize_megatron",
        "megatron.training.initialize.set_jit_fusion_options",
        "megatron.core.tensor_parallel.random._get_cuda_rng_state",
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        "torch.Tensor.type",
        "torch.Tensor.to",
        "torch.cuda.current_device",
    ),
    why="training on a laptop: upstream asserts CUDA, writes device='cuda' literally and keeps its RNG there",
    issue="none known",
    remove_when="upstream takes the device from torch.accelerator or from a flag",
    apply=apply,
)
