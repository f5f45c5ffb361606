"""Every second is told of once, in the innermost block."""

from __future__ import annotations

from unittest import mock

from copus_ext.adapters import phases as module
from copus_ext.adapters.phases import Phases


def test_what_is_within_a_block_is_not_counted_twice() -> None:
    phases, clock = Phases(), [0.0, 10.0, 11.0, 14.0, 20.0, 32.0, 40.0, 41.0]
    with mock.patch.object(module.time, "perf_counter", side_effect=clock):
        with phases("move"):  # from 0 to 32
            with phases("verify"), phases("plan"):  # from 10 to 20, and from 11 to 14
                pass
            phases.add("verify", 2.0)
        with phases("move"):  # from 40 to 41
            pass
    assert phases.seconds == {"plan": 3.0, "verify": 7.0 + 2.0, "move": 20.0 + 1.0}
