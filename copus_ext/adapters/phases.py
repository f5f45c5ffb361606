"""Seconds by what they were spent on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Phases:
    """``with phases("move"): ...`` adds the block's time to ``phases.seconds["move"]``, less that of blocks within."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block and add it to phase ``name``."""
        before, start = self._told, time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start - (self._told - before))

    def add(self, name: str, seconds: float) -> None:
        """Seconds that were measured otherwise: within a block they are no longer the block's."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @property
    def _told(self) -> float:
        return sum(self.seconds.values())
