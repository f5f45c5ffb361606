"""Hardware from files: what is shipped is complete, and what is wrong in a file is said in one line."""

from __future__ import annotations

import tomllib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from copus_ext.core.cost.constants import fitted_constants
from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.hardware_file import hardware_of_gpu, in_nodes_of, load_hardware, shipped_hardware
from copus_ext.core.errors import UserError

WHOLE = """
flops = 1e15
memory_bandwidth = 1e12
memory_bytes = 1e11
intra_node_bandwidth = 1e11
inter_node_bandwidth = 1e10
latency_s = 0
step_overhead_s = 0.0
layer_overhead_s = 1e-4
devices_per_node = 4
[reached]
matmul = 0.7
data_exposed = 0
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", shipped_hardware())
def test_shipped_files_say_everything_and_say_it_from_a_source(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.node_flops == hardware.flops * hardware.devices_per_node
    assert hardware.inter_node_bandwidth < hardware.intra_node_bandwidth < hardware.memory_bandwidth
    text = (Path(__file__).parents[2] / "copus_ext" / "hardware" / f"{name}.toml").read_text()
    assert "data sheet" in text
    assert "reached" not in tomllib.loads(text), "what is fitted stands in one place"
    assert hardware.reached == fitted_constants().reached
    assert 0 < hardware.reached.matmul < 1, "a step does not reach what stands on the box"


def test_names_are_found_whatever_their_case() -> None:
    assert shipped_hardware() == ["a100", "b200", "gb200", "h100", "h200", "mi210", "mi250x"]
    assert load_hardware("H100") == load_hardware("h100")


def test_another_number_of_devices_makes_another_node() -> None:
    assert load_hardware("h100", 4) == replace(
        load_hardware("h100"), devices_per_node=4, node_flops=4 * load_hardware("h100").flops
    )


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    hardware = load_hardware(written(tmp_path, WHOLE))
    assert (hardware.flops, hardware.node_flops, hardware.devices_per_node) == (1e15, 4e15, 4)
    assert (hardware.reached.matmul, hardware.reached.data_exposed) == (0.7, 0)
    assert hardware.reached.attention == fitted_constants().reached.attention, "what is left out is as fitted"
    short = WHOLE.replace("latency_s = 0\nstep_overhead_s = 0.0\nlayer_overhead_s = 1e-4\n", "")
    assert load_hardware(written(tmp_path, short)).latency_s == fitted_constants().latency_s


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("flops = 1e15", "", "flops is missing"),
        ("flops = 1e15", "flops = 'fast'", "flops = 'fast'"),
        ("flops = 1e15", "flops = true", "flops = True"),
        ("flops = 1e15", "flops = nan", "flops = nan"),
        ("flops = 1e15", "flops = 0", "positive"),
        ("latency_s = 0", "latency_s = -1", "not negative"),
        ("flops = 1e15", "flops = 1e15\nnode_size = 8", "node_size is not known; there are flops"),
        ("matmul = 0.7", "matmull = 0.7", "reached.matmull is not known; there are matmul"),
        ("matmul = 0.7", "matmul = 0", "reached.matmul = 0"),
        ("devices_per_node = 4", "devices_per_node = 2.5", "whole number"),
        ("flops = 1e15", "flops = ", "TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name_and_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = written(tmp_path, WHOLE.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_hardware(path, flag="--copus-hardware")
    message = str(error.value)
    assert says in message
    assert message.startswith(f"--copus-hardware: {path}")
    assert "\n" not in message


def test_reached_must_be_a_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"write \[reached\]"):
        load_hardware(written(tmp_path, "reached = 0.5" + WHOLE.partition("[reached]")[0]))


def test_a_file_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--hardware: there is no file b100; .* a100, b200, gb200, h100"):
        load_hardware("b100")
    with pytest.raises(UserError, match="there is no file"):
        load_hardware(str(tmp_path))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="can't be read as TOML"):
        load_hardware(str(tmp_path / "x.toml"))


def test_cpu_is_measured_and_not_read() -> None:
    with pytest.raises(UserError, match="measured when a run starts"):
        load_hardware("CPU")


@pytest.mark.parametrize(
    ("reported", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("AMD Instinct MI250X", "mi250x"),
        ("AMD Instinct MI210", "mi210"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L4", "a100"),  # not known: a guess that measuring corrects
    ],
)
def test_the_file_of_a_gpu_by_the_name_it_reports(reported: str, file: str) -> None:
    found = hardware_of_gpu(reported, devices_per_node=4, memory_bytes=5e10)
    assert found == replace(load_hardware(file, 4), memory_bytes=5e10)


def test_links_of_a_node_reach_no_further_than_the_file_says() -> None:
    hive: Hardware = load_hardware("mi210")
    assert in_nodes_of(hive, 8) == hive
    assert hardware_of_gpu("AMD Instinct MI210", 8, hive.memory_bytes) == hive
    assert in_nodes_of(hive, 2) == load_hardware("mi210", 2)


def test_a_run_takes_the_hardware_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from copus_ext.run.hardware import describe_hardware

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert describe_hardware(Namespace(copus_hardware="H100", world_size=8)) == load_hardware("h100", 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--copus-hardware cpu: the ranks run on GPUs"):
        describe_hardware(Namespace(copus_hardware="cpu", world_size=8))
