"""Tensors without memory, and which are not to be made so."""

from __future__ import annotations

import torch

from copus_ext.adapters.hollow import WithoutMemory, is_hollow


def test_numbers_are_made_without_memory_and_messages_with_it() -> None:
    with WithoutMemory():
        numbers, message = torch.empty(1000), torch.empty(1000, dtype=torch.uint8)  # as all_gather_object makes one
    assert is_hollow(numbers)
    assert not is_hollow(message)
