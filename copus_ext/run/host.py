"""What those who watch, branch or probe a run need of it: the driver, as they see it."""

from __future__ import annotations

from typing import Any, Protocol

from copus_ext.adapters.job import Job
from copus_ext.adapters.layouts import LayoutGroups
from copus_ext.core.plan import Plan
from copus_ext.core.planner.knowledge import Knowledge
from copus_ext.run.config import CopusConfig
from copus_ext.run.telemetry import Telemetry

Iterators = tuple[Any, Any, Any]  # training, validation, test


class Host(Protocol):
    """A run on this rank. ``in_branch``: what of upstream's arguments is other while a branch is trained."""

    job: Job
    config: CopusConfig
    telemetry: Telemetry
    layouts: LayoutGroups
    in_branch: dict[str, Any]

    @property
    def knowledge(self) -> Knowledge:
        """What is known by now."""

    def refusal_of(self, plan: Plan) -> str | None:
        """Why upstream can't run a plan."""

    def prepare(self, plan: Plan) -> None:
        """Have a switch to a plan ready. Collective."""

    def follow_noise(self) -> None:
        """Let learning rates be what they are by the noise scale that has become known."""

    def log_start(self) -> None:
        """The first event of a log."""

    def iterators(self) -> Iterators:
        """What the job reads from here on. Collective."""

    def segment(self, iterators: Iterators, until: int | None = None, deciding: bool = True) -> Any:
        """Train under the present plan. Collective."""

    def switch(self, plan: Plan) -> Iterators | None:
        """Move to a plan; ``None`` where that fails. Collective."""
