"""Steps that ranks rehearse, each by itself: nothing stays of them, and nobody hangs where memory runs out on one."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from copus_ext.core.plan import Layout, Plan, parse_plan
from tests.end_to_end.launch import MOCK, MODEL, TRAINING, Outcome, events_of, launch, losses_of, run_main
from tests.ranks.harness import run_ranks, skip_without_packages

_BASE = Plan(Layout(dp=4), micro_batch=1, global_batch=8)
_DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1 "
_EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather --disable-bias-linear "
    "--moe-router-enable-expert-bias --moe-router-score-function sigmoid "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 "
)
_JOBS = {  # flags, and layouts to rehearse under them
    "fp32": (_DROPOUT, "tp2,dp2,sp,zero1,recompute-full pp2,dp2"),
    "bf16, overlapped": (
        _DROPOUT + "--bf16 --overlap-grad-reduce --overlap-param-gather ",
        "dp4,zero1 pp2,vpp2,dp2,zero1",
    ),
    "experts": (_EXPERTS, "ep2,dp4 tp2,pp2,sp"),
    "muon in layers": ("--optimizer muon --bf16 ", "dp4,zero1 tp2,dp2,zero1"),
    "context": ("", "cp2,dp2,zero1 tp2,cp2,sp"),
}
_OVERRIDES = {"padded_vocab_size": 128}
_FAILURES = (("tp2,pp2", 2, True), ("pp2,dp2,mbs2", 3, False), ("mbs2", 1, False))  # a plan, who fails, in what pass


def _rehearsed(flags: str, layouts_of_test: str) -> list[dict[str, Any]]:
    from tests.ranks.moving import start

    plans = [parse_plan(words, _BASE) for words in layouts_of_test.split()]
    raw, layouts = start(flags, plans[0])
    return [_beside_a_twin(raw, layouts, plan) for plan in plans]


def _beside_a_twin(raw: Any, layouts: Any, plan: Plan) -> dict[str, Any]:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from copus_ext.adapters.carry import RngState
    from copus_ext.adapters.rehearsal import rehearse
    from tests.ranks.moving import equal, on_this_rank, seeded
    from tests.ranks.steps import losses_and_norms

    twin, job = seeded(layouts, raw, plan), seeded(layouts, raw, plan)
    random = RngState.capture()
    expected = losses_and_norms(twin, layouts, 2)
    random.restore()
    count, found = get_num_microbatches(), []
    for number in range(2):  # before the first step, too, when DDP does not know yet what is ready when
        rehearse(job)
        assert not any(b.grad_data.any() for c in job.model for b in (*c.buffers, *c.expert_parallel_buffers))
        assert all(p.grad is None for chunk in job.model for p in chunk.parameters())
        found += losses_and_norms(job, layouts, 1, first_sample=number * plan.global_batch)
    buffers = [[b for c in j.model for b in c.module.buffers()] for j in (twin, job)]
    return {
        "plan": str(plan),
        "expected": expected,
        "found": found,
        "same": equal(on_this_rank(twin), on_this_rank(job)) and equal(*buffers),
        "count": (count, get_num_microbatches()),
    }


@pytest.mark.parametrize("name", _JOBS)
def test_nothing_stays_of_a_rehearsal(name: str) -> None:
    skip_without_packages(_JOBS[name][0])
    for results in run_ranks(4, _rehearsed, *_JOBS[name]):
        for result in results:
            assert result["found"] == result["expected"], result["plan"]
            assert result["same"], result["plan"]
            assert len(set(result["count"])) == 1


@contextlib.contextmanager
def _runs_out(rank: int, *, forward: bool) -> Iterator[list[Any]]:
    """Inside, the second MLP that ``rank`` comes to runs out of memory, in its forward or in its backward pass.

    What is given are weak references to what MLPs put out.
    """
    import torch
    from megatron.core.transformer.mlp import MLP
    from torch.nn.modules import module as hooks

    outputs: list[Any] = []

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def hook(module: Any, _: Any, output: Any) -> None:
        if isinstance(module, MLP):
            outputs.append(weakref.ref(output[0]))
            if torch.distributed.get_rank() == rank and len(outputs) == 2:
                fail() if forward else output[0].register_hook(fail)

    handle = hooks.register_module_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def _failing() -> dict[str, Any]:
    from copus_ext.adapters.carry import RngState
    from copus_ext.run.switch import put_in_charge
    from tests.ranks.moving import equal, on_this_rank, seeded, start

    raw, layouts = start("--hidden-dropout 0.1 ", _BASE)
    twin, job = seeded(layouts, raw, _BASE), seeded(layouts, raw, _BASE)
    random = RngState.capture()
    twin, _, expected = _switched(twin, raw, layouts, failing=False)
    put_in_charge(job, layouts)
    random.restore()
    job, said, found = _switched(job, raw, layouts, failing=True)
    return {
        "expected": expected,
        "found": found,
        "same": equal(on_this_rank(twin), on_this_rank(job)),
        "said": said,
    }


def _switched(job: Any, raw: Any, layouts: Any, *, failing: bool) -> tuple[Any, list[str], list[Any]]:
    """Steps, with switches in between that fail in their rehearsals, or without; then two switches that do not."""
    from megatron.training import get_args

    from copus_ext.run.switch import NoMemory, Switcher
    from tests.ranks.steps import losses_and_norms

    switcher, said, found = Switcher(raw, layouts), [], []
    for number, (words, rank, forward) in enumerate(_FAILURES):
        found += losses_and_norms(job, layouts, 1, 8 * number)
        if failing:
            with _runs_out(rank, forward=forward) as outputs, pytest.raises(NoMemory) as failure:
                switcher.switch(job, _plan(words), _OVERRIDES, rehearsed=True)
            said.append(str(failure.value))
            assert get_args() is job.args
            assert len(outputs) > 1
            assert not any(output() is not None for output in outputs), "activations are gone"
    for number, words in enumerate(("mbs2", "pp2,dp2"), len(_FAILURES)):
        job, report = switcher.switch(job, _plan(words), _OVERRIDES, rehearsed=failing)
        assert ("rehearse" in report.seconds) == failing
        found += losses_and_norms(job, layouts, 1, 8 * number)
    return job, said, found


def _plan(words: str) -> Plan:
    return parse_plan(words, _BASE)


def test_no_memory_on_one_rank_is_survived_by_all() -> None:
    for result in run_ranks(4, _failing, timeout_s=120.0):
        assert [said.split(": ")[:2] for said in result["said"]] == [
            ["the rehearsal of dp1,tp2,pp2,mbs1,gbs8", "rank 2"],
            ["the rehearsal of dp2,pp2,mbs2,gbs8", "rank 3"],
            ["the rehearsal of dp4,mbs2,gbs8", "rank 1"],
        ]
        assert all("out of memory" in said for said in result["said"])
        assert result["found"] == result["expected"]
        assert result["same"]


def _run_that_runs_out(words: list[str]) -> Outcome:
    from copus_ext.adapters import rehearsal

    def passes(*args: Any) -> None:
        with _runs_out(1, forward=True):
            rehearse(*args)

    rehearse = rehearsal._passes
    with mock.patch.object(rehearsal, "_passes", passes):
        return run_main(words)


def test_a_run_goes_on_without_the_plan_and_learns_from_it(tmp_path: Path) -> None:
    flags = MODEL + TRAINING + MOCK + "--micro-batch-size 1 --global-batch-size 8 --train-samples 48 "
    flags += "--copus-hardware a100 "  # nothing is measured then
    still, faulty, saved = (tmp_path / name for name in ("still", "faulty", "saved"))
    launch(flags, f"--copus-dir={still}", "--copus-policy=static", ranks=2)
    switching = ("--copus-policy=schedule", "--copus-schedule", "0:dp2 32:pp2", "--copus-rehearse=always")
    keep = f"--save {saved} --save-interval 1000 "
    words = [*(flags + keep).split(), f"--copus-dir={faulty}", *switching]
    assert [o.status for o in run_ranks(2, _run_that_runs_out, words, timeout_s=120.0)] == [0, 0]
    assert losses_of(faulty) == losses_of(still)
    (fault,) = events_of(faulty, "fault")
    assert (fault["kind"], fault["plan"], fault["consumed_samples"]) == ("memory", "dp1,pp2,mbs1,gbs8", 32)
    assert "rank 1: CUDA out of memory" in fault["message"]
    (ran_out,) = json.loads(next(saved.glob("*/copus_state.json")).read_text())["memory"]["exhausted"]
    assert (ran_out["pp"], ran_out["micro_batch"]) == (2, 1)


def _on_one_rank() -> dict[str, Any]:
    """Rank 0 talks while the other one does not listen."""
    import torch
    import torch.distributed as dist

    from copus_ext.adapters.alone import alone

    found: dict[str, Any] = {}
    if dist.get_rank() == 0:
        given, twice, half = torch.arange(4.0), torch.empty(8), torch.empty(2)
        uneven, received, lists = torch.empty(3), torch.zeros(1000), [torch.empty(4), torch.empty(4)]
        with alone():
            dist.all_reduce(given)
            dist.barrier()
            handles = [dist.all_gather_into_tensor(twice, given, async_op=True)]
            handles += [dist.reduce_scatter_tensor(half, given, async_op=True)]
            with dist._coalescing_manager(async_ops=True) as coalesced:
                dist.all_reduce(given)
            dist.all_gather(lists, given)
            dist.all_to_all_single(uneven, given, [1, 2], [3, 1])
            messages = [dist.P2POp(dist.isend, given, 1), dist.P2POp(dist.irecv, received, 1)]
            for handle in [*handles, coalesced, *dist.batch_isend_irecv(messages)]:
                handle.wait()
            with pytest.raises(RuntimeError, match="by one rank alone"):
                dist.scatter(half, [half, half])
        found = {"given": given, "twice": twice, "half": half, "uneven": uneven, "listed": lists[1]}
        found = {name: tensor.tolist() for name, tensor in found.items()} | {"spread": float(received.std())}
    total = torch.ones(1)
    dist.all_reduce(total)
    return {**found, "total": float(total)}


def test_one_rank_does_alone_what_ranks_do_together() -> None:
    found, other = run_ranks(2, _on_one_rank, timeout_s=60.0)
    assert found.pop("spread") == pytest.approx(1.0, abs=0.1)
    given = [0.0, 1.0, 2.0, 3.0]
    assert found == {
        "given": given,
        "twice": given * 2,
        "half": given[:2],
        "uneven": given[:3],
        "listed": given,
        "total": other["total"],
    }
    assert other["total"] == 2.0, "and together again behind it"


def _in_flight(words: list[str]) -> list[int]:
    from copus_ext.adapters.rehearsal import in_flight

    return [in_flight(_plan(plan)) for plan in words] + [in_flight(_plan(words[-1]), group=5)]


def test_micro_batches_in_flight() -> None:
    plans = "dp4,gbs64 pp4,gbs2 pp4,gbs64 pp2,dp2,vpp2,gbs64 pp4,vpp2,gbs64".split()
    assert run_ranks(1, _in_flight, plans) == [[1, 2, 4, 4, 8, 10]]
