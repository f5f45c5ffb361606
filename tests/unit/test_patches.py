"""The registry of patches: fingerprints, idempotence, and the installations it refuses. Upstream is the real one."""

from __future__ import annotations

import importlib.metadata
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest

from copus_ext.core.errors import UserError
from megatron.patches import all_patches, registry

ROOT = Path(__file__).parents[2]
CHECK = "from megatron.patches.registry import check_installation; check_installation()"


def run_python(program: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin", **environment},
        check=False,
    )


def test_every_patch_says_what_it_is() -> None:
    patches = all_patches()
    assert len({patch.name for patch in patches}) == len(patches)
    for patch in patches:
        assert patch.upstream
        assert all((patch.why, patch.issue, patch.remove_when))


def test_every_fingerprint_fits_what_is_installed() -> None:
    assert {patch.name: registry.mismatches(patch) for patch in all_patches()} == {p.name: [] for p in all_patches()}
    assert set(registry.recorded_fingerprints()) == set(registry.fingerprinted_names(all_patches()))


def test_applying_twice_wraps_once() -> None:
    wrapped: list[str] = []
    name = "megatron.core.parallel_state.create_group"
    patch = registry.Patch("twice", (name,), "why", "issue", "when", lambda: wrapped.append("once"))
    assert registry.apply_patches([patch]) == ["twice"]
    assert registry.apply_patches([patch]) == []
    assert wrapped == ["once"]
    registry.applied_names().discard("twice")


def test_an_upstream_that_has_moved_on_is_refused_before_anything_changes() -> None:
    changed: list[str] = []
    good = registry.Patch("good", (), "why", "issue", "when", lambda: changed.append("good"))
    stale = registry.Patch("stale", ("megatron.core.parallel_state.gone",), "why", "issue", "when", lambda: None)
    with pytest.raises(UserError, match=r"patch stale .*parallel_state\.gone"):
        registry.apply_patches([good, stale])
    assert changed == []


def test_another_version_is_refused_in_one_line() -> None:
    with (
        mock.patch.object(importlib.metadata, "version", return_value="0.18.0"),
        pytest.raises(UserError, match=r"megatron-core 0\.18\.0 is installed; pip install megatron-core==0\.19\.2"),
    ):
        registry.check_installation()


def test_a_checkout_that_shadows_the_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").write_text("")
    done = run_python(CHECK, ROOT, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode
    assert str(tmp_path / "megatron" / "core") in done.stderr.splitlines()[-1]


def test_an_init_file_in_megatron_is_named(tmp_path: Path) -> None:
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("")
    (tmp_path / "megatron" / "patches").symlink_to(ROOT / "megatron" / "patches")
    done = run_python(CHECK, tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode
    assert str(tmp_path / "megatron" / "__init__.py") in done.stderr.splitlines()[-1]


def test_listing_tells_every_patch_and_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(sys, "argv", ["patches"]), warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        runpy.run_module("megatron.patches", run_name="__main__")
    listed = capsys.readouterr().out
    assert ended.value.code == 0
    for patch in all_patches():
        assert f"\n{patch.name}\n" in listed
    assert listed.count("state     fits") == len(all_patches())
