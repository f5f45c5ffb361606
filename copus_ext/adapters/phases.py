"""Seconds by what they were spent on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Phases:
    """``with phases("move"): ...`` adds the block's time to ``phases.seconds["move"]``, less that of blocks within."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within = 0.0  # seconds of the blocks within the present one

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block and add it to phase ``name``."""
        around, self._within = self._within, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent, within = time.perf_counter() - start, self._within
            self._within = around
            self.add(name, spent, within)

    def add(self, name: str, spent: float, within: float = 0.0) -> None:
        """Seconds that were ``spent``, those ``within`` them being told already: for what is too short for a block."""
        self.seconds[name] = self.seconds.get(name, 0.0) + spent - within
        self._within += spent
