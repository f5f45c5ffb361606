from __future__ import annotations

from dataclasses import fields, replace

import pytest

from copus_ext.core.cost.hardware import Hardware, shared_cpu
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.step_time import StepTimeParts, step_time_parts
from copus_ext.core.plan import Layout, Plan, parse_plan

MODEL = ModelShape(layers=8, hidden=512, heads=8, kv_heads=8, ffn=2048, vocab=256, seq=64)
LAPTOP = shared_cpu(cores=2, ranks=4, memory_bytes=24e9)
FREE = 1e30  # bytes/s: communication and memory traffic that take no time
RANK_EACH = Hardware(
    1e12, 8e12, FREE, FREE, FREE, 0.0, devices_per_node=8, memory_bytes=8e10, step_overhead_s=0.0, layer_overhead_s=0.0
)
NODE = Hardware(
    4e14,
    3.2e15,
    2e12,
    3e11,
    4e10,
    1e-5,
    devices_per_node=8,
    memory_bytes=8e10,
    step_overhead_s=0.01,
    layer_overhead_s=1e-4,
)
EXPERTS = replace(MODEL, experts=8, experts_per_token=2, moe_ffn=2048, tied=False)
HEADLESS = replace(MODEL, vocab=0)  # an output layer on the last stage would make stages unequal


def simulate_1f1b(stages: int, micro_batches: int, cores: int) -> float:
    """Seconds of one step, a stage's forward pass taking 1 and its backward pass 2, with a core for each running pass.

    Every stage goes through its passes in 1F1B order; of the stages that could run, the last ones get the cores.
    """
    orders = []
    for stage in range(stages):
        warm_up = min(stages - stage - 1, micro_batches)
        order = [("f", k) for k in range(warm_up)]
        for k in range(micro_batches - warm_up):
            order += [("f", warm_up + k), ("b", k)]
        orders.append(order + [("b", k) for k in range(micro_batches - warm_up, micro_batches)])
    done: set[tuple[str, int, int]] = set()
    running: dict[int, tuple[int, tuple[str, int]]] = {}
    now = 0
    while any(orders) or running:
        for stage in [stage for stage, (end, _) in running.items() if end == now]:
            kind, index = running.pop(stage)[1]
            done.add((kind, stage, index))
        for stage in reversed(range(stages)):
            if stage in running or not orders[stage] or len(running) == cores:
                continue
            kind, index = orders[stage][0]
            waits_for = (kind, stage - 1, index) if kind == "f" else (kind, stage + 1, index)
            if waits_for in done or not 0 <= waits_for[1] < stages:
                running[stage] = (now + (1 if kind == "f" else 2), orders[stage].pop(0))
        now += 1
    return now - 1.0


def stage_seconds(layout: Layout, hardware: Hardware) -> float:
    """Forward and backward pass of one micro-batch through one stage, alone on its device."""
    return step_time_parts(Plan(replace(layout, pp=1), 1, 1), HEADLESS, hardware).compute / layout.pp


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 8), (4, 2), (4, 4), (8, 32)])
def test_a_pipeline_with_a_device_each_is_1f1b(stages: int, micro_batches: int) -> None:
    plan = Plan(Layout(pp=stages), 1, micro_batches)
    predicted = step_time_parts(plan, HEADLESS, RANK_EACH)
    stage = stage_seconds(plan.layout, RANK_EACH)
    assert predicted.total / stage == pytest.approx(simulate_1f1b(stages, micro_batches, cores=stages) / 3)
    assert predicted.bubble / predicted.compute == pytest.approx((stages - 1) / micro_batches)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 1), (4, 4), (4, 16), (8, 8), (8, 32)])
def test_a_pipeline_on_shared_cores_loses_little_to_waiting(stages: int, micro_batches: int) -> None:
    """Two cores for more stages: the naive bubble would be wrong by up to a factor of 2."""
    shared = replace(RANK_EACH, node_flops=2 * RANK_EACH.flops, devices_per_node=stages)
    plan = Plan(Layout(pp=stages), 1, micro_batches)
    predicted = step_time_parts(plan, HEADLESS, shared).total / stage_seconds(plan.layout, RANK_EACH)
    assert predicted == pytest.approx(simulate_1f1b(stages, micro_batches, cores=2) / 3, rel=0.1)


def test_interleaving_divides_the_bubble() -> None:
    plain, interleaved = (step_time_parts(Plan(Layout(pp=4, vpp=v), 1, 8), HEADLESS, RANK_EACH) for v in (1, 2))
    assert interleaved.bubble == pytest.approx(plain.bubble / 2)
    assert interleaved.compute == pytest.approx(plain.compute)


@pytest.mark.parametrize("layout", [Layout(dp=8), Layout(tp=8), Layout(dp=2, tp=2, pp=2), Layout(pp=8)])
def test_computing_takes_the_models_flops(layout: Layout) -> None:
    plan = Plan(layout, 1, 16)
    parts = step_time_parts(plan, HEADLESS, RANK_EACH)
    flops = HEADLESS.flops_per_sequence() * plan.global_batch
    assert parts.compute == pytest.approx(flops / (8 * RANK_EACH.flops))


def test_full_recompute_runs_the_forward_pass_again() -> None:
    none, selective, full = (
        step_time_parts(Plan(Layout(dp=8, recompute=choice), 1, 8), HEADLESS, RANK_EACH).compute
        for choice in ("none", "selective", "full")
    )
    assert full / none == pytest.approx(4 / 3)
    assert none < selective < full


@pytest.mark.parametrize("text", ["dp8", "tp8", "pp8", "tp2,pp2", "dp2,tp4,sp", "dp8,zero1", "pp4,vpp2"])
@pytest.mark.parametrize("hardware", [NODE, LAPTOP])
def test_parts_are_seconds_that_add_up(text: str, hardware: Hardware) -> None:
    plan = parse_plan(f"{text},mbs1,gbs32", Plan(Layout(dp=8), 1, 32))
    parts = step_time_parts(plan, MODEL, hardware)
    values = [getattr(parts, field.name) for field in fields(StepTimeParts)]
    assert all(value >= 0 for value in values)
    assert sum(values) == pytest.approx(parts.total)
    assert (parts.tensor > 0, parts.pipeline > 0) == (plan.layout.tp > 1, plan.layout.pp > 1)


def test_a_distributed_optimizer_shards_the_optimizer_step() -> None:
    plain, sharded = (
        step_time_parts(Plan(Layout(dp=8, distributed_optimizer=zero1), 1, 8), MODEL, NODE) for zero1 in (False, True)
    )
    assert sharded.optimizer < plain.optimizer / 4
    assert sharded.data == pytest.approx(plain.data)  # fp32: reduce-scatter and all-gather make up one all-reduce


def test_adam_of_torch_goes_over_memory_once_for_each_operation() -> None:
    plan, options = Plan(Layout(dp=8), 1, 8), RunOptions(fused_adam=False)
    fused, by_torch = (step_time_parts(plan, MODEL, NODE, each) for each in (RunOptions(), options))
    more = MODEL.params * (80 - 28) / NODE.memory_bandwidth
    assert by_torch.optimizer - fused.optimizer == pytest.approx(more)
    assert replace(by_torch, optimizer=fused.optimizer) == fused


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ("dp8,mbs1,gbs8", MODEL),
        ("dp8,mbs1,gbs32", MODEL),
        ("dp2,tp4,mbs1,gbs8", MODEL),
        ("dp8,mbs1,gbs8", EXPERTS),
        ("dp8,ep8,mbs1,gbs8", EXPERTS),
    ],
)
@pytest.mark.parametrize("gradient_bytes", [4, 2])
def test_every_micro_batch_adds_up_its_gradients_where_products_do_not(
    words: str, model: ModelShape, gradient_bytes: int
) -> None:
    plan = parse_plan(words, Plan(Layout(dp=8), 1, 8))
    layout = plan.layout
    fused, apart = (
        step_time_parts(plan, model, NODE, RunOptions(gradient_bytes=gradient_bytes, fused_accumulation=each)).traffic
        for each in (True, False)
    )
    experts = model.mlp_params * max(1, model.experts) / layout.ep
    weights = (model.layers * (model.attention_params + experts) + model.embedding_params) / layout.tp
    expected = plan.num_microbatches * weights * (2 * gradient_bytes + model.param_bytes) / NODE.memory_bandwidth
    assert apart - fused == pytest.approx(expected)


def test_leaving_the_node_slows_communication_down() -> None:
    near, far = Plan(Layout(dp=8), 1, 8), Plan(Layout(dp=16), 1, 16)
    assert step_time_parts(far, MODEL, NODE).data > step_time_parts(near, MODEL, NODE).data
    assert step_time_parts(far, MODEL, NODE).compute == step_time_parts(near, MODEL, NODE).compute


def test_small_batches_favour_pipelines_where_ranks_share_cores() -> None:
    """Measured: 4 ranks on 2 cores, 4 layers, hidden 512, sequence 64, global batch 4 took 412, 345 and 303 ms."""
    model, base = replace(MODEL, layers=4), Plan(Layout(dp=4), 1, 4)
    data, mixed, pipe = (step_time_parts(parse_plan(text, base), model, LAPTOP).total for text in ("dp4", "pp2", "pp4"))
    assert data > mixed > pipe
    assert 0.5 < data / 0.412 < 2


def test_hardware_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_bandwidth"):
        replace(NODE, memory_bandwidth=0.0)


CLUSTER = replace(NODE, inter_node_bandwidth=1e10, latency_s=0.0)


def test_replicas_of_experts_are_farther_apart_than_those_of_the_rest() -> None:
    """Eight experts on the eight devices of a node: each has its one replica on the other node."""
    plan = Plan(Layout(dp=16, ep=8), 1, 16)
    reduced = step_time_parts(plan, EXPERTS, CLUSTER).data
    expert = MODEL.layers * EXPERTS.mlp_params * 4  # bytes of gradients, of one expert a layer
    dense = (MODEL.layers * EXPERTS.attention_params + 2 * EXPERTS.embedding_params) * 4
    among_nodes = min(CLUSTER.intra_node_bandwidth, 8 * CLUSTER.inter_node_bandwidth)
    alone = 2 * 1 / 2 * expert / CLUSTER.inter_node_bandwidth
    assert reduced == pytest.approx(2 * 15 / 16 * dense / among_nodes + alone)


def test_the_optimizer_updates_what_its_rank_owns() -> None:
    plans = [Plan(Layout(dp=8, ep=ep, distributed_optimizer=True), 1, 8) for ep in (1, 8)]
    traffic = [step_time_parts(plan, EXPERTS, NODE).optimizer * NODE.memory_bandwidth for plan in plans]
    experts = MODEL.layers * EXPERTS.mlp_params * 8
    dense = MODEL.layers * EXPERTS.attention_params + 2 * EXPERTS.embedding_params
    assert traffic[0] == pytest.approx((dense + experts) * (40 / 8 + 4))
    assert traffic[1] == pytest.approx(dense * (40 / 8 + 4) + experts / 8 * (40 + 4)), "each expert is on one rank"


def test_tied_embeddings_cross_from_the_first_stage_to_the_last() -> None:
    """Two stages in the middle of a node, or on two nodes: what is next to each other is not what shares embeddings."""
    model, plan = replace(MODEL, tied=True, vocab=100_000), Plan(Layout(pp=4, dp=4), 1, 16)
    untied = step_time_parts(plan, replace(model, tied=False), CLUSTER).data
    embedding = model.embedding_params * 4
    tied = step_time_parts(plan, model, CLUSTER).data
    assert tied - untied == pytest.approx(embedding / CLUSTER.inter_node_bandwidth)


def test_fp32_products_run_at_their_own_speed() -> None:
    slow = replace(NODE, fp32_flops=NODE.flops / 10, memory_bandwidth=1e30)
    plan = Plan(Layout(dp=8), 1, 8)
    half = replace(MODEL, param_bytes=2)
    assert step_time_parts(plan, MODEL, slow).matmul == pytest.approx(10 * step_time_parts(plan, half, slow).matmul)
