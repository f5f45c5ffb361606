"""Policies by their names: one module of :mod:`copus_ext.core.policies` each."""

from __future__ import annotations

import difflib
import importlib
import pkgutil

from copus_ext.core import policies
from copus_ext.core.errors import UserError
from copus_ext.core.plan import Plan
from copus_ext.core.policies.base import FLAG, Options, Policy, PolicySettings

_HELPERS = ("base",)  # modules beside the policies that are none

_MODULES = {module.name for module in pkgutil.iter_modules(policies.__path__)}
POLICIES = tuple(sorted(name.replace("_", "-") for name in _MODULES - set(_HELPERS)))


def make_policy(settings: PolicySettings, base: Plan) -> Policy:
    """The policy that the flags ask for.

    Args:
        settings: what the flags say of it.
        base: the plan of upstream's own flags.

    Raises:
        UserError: no such policy, or options that it does not have.
    """
    name = settings.name
    if name not in POLICIES:
        like = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"; did you mean {like[0]}?" if like else f"; choose one of {', '.join(POLICIES)}"
        raise UserError(f"{FLAG} {name}: there is no such policy{hint}")
    if settings.schedule is not None and name != "schedule":
        raise UserError(f"{FLAG} {name} does not follow --copus-schedule; use {FLAG} schedule")
    options = Options(settings.policy)
    policy: Policy = importlib.import_module(f"{policies.__name__}.{name.replace('-', '_')}").make(
        settings, base, options
    )
    options.check_all_read()
    return policy
