"""The --branch-* flags: what they come to, and what is wrong with them in one line."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Layout, Plan
from copus_ext.run.branch_flags import BranchSettings, add_branch_arguments, keep_to_branches, settings_from

BASE = Plan(Layout(dp=2), micro_batch=4, global_batch=8)
GIVEN = "--branch-at 64,256 --branch-samples 256"


def raw(**other: Any) -> argparse.Namespace:
    """What of upstream's arguments is looked at."""
    run = {"no_copus": False, "copus_policy": "copus", "train_samples": 4096, "load": None}
    evaluation = {"eval_iters": 16, "full_validation": False, "eval_micro_batch_size": None}
    return argparse.Namespace(**{**run, **evaluation, **other})


def settings(words: str, **other: Any) -> BranchSettings:
    flags = add_branch_arguments(argparse.ArgumentParser()).parse_args(words.split())
    return settings_from(flags, raw(**other), BASE)


def test_branches_keep_the_layout_and_take_the_largest_micro_batch_that_fits() -> None:
    found = settings("--branch-at 64 --branch-samples 384 --branch-multiples 4,1/2,3/2")
    assert [(p.micro_batch, p.global_batch) for p in found.plans] == [(2, 4), (4, 8), (3, 12), (4, 32)]
    assert {plan.layout for plan in found.plans} == {BASE.layout}


def test_defaults() -> None:
    found = settings(GIVEN)
    assert [plan.global_batch for plan in found.plans] == [8, 16, 32, 64]
    assert found.points == (64, 256)
    assert (found.settle, found.evaluations, found.spacing, found.tolerance) == (64, 4, 64, 0.01)


def test_a_checkpoint_stands_where_it_stands() -> None:
    assert settings("--branch-samples 256", load="somewhere").points == ()


@pytest.mark.parametrize(
    ("words", "other", "flag"),
    [
        ("--branch-at 64", {}, "--branch-samples is missing"),
        ("--branch-samples 256", {}, "--branch-at is missing"),
        ("--branch-at 64 --branch-samples 250", {}, "--branch-samples 250"),
        ("--branch-at 64 --branch-samples -256", {}, "--branch-samples -256"),
        ("--branch-at 60 --branch-samples 256", {}, "--branch-at 60"),
        ("--branch-at 256,64 --branch-samples 256", {}, "--branch-at 256,64"),
        ("--branch-at x --branch-samples 256", {}, "--branch-at x"),
        ("--branch-at 4000 --branch-samples 256", {}, "--train-samples 4096"),
        (GIVEN + " --branch-multiples 1/3", {}, "--branch-multiples 1/3"),
        (GIVEN + " --branch-multiples 1/8", {}, "--branch-multiples 1/8"),
        (GIVEN + " --branch-multiples 1", {}, "--branch-multiples 1"),
        (GIVEN + " --branch-multiples 0,2", {}, "--branch-multiples 0,2"),
        (GIVEN + " --branch-multiples two", {}, "--branch-multiples two"),
        (GIVEN + " --branch-evals 1", {}, "--branch-evals 1"),
        (GIVEN + " --branch-settle 256", {}, "--branch-settle 256"),
        (GIVEN + " --branch-tolerance 0", {}, "--branch-tolerance 0"),
        (GIVEN, {"eval_iters": 2}, "--eval-iters 2"),
        (GIVEN, {"no_copus": True}, "--no-copus"),
        (GIVEN, {"copus_policy": "schedule"}, "--copus-policy schedule"),
    ],
)
def test_bad_input_is_named(words: str, other: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError) as refused:
        settings(words, **other)
    assert str(refused.value).startswith("--")
    assert flag in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_refused_length_names_one_that_does() -> None:
    with pytest.raises(UserError, match=r"give a multiple of 256"):
        settings("--branch-at 64 --branch-samples 300")


def test_a_branched_run_writes_nothing_that_branches_would_write_over() -> None:
    arguments = raw(save="checkpoints", save_interval=4, tensorboard_dir="curves", eval_interval=10)
    keep_to_branches(arguments, BASE)
    assert (arguments.save, arguments.save_interval, arguments.tensorboard_dir) == (None, None, None)
    assert arguments.eval_interval > 10**9
    assert arguments.eval_micro_batch_size == 4
