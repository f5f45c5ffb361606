"""Methods of single objects, replaced for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def override(owner: Any, name: str, method: Any) -> Callable[[], None]:
    """Give ``owner`` an attribute of its own; what is returned takes it away.

    The last one given has to go first: RuntimeError, if it does not.
    """
    before = vars(owner).get(name)
    setattr(owner, name, method)

    def undo() -> None:
        if vars(owner).get(name) is not method:
            raise RuntimeError(f"{name} was overridden again since; detach what was attached last first")
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo
