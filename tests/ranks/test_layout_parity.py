"""The same seed and samples give the same losses and gradient norms in every layout, from the first step on."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from copus_ext.core.plan import Layout, Plan
from tests.ranks.harness import run_ranks
from tests.ranks.test_gradient_noise import CONTEXT_PARALLEL, EXPERTS

STEPS = 3
BATCH, MICRO_BATCH = 16, 2
LAYOUTS = (
    Layout(dp=4),
    Layout(dp=2, tp=2),
    Layout(tp=4),
    Layout(dp=2, pp=2),
    Layout(pp=4),
    Layout(tp=2, pp=2),
    Layout(dp=2, pp=2, vpp=2),
)
MODERN = "--swiglu --group-query-attention --num-query-groups 4 --normalization RMSNorm --disable-bias-linear "


def curve(flags: str, layout: Layout, masks: bool = False) -> list[tuple[float | None, ...]]:
    """Loss and gradient norm of a few steps under ``layout``, as this rank sees them.

    ``masks``: batches bring the attention mask with them.
    """
    from copus_ext.adapters.job import build_job
    from tests.ranks.stepping import one_step
    from tests.ranks.tiny import raw_arguments, start_upstream

    plan = Plan(layout, MICRO_BATCH, BATCH)
    raw = raw_arguments(flags)
    raw.create_attention_mask_in_dataloader = masks
    args, _, groups = start_upstream(raw, plan)
    job = build_job(plan, args, groups)
    return [tuple(one_step(job, first_sample=BATCH * step)) for step in range(STEPS)]


@functools.cache
def seen_on_the_last_rank(flags: str, layout: Layout, masks: bool = False) -> list[float]:
    """The curve as one list; the last rank is on the last stage in every layout."""
    return [value for step in run_ranks(4, curve, flags, layout, masks)[-1] for value in step if value is not None]


@pytest.mark.parametrize(
    ("flags", "layouts", "tolerance"),
    [
        ("", LAYOUTS, 1e-5),
        (MODERN + "--untie-embeddings-and-output-weights", LAYOUTS[::2] + LAYOUTS[5:6], 1e-5),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1", LAYOUTS[1::3], 1e-5),
        ("--bf16", LAYOUTS[::2], 2e-2),
        (EXPERTS, (Layout(dp=4), Layout(dp=4, ep=2), Layout(dp=4, ep=4), Layout(dp=2, pp=2, ep=2)), 1e-5),
        (MODERN + "--position-embedding-type learned_absolute ", (Layout(dp=4), *CONTEXT_PARALLEL), 1e-5),
    ],
    ids=["gpt", "llama-like", "recompute", "bf16", "experts", "cp"],
)
def test_every_layout_trains_the_same_model(flags: str, layouts: tuple[Layout, ...], tolerance: float) -> None:
    first = seen_on_the_last_rank(flags, layouts[0])
    assert len(first) == 2 * STEPS
    assert first[-2] < first[0], "it does not learn"
    for layout in layouts[1:]:
        assert seen_on_the_last_rank(flags, layout) == pytest.approx(first, rel=tolerance), str(layout)


def test_masks_of_the_data_loader_are_cut_as_queries_are() -> None:
    first = seen_on_the_last_rank("", Layout(dp=4))
    assert seen_on_the_last_rank("", Layout(cp=2, tp=2), masks=True) == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("flags", ["", "--overlap-grad-reduce --overlap-param-gather", "--bf16"])
def test_the_distributed_optimizer_trains_the_same_model(flags: str) -> None:
    plain = seen_on_the_last_rank(flags.replace("--overlap-param-gather", ""), Layout(dp=4))
    for layout in (Layout(dp=4), Layout(dp=2, pp=2), Layout(dp=2, tp=2)):
        sharded = seen_on_the_last_rank(flags, replace(layout, distributed_optimizer=True))
        assert sharded == pytest.approx(plain, rel=2e-2 if "bf16" in flags else 1e-5), str(layout)
