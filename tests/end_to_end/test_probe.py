"""A probe in mid-run on two ranks: it learns of c, and the run goes on as if there had been none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from copus_ext.core.events import read_events
from copus_ext.core.plan import Plan
from copus_ext.core.planner.decision import Decision, Probe, Situation
from copus_ext.core.planner.policy import Policy, PolicySettings
from copus_ext.core.planner.replay import replay
from copus_ext.core.policies import static
from copus_ext.core.policies.static import StaticPolicy
from tests.end_to_end.launch import MOCK, MODEL, TRAINING, Outcome, events_of, losses_of, run_main
from tests.ranks.harness import run_ranks

RUN = (
    MODEL + TRAINING + MOCK + "--micro-batch-size 1 --global-batch-size 4 --train-samples 128 --copus-interval 10 "
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --eval-interval 4 "
    "--eval-global-batch-size 2 --save-interval 8 --ckpt-format torch_dist "
)
PROBED = 64


@dataclass(frozen=True)
class Probing(StaticPolicy):
    """Stays, and asks for one branch at its first decision."""

    def decide(self, situation: Situation) -> Decision:
        """A branch of the double batch and micro-batch."""
        stay, plan = super().decide(situation), situation.current
        double = plan.with_batch(2 * plan.global_batch, 2 * plan.micro_batch)
        probe = Probe(double, PROBED) if situation.can_probe else None
        return stay if situation.decisions else replace(stay, probe=probe)


def make_probing(settings: PolicySettings, base: Plan, options: object) -> Policy:
    """In place of the static policy's own."""
    return Probing()


def probing(words: list[str]) -> Outcome:
    """The entry point on this rank, with that policy under the name of ``static``."""
    with mock.patch.object(static, "make", make_probing):
        return run_main(words)


def test_a_probe_changes_nothing_of_the_run(tmp_path: Path) -> None:
    still, probed = tmp_path / "still", tmp_path / "probed"
    flags = [*RUN.split(), "--copus-policy=static"]
    for folder, program in ((still, run_main), (probed, probing)):
        outcomes = run_ranks(2, program, [*flags, f"--copus-dir={folder}", f"--save={folder / 'checkpoints'}"])
        assert [o.status for o in outcomes] == [0, 0], outcomes[0].err
    assert losses_of(probed) == losses_of(still)
    assert [e["loss"] for e in events_of(probed, "eval")] == [e["loss"] for e in events_of(still, "eval")]
    saved = [[e["iteration"] for e in events_of(folder, "checkpoint")] for folder in (probed, still)]
    assert saved[0] == saved[1], "the branch saved something, or the run did not"
    probe = next(event for event in read_events(probed / "events.jsonl") if event["event"] == "probe")
    assert (probe["start_samples"], probe["samples"], probe["batch_to"]) == (40, PROBED, 8)
    assert 0 < probe["seconds"] < 60
    branch = next((probed / "probes").iterdir())
    assert [s["consumed_samples"] for s in events_of(branch, "step")] == list(range(48, 40 + PROBED + 1, 8))
    assert not events_of(branch, "checkpoint")
    with mock.patch.object(static, "make", make_probing):
        again = list(replay(read_events(probed / "events.jsonl")))
    assert [each.differences for each in again] == [()] * len(again)
    assert len(again) > 1
