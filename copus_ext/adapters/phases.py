"""Seconds by what they were spent on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Phases:
    """``with phases("move"): ...`` adds the block's time to ``phases.seconds["move"]``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block and add it to phase ``name``."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
