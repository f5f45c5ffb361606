"""Unit tests come first, while the server that ranks are forked from loads Megatron on the other core."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Pure logic first; what needs ranks has them ready by then."""
    items.sort(key=lambda item: "unit" not in item.path.parts)
    if items and "unit" not in items[-1].path.parts:
        from tests.ranks.harness import load_megatron

        load_megatron()
