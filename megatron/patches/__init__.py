"""Our fork of Megatron: what we change in the installed package at run time, and nothing else.

Importing this changes nothing. ``apply_all()`` does, and only after every fingerprint agreed.
``python -m megatron.patches`` lists the patches and checks them against what is installed.
"""

from __future__ import annotations

from megatron.patches.registry import Patch, apply_patches


def all_patches() -> tuple[Patch, ...]:
    """Every patch, in the order they are applied."""
    from megatron.patches import (
        byte_tokenizer,
        cpu_device,
        data_helpers,
        gloo_devices,
        layer_seeds,
        layer_wise_gather,
        local_context_parallel,
        process_groups,
        sequence_parallel_norm,
        training_hooks,
    )

    modules = (
        cpu_device,
        data_helpers,
        byte_tokenizer,
        gloo_devices,
        process_groups,
        layer_seeds,
        sequence_parallel_norm,
        local_context_parallel,
        layer_wise_gather,
        training_hooks,
    )
    return tuple(module.PATCH for module in modules)


def apply_all() -> list[str]:
    """Apply every patch that this process has not applied yet; the names of those it applied."""
    return apply_patches(all_patches())
