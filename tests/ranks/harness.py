"""Run a function on several ranks: real processes, real gloo, one fork server that has Megatron loaded."""

from __future__ import annotations

import importlib.util
import io
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ranks.preload"])
# torch's stores look up the names of whoever connects, for their logs. Where a name server does not answer, as one
# query in forty gets lost on some machines, that takes five seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
_EXIT_S = 10.0  # for ranks that have given their results to end by themselves, with the processes they started


def skip_without_packages(flags: str) -> None:
    """Skip a test of a job with these flags where a package is missing that upstream wants for one of them."""
    if any(f"--optimizer {name}" in flags for name in ("muon", "lion")) and not _is_there("emerging_optimizers"):
        pytest.skip("emerging-optimizers is not installed")


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def load_megatron() -> None:
    """Start the fork server, which loads Megatron while the caller goes on."""
    multiprocessing.forkserver.ensure_running()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 180.0) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks with the process group up.

    Args:
        world_size: processes to start.
        function: of module level, so that it can be named to another process.
        args: given to every rank.
        timeout_s: after which every rank is killed.

    Returns:
        What each rank returned, by rank.

    Raises:
        AssertionError: a rank failed, with its traceback, or the time ran out.
    """
    results: Any = _CONTEXT.Queue()
    ended, end = _CONTEXT.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _CONTEXT.Process(target=_rank_main, args=(rank, world_size, folder, results, ended, function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            found = _gather(world_size, results, timeout_s)
            end.close()
            for process in ranks:
                process.join(_EXIT_S)
            return found
        finally:
            end.close()
            for process in ranks:
                process.kill()
                process.join()


def _store(rank: int, world_size: int, folder: str) -> Any:
    """A store of rank 0, told of by a file: making a group takes less than half as long as with a file alone."""
    from torch.distributed import FileStore, TCPStore

    meeting = FileStore(f"{folder}/store", world_size)
    if rank > 0:
        return TCPStore("127.0.0.1", int(meeting.get("port")), is_master=False)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting.set("port", str(store.port))
    return store


def _gather(world_size: int, results: Any, timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    found: dict[int, Any] = {}
    while len(found) < world_size:
        try:
            rank, value, failure = results.get(timeout=max(0.01, deadline - time.monotonic()))
        except queue.Empty:
            missing = sorted(set(range(world_size)) - set(found))
            raise AssertionError(f"ranks {missing} did not finish in {timeout_s:.0f} s") from None
        assert failure is None, f"rank {rank} failed:\n{failure}"
        found[rank] = value
    return [found[rank] for rank in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    results: Any,
    ended: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch.distributed

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    sys.stdout = io.StringIO()  # upstream describes every model it builds; failures travel in the queue
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # upstream insists on it for tensor parallelism
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    try:
        store = _store(rank, world_size, folder)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        # The last results must leave this process before it is killed.
        results.close()
        results.join_thread()
        # Others may still be connecting to this one. The pipe also ends with the process of the tests.
        ended.poll(None)
