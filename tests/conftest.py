"""Unit tests come first, while the server that ranks are forked from loads Megatron on the other core."""

from __future__ import annotations

from pathlib import Path

import pytest

_UNIT = Path(__file__).parent / "unit"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Pure logic first; what needs ranks has them ready by then."""
    items.sort(key=_needs_ranks)
    if items and _needs_ranks(items[-1]) and not config.option.collectonly:
        from tests.ranks.harness import load_megatron

        load_megatron()


def _needs_ranks(item: pytest.Item) -> bool:
    return not item.path.is_relative_to(_UNIT)
