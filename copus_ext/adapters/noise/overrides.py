"""Methods of single objects, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def override(owner: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Give ``owner`` a method of its own; what is returned takes it away. The last one given goes first."""
    before = vars(owner).get(name)
    setattr(owner, name, method)

    def undo() -> None:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo
