"""The closed form of memory against upstream's report, and against jobs that are really built."""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import pytest

from copus_ext.core.cost.memory import MemoryParts, memory_parts
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.plan import Layout, Plan, parse_plan
from tests.ranks.harness import run_ranks

_GPT = ModelShape(layers=24, hidden=2048, heads=16, kv_heads=16, ffn=8192, vocab=51200, seq=2048, param_bytes=2)
_LLAMA = ModelShape(
    layers=48,
    hidden=4096,
    heads=32,
    kv_heads=8,
    ffn=14336,
    vocab=128256,
    seq=8192,
    gated=True,
    tied=False,
    param_bytes=2,
)
_EXPERTS = ModelShape(
    layers=24, hidden=2048, heads=16, kv_heads=16, ffn=8192, vocab=102400, seq=4096, gated=True, tied=False,
    experts=64, experts_per_token=6, moe_ffn=1408, param_bytes=2,
)  # fmt: skip


def _layouts(model: ModelShape) -> list[Layout]:
    """With sequence parallelism and selective recompute: where upstream counts activations as the paper does."""
    sizes = product((2, 8), (1, 4), (1, 2, 4), (1, 3), (1, 2), (1, 8) if model.experts else (1,), (False, True))
    return [
        Layout(dp, tp, pp, vpp, cp, ep, True, zero1, "selective")
        for dp, tp, pp, vpp, cp, ep, zero1 in sizes
        if (pp > 1 or vpp == 1) and dp * cp % ep == 0
    ]


def _upstream_arguments(model: ModelShape, layout: Layout) -> argparse.Namespace:
    """What upstream's report reads."""
    return argparse.Namespace(
        num_layers=model.layers,
        hidden_size=model.hidden,
        num_attention_heads=model.heads,
        kv_channels=model.hidden // model.heads,
        group_query_attention=True,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.ffn,
        swiglu=model.gated,
        normalization="RMSNorm" if model.gated else "LayerNorm",
        padded_vocab_size=model.vocab,
        untie_embeddings_and_output_weights=not model.tied,
        seq_length=model.seq,
        micro_batch_size=2,
        num_experts=model.experts or None,
        moe_layer_freq=1,
        moe_ffn_hidden_size=model.moe_ffn,
        moe_router_topk=model.experts_per_token,
        moe_shared_expert_intermediate_size=None,
        moe_latent_size=None,
        mtp_num_layers=None,
        multi_latent_attention=False,
        add_bias_linear=False,
        expert_tensor_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        world_size=layout.world_size,
        # With context parallelism, the replicas that share the optimizer are not args.data_parallel_size.
        data_parallel_size=layout.dp * layout.cp,
        use_distributed_optimizer=layout.distributed_optimizer,
    )


def _upstreams_report(model: ModelShape, layouts: list[Layout]) -> list[tuple[float, float]]:
    """Upstream's bytes of weights and optimizer, and of activations with many micro-batches."""
    from megatron.training.theoretical_memory_usage import (
        compute_activation_memory,
        compute_weight_and_optimizer_memory,
    )

    arguments = [_upstream_arguments(model, layout) for layout in layouts]
    return [(compute_weight_and_optimizer_memory(a), compute_activation_memory(a, 64)) for a in arguments]


@pytest.mark.parametrize("model", [_GPT, _LLAMA, _EXPERTS], ids=["gpt", "llama", "experts"])
def test_weights_and_optimizer_are_what_upstream_reports(model: ModelShape) -> None:
    layouts = _layouts(model)
    ours = memory_parts(PlanTable.of([Plan(layout, 2, 128 * layout.dp) for layout in layouts]), model)
    reports = run_ranks(1, _upstreams_report, model, layouts)[0]
    worst = max(abs(float(state) / report - 1) for state, (report, _) in zip(ours.state, reports, strict=True))
    assert worst < 1e-3


def test_activations_are_what_upstream_reports() -> None:
    """Upstream knows neither grouped queries nor gates nor context parallelism, and counts the logits in fp32 alone."""
    layouts = [layout for layout in _layouts(_GPT) if layout.cp == 1]
    table = PlanTable.of([Plan(layout, 2, 128 * layout.dp) for layout in layouts])
    ours = memory_parts(table, _GPT, RunOptions(dropout=True))
    reports = run_ranks(1, _upstreams_report, _GPT, layouts)[0]
    for row, (layout, (_, report)) in enumerate(zip(layouts, reports, strict=True)):
        logits = float(ours.logits[row]) * 4 / (4 + 2)
        assert float(ours.activations[row]) + logits == pytest.approx(report, rel=2e-3), str(layout)


def _bytes_held(flags: str, plan: Plan) -> tuple[int, ModelShape]:
    """What a job holds on this rank, before it trains: parameters, gradient buffers, main parameters and moments."""
    from copus_ext.adapters.arguments import model_shape
    from copus_ext.adapters.job_memory import JobMemory
    from tests.ranks.steps import build
    from tests.ranks.tiny import raw_arguments, start_upstream

    raw = raw_arguments(flags)
    _, layouts, _ = start_upstream(raw, plan)
    job: Any = build(layouts, raw, plan)
    return JobMemory(job, with_moments=True).nbytes, model_shape(job.args)


_BASE = Plan(Layout(dp=4), micro_batch=1, global_batch=8)
_FEW_BIASES = "--disable-bias-linear "
_MOE = "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather "


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (_FEW_BIASES, "tp2,pp2"),
        (_FEW_BIASES + "--bf16 ", "tp2,dp2,zero1"),
        (_FEW_BIASES + "--bf16 --swiglu --untie-embeddings-and-output-weights ", "pp2,dp2,zero1"),
        (_FEW_BIASES + "--bf16 " + _MOE, "ep2,dp4,zero1"),
    ],
)
def test_the_state_of_a_job_that_was_built(flags: str, words: str) -> None:
    plan = parse_plan(words, _BASE)
    held = run_ranks(4, _bytes_held, flags, plan)
    parts: MemoryParts = memory_parts(PlanTable.of([plan]), held[0][1])
    assert max(nbytes for nbytes, _ in held) == pytest.approx(float(parts.state[0]), rel=0.01)


def _bytes_kept(flags: str, layers: int, recompute: str) -> tuple[int, ModelShape]:
    """What autograd keeps in memory from a forward pass of a job without parallelism, parameters left out."""
    import torch

    from copus_ext.adapters.arguments import model_shape
    from tests.ranks.steps import build
    from tests.ranks.tiny import random_batches, raw_arguments, start_upstream

    plan = Plan(Layout(recompute=recompute), 2, 2)
    raw = raw_arguments(f"{flags} --disable-bias-linear --num-layers {layers} ")
    _, layouts, _ = start_upstream(raw, plan)
    job: Any = build(layouts, raw, plan)
    batch = random_batches(1, plan.micro_batch, raw.seq_length, 128)[0]
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = job.model[0](batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    assert loss.requires_grad
    for parameter in job.model[0].parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values()), model_shape(job.args)


@pytest.mark.parametrize(
    ("flags", "recompute", "not_fused"),
    [
        ("--position-embedding-type learned_absolute --bf16 ", "none", 0),
        ("--swiglu --bf16 --ffn-hidden-size 128 ", "none", 2 * 2 * 128),  # CPU: sigmoid and product apart, not fused
        ("", "full", 0),
    ],
)
def test_what_autograd_keeps_for_a_layer(flags: str, recompute: str, not_fused: int) -> None:
    """Up to statistics of norms, angles of rotary embeddings and the mask of the scores: 1 s b h of the 40."""
    few, more = (run_ranks(1, _bytes_kept, flags, layers, recompute)[0] for layers in (4, 6))
    plan = PlanTable.of([Plan(Layout(recompute=recompute), 2, 2)])
    expected = [float(memory_parts(plan, model).activations[0]) for _, model in (few, more)]
    tokens = 2 * more[1].seq
    measured = more[0] - few[0] - 2 * tokens * not_fused
    assert measured == pytest.approx(expected[1] - expected[0], abs=2 * tokens * more[1].hidden)
    assert measured >= expected[1] - expected[0]
