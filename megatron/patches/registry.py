"""What a patch of upstream Megatron is, and the explicit call that applies one.

A patch wraps what upstream has; it never copies it. Before anything is changed, every upstream object that a patch
names is compared with the fingerprint recorded for the pinned version (``fingerprints.json``), so that a Megatron that
has moved on stops the run with one line instead of training wrongly.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copus_ext.core.errors import UserError

UPSTREAM_VERSION = "0.19.2"
_FINGERPRINTS = Path(__file__).with_name("fingerprints.json")
_APPLIED = "_copus_applied_patches"  # the one mark we leave on upstream: a set of names on the megatron.core module


@dataclass(frozen=True)
class Patch:
    """One change to upstream at run time.

    ``upstream`` are dotted names of the objects wrapped or replaced; those under ``megatron.`` are fingerprinted.
    ``apply`` makes the change; it is called once per process, after the fingerprints agreed.
    """

    name: str
    upstream: tuple[str, ...]
    why: str
    issue: str
    remove_when: str
    apply: Callable[[], None]


def resolve(dotted: str) -> Any:
    """The object that a dotted name such as ``megatron.training.training.train`` means.

    Raises:
        AttributeError: no such object in what is installed.
    """
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(f"no module of {dotted} can be imported")


def fingerprint(dotted: str) -> str:
    """First 16 hex digits of the SHA-256 of an upstream object's source (wrappers are looked through)."""
    return hashlib.sha256(inspect.getsource(resolve(dotted)).encode()).hexdigest()[:16]


def recorded_fingerprints() -> dict[str, str]:
    """The fingerprints recorded for :data:`UPSTREAM_VERSION`, by dotted name."""
    recorded: dict[str, str] = json.loads(_FINGERPRINTS.read_text())
    return recorded


def fingerprinted_names(patches: Iterable[Patch]) -> list[str]:
    """The upstream names that have a fingerprint: Megatron's own (torch is held by its version bounds)."""
    return sorted({name for patch in patches for name in patch.upstream if name.startswith("megatron.")})


def record_fingerprints(patches: Iterable[Patch]) -> None:
    """Write the fingerprints of what is installed now: a deliberate act after reading what upstream changed."""
    table = {name: fingerprint(name) for name in fingerprinted_names(patches)}
    _FINGERPRINTS.write_text(json.dumps(table, indent=2) + "\n")


def mismatches(patch: Patch) -> list[str]:
    """Upstream names of a patch that are missing or not what the patch was written for."""
    recorded = recorded_fingerprints()
    wrong = []
    for name in patch.upstream:
        try:
            differs = name in fingerprinted_names([patch]) and fingerprint(name) != recorded.get(name)
            resolve(name)
        except (AttributeError, OSError, TypeError):
            differs = True
        if differs:
            wrong.append(name)
    return wrong


def applied_names() -> set[str]:
    """Names of the patches this process has applied."""
    names: set[str] = vars(importlib.import_module("megatron.core")).setdefault(_APPLIED, set())
    return names


def apply_patches(patches: Iterable[Patch]) -> list[str]:
    """Check every patch, then apply those not yet applied. Calling it again does nothing.

    Returns:
        The names applied by this call.

    Raises:
        UserError: the installed Megatron is not the one the patches were written for. Nothing has been changed then.
    """
    check_installation()
    pending = [patch for patch in patches if patch.name not in applied_names()]
    for patch in pending:
        wrong = mismatches(patch)
        if wrong:
            raise UserError(
                f"patch {patch.name} does not fit the installed megatron-core: {', '.join(wrong)} changed; "
                f"install megatron-core=={UPSTREAM_VERSION}"
            )
    for patch in pending:
        patch.apply()
        applied_names().add(patch.name)
    return [patch.name for patch in pending]


def check_installation() -> None:
    """Refuse a Megatron that the project cannot stand on, in one line.

    Raises:
        UserError: another megatron-core version, a Megatron-LM checkout that shadows the package, or a
            ``megatron/__init__.py`` that hides it.
    """
    import megatron

    spoiler = getattr(megatron, "__file__", None)
    if spoiler:
        raise UserError(f"{spoiler} makes `megatron` an ordinary package and hides the installed one; delete that file")
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"megatron-core is not installed; pip install megatron-core=={UPSTREAM_VERSION}") from None
    if version != UPSTREAM_VERSION:
        raise UserError(f"megatron-core {version} is installed; pip install megatron-core=={UPSTREAM_VERSION}")
    for portion in ("megatron.core", "megatron.training"):
        _check_portion(portion)


def _check_portion(portion: str) -> None:
    """Refuse a ``megatron.core`` or ``megatron.training`` that does not come from the installed wheel."""
    spec = importlib.util.find_spec(portion)
    wheel = Path(str(importlib.metadata.distribution("megatron-core").locate_file("")))
    if spec is None or spec.origin is None:
        raise UserError(f"{portion} cannot be found; pip install megatron-core=={UPSTREAM_VERSION}")
    if not Path(spec.origin).resolve().is_relative_to(wheel.resolve()):
        raise UserError(
            f"{portion} comes from {Path(spec.origin).parent}, not from the installed megatron-core "
            f"{UPSTREAM_VERSION}; take that checkout off PYTHONPATH"
        )
