"""Policies by their names: one module of ``copus_ext.core.policies`` each."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path

from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.core.planner.policy import FLAG, Options, Policy, PolicySettings

_PACKAGE = "copus_ext.core.policies"  # by its name: policies know the planner, and it knows none of them
_FOLDER = Path(__file__).parents[1] / "policies"
POLICIES = tuple(sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules([str(_FOLDER)])))


def make_policy(settings: PolicySettings, base: Plan) -> Policy:
    """The policy that the flags ask for.

    Args:
        settings: what the flags say of it.
        base: the plan of upstream's own flags.

    Raises:
        UserError: no such policy, options that it does not have, or numbers that can't be.
    """
    settings.check()
    name = settings.name
    if name not in POLICIES:
        like = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"; did you mean {like[0]}?" if like else f"; choose one of {', '.join(POLICIES)}"
        raise UserError(f"{FLAG} {name}: there is no such policy{hint}")
    if settings.schedule is not None and name != "schedule":
        raise UserError(f"{FLAG} {name} does not follow --copus-schedule; use {FLAG} schedule")
    options = Options(settings.policy)
    module = importlib.import_module(f"{_PACKAGE}.{name.replace('-', '_')}")
    policy: Policy = module.make(settings, base, options)
    options.check_all_read()
    return policy
