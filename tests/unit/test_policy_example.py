"""The policy that docs/policies.md shows is a whole one, and works."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from copus_ext.core.plan import Plan
from copus_ext.core.planner.policy import Options, Policy, PolicySettings
from tests.unit.situations import CURRENT, DATA, line, situation

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


def example() -> str:
    """The code block under "Adding a policy"."""
    section = DOCS.read_text(encoding="utf-8").partition("## Adding a policy\n")[2]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found
    return found[1]


Halftime = Callable[[str], Policy]


@pytest.fixture
def halftime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Halftime:
    """The example as a file of its own, made as the flag would make it."""
    (tmp_path / "halftime.py").write_text(example())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "halftime", raising=False)
    module = importlib.import_module("halftime")

    def made(text: str) -> Policy:
        options = Options(text)
        policy: Policy = module.make(PolicySettings(text), CURRENT, options)
        options.check_all_read()
        return policy

    return made


def test_it_is_short() -> None:
    assert len(example().splitlines()) <= 30


def test_it_doubles_the_batch_once_at_its_share_of_the_samples(halftime: Halftime) -> None:
    state = situation(line(DATA, 1.0, 1 / 16), None, train_samples=4000)  # 1600 samples are consumed: 40 %
    early = halftime("halftime").decide(state)
    assert (early.chosen, early.reason) == (CURRENT, "stay: 40 % of the samples are consumed, and 50 % are needed")
    due = halftime("halftime:share=0.4").decide(state)
    assert due.chosen == Plan(DATA, 1, 32)
    assert due.reason.startswith("switch to dp4,mbs1,gbs32: 40 %")
    again = situation(line(DATA, 1.0, 1 / 16), None, train_samples=4000, current=due.chosen)
    assert not halftime("halftime:share=0.4").decide(again).is_switch


def test_it_takes_no_for_an_answer(halftime: Halftime) -> None:
    refused = {Plan(DATA, 1, 32): "upstream says no"}
    state = situation(line(DATA, 1.0, 1 / 16), None, train_samples=2000, rejected=refused)
    assert not halftime("halftime").decide(state).is_switch
