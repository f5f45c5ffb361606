from __future__ import annotations

import math

import pytest

from copus_ext.core.errors import UserError
from copus_ext.core.learning_rate import LR_RULES, learning_rate_factor


def test_rules_at_four_times_the_batch() -> None:
    assert {rule: learning_rate_factor(rule, 64, 16) for rule in LR_RULES} == {"sqrt": 2.0, "linear": 4.0, "none": 1.0}


@pytest.mark.parametrize("rule", LR_RULES)
def test_there_and_back_again_is_one(rule: str) -> None:
    there, back = learning_rate_factor(rule, 48, 16), learning_rate_factor(rule, 16, 48)
    assert math.isclose(there * back, 1.0, rel_tol=1e-15)
    assert learning_rate_factor(rule, 16, 16) == 1.0


def test_an_unknown_rule_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--copus-lr-rule cubic.*sqrt, linear, none"):
        learning_rate_factor("cubic", 2, 1)
