"""What of a run's progress upstream keeps in its arguments, and carrying it from one plan's arguments to the next's."""

from __future__ import annotations

import argparse

NEVER = 10**12  # an interval in steps that no run reaches

_CARRIED = (
    "iteration",
    "curr_iteration",
    "consumed_train_samples",
    "consumed_valid_samples",
    "skipped_train_samples",
    "num_floating_point_operations_so_far",
    "do_train",
    "do_valid",
    "do_test",
    "eval_iters",
)


def carry_progress(old: argparse.Namespace, new: argparse.Namespace) -> None:
    """Let ``new`` go on where ``old`` stands."""
    for name in _CARRIED:
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    # A checkpoint is loaded once, when the run starts; what is built later gets its weights from memory.
    new.load = new.pretrained_checkpoint = None


def steps_until(args: argparse.Namespace, samples: int) -> int:
    """Whole steps of the current batch from where the run stands to ``samples`` consumed."""
    return max(0, samples - args.consumed_train_samples) // args.global_batch_size


def steps_beyond(args: argparse.Namespace, samples: int) -> int:
    """Steps of the current batch until ``samples`` are consumed, the last of which may go beyond."""
    return -(-max(0, samples - args.consumed_train_samples) // args.global_batch_size)
