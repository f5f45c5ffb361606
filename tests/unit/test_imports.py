"""The direction of imports: core <- adapters <- run, and nothing pure that reaches for torch or Megatron."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "copus_ext"
FORBIDDEN = {
    "core": ("torch", "megatron", "copus_ext.adapters", "copus_ext.run"),
    "adapters": ("copus_ext.run",),
}


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_go_one_way(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        for name in imported_names(path):
            assert not name.startswith(FORBIDDEN[part]), f"{path.relative_to(PACKAGE)} imports {name}"


def test_importing_the_core_loads_neither_torch_nor_megatron() -> None:
    modules = [
        ".".join(("copus_ext", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in (PACKAGE / "core").rglob("*.py")
        if path.name != "__init__.py"
    ]
    program = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]; "
        "assert not {'torch', 'megatron'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_megatron_stays_a_namespace_package() -> None:
    assert not (PACKAGE.parent / "megatron" / "__init__.py").exists(), "it would hide the installed megatron.core"


def test_a_training_loop_of_ones_own_need_not_have_megatron_training() -> None:
    """``GradientNoise`` works with Megatron-Core alone."""
    seen, todo = set(), ["copus_ext.adapters.noise.gradient_noise"]
    while todo:
        module = todo.pop()
        path = PACKAGE.parent / Path(*module.split(".")).with_suffix(".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        names = names_imported_at_run_time(path)
        assert not any(name.startswith("megatron.training") for name in names), module
        todo += names
    assert "copus_ext.adapters.noise.adam" in seen, "the search went nowhere"


def names_imported_at_run_time(path: Path) -> set[str]:
    """What importing a file imports: neither what is there for type checkers nor what its functions import."""
    statements = ast.parse(path.read_text()).body
    found: set[str] = set()
    for node in statements:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found
