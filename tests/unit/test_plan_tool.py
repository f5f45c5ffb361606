"""``tools/plan.py``: what it prints can be trusted and used, and bad input is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import plan as tool
from copus_ext.core.cost.known_models import KNOWN_MODELS
from copus_ext.core.cost.memory import peak_bytes
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.cost.plan_table import PlanTable
from copus_ext.core.plan import Layout, Plan, parse_plan

LLAMA3_8B = (
    "--num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention --num-query-groups 8 "
    "--ffn-hidden-size 14336 --swiglu --untie-embeddings-and-output-weights --seq-length 8192 --vocab-size 128256"
)
SMALL = "--model gpt2-124m --hardware h100 --gpus 8 --global-batch 64"


def written(folder: Path, flags: str) -> dict[str, Any]:
    out = folder / "out.json"
    assert tool.main([*flags.split(), "--json", str(out)]) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def refusal(flags: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert tool.main(flags.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("plan.py: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_a_plan_that_is_printed_can_be_given_to_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(f"{SMALL} --top 2".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("global batch 64"))
    words = [line.split()[0] for line in lines[first + 1 : first + 3]]
    base = Plan(Layout(dp=8), 1, 64)
    assert [str(parse_plan(word, base)) for word in words] == words
    assert "ruled out:" in lines


def test_the_file_has_every_figure_and_they_agree(tmp_path: Path) -> None:
    result = written(tmp_path, f"{SMALL[:-2]}64..256 --top 4")
    assert list(result["plans"]) == ["64", "128", "256"]
    assert result["seconds_to_score"] > 0
    assert sum(result["ruled_out"].values()) + result["timed"] == result["considered"]
    assert result["candidates"] >= result["timed"]
    for batch, entries in result["plans"].items():
        assert len(entries) == 4
        assert [entry["step_s"] for entry in entries] == sorted(entry["step_s"] for entry in entries)
        for entry in entries:
            assert entry["global_batch"] == int(batch)
            assert sum(entry["parts"].values()) == pytest.approx(entry["step_s"])
            assert entry["tokens_per_s_per_gpu"] * 8 * entry["step_s"] == pytest.approx(int(batch) * 1024)
            assert 0 < entry["mfu"] < 1


def test_memory_is_that_of_the_plan(tmp_path: Path) -> None:
    result = written(tmp_path, f"{SMALL} --top 1")
    (entry,) = result["plans"]["64"]
    table = PlanTable.of([parse_plan(entry["plan"], Plan(Layout(dp=8), 1, 64))])
    options = RunOptions(**result["options"])
    padded = replace(KNOWN_MODELS["gpt2-124m"].shape, vocab=result["model"]["vocab"])
    assert entry["memory_bytes"] == pytest.approx(float(peak_bytes(table, padded, options)[0]))


def test_flags_of_megatron_describe_the_same_model(tmp_path: Path) -> None:
    rest = "--hardware h100 --gpus 8 --global-batch 64 --top 1"
    known, described = written(tmp_path, f"--model Llama3-8B {rest}"), written(tmp_path, f"{LLAMA3_8B} {rest}")
    assert {**known["model"], "name": ""} == {**described["model"], "name": ""}
    assert known["plans"] == described["plans"]


def test_flags_change_a_known_model(tmp_path: Path) -> None:
    rest = "--hardware h100 --gpus 64 --global-batch 64 --top 1"
    model = written(tmp_path, f"--model llama3-8b --seq 4096 --num-experts 8 {rest}")["model"]
    assert (model["seq"], model["experts"], model["experts_per_token"], model["moe_ffn"]) == (4096, 8, 2, 14336)
    model = written(tmp_path, f"--model llama3-8b --num-experts 8 --moe-router-topk 1 --fp8-format hybrid {rest}")[
        "model"
    ]
    assert (model["experts_per_token"], model["gated"], model["tied"]) == (1, True, False)


def test_defaults_are_those_of_megatron(tmp_path: Path) -> None:
    few = "--num-layers 4 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 --vocab-size 50257"
    rest = "--hardware h100 --gpus 1 --global-batch 8 --top 1"
    plain = written(tmp_path, f"{few} {rest}")["model"]
    assert (plain["ffn"], plain["kv_heads"], plain["tied"], plain["vocab"]) == (4096, 16, True, 50304)
    assert written(tmp_path, f"{few} --swiglu {rest}")["model"]["ffn"] == 2688
    experts = written(tmp_path, f"{few} --num-experts 4 {rest}")["model"]
    assert (experts["experts_per_token"], experts["moe_ffn"]) == (2, 4096)


def test_what_is_asked_for_is_all_that_is_looked_at(tmp_path: Path) -> None:
    space = ["--space", "tp=2 pp=1,2 vpp=1 cp=1 mbs=2 sp=0 zero1=1"]
    out = tmp_path / "out.json"
    assert tool.main([*f"{SMALL} --recompute full --top 9 --json {out}".split(), *space]) == 0
    found = {entry["plan"] for entry in json.loads(out.read_text())["plans"]["64"]}
    assert found == {
        "dp4,tp2,zero1,recompute-full,mbs2,gbs64",
        "dp2,tp2,pp2,zero1,recompute-full,mbs2,gbs64",
    }


def test_where_nothing_fits_it_says_what_comes_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main("--model llama3.1-405b --hardware h100 --gpus 8 --global-batch 8,7".split()) == 1
    printed = capsys.readouterr().out
    assert "no plan fits; the smallest, " in printed
    assert "does not fit: needs" in printed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--hardware h100", "--gpus"),
        ("--model gpt2-124m --hardware h100 --gpus none", "--gpus: 'none' is not a whole number"),
        ("--model gpt2-124m --hardware h100 --gpus 0", "--gpus: '0'"),
        ("--model gpt2-124m --hardware b100 --gpus 8", "--hardware: there is no file b100"),
        ("--model gpt2-124m --hardware cpu --gpus 8", "measured when a run starts"),
        ("--model gpt9 --hardware h100 --gpus 8", "--model gpt9 is not known"),
        ("--hardware h100 --gpus 8", "--num-layers is missing"),
        (f"{SMALL} --hidden-size 1000", "--hidden-size 1000 is not divisible"),
        (f"{SMALL} --num-query-groups 5", "--num-query-groups 5"),
        (f"{SMALL} --num-experts 2 --moe-router-topk 3", "--moe-router-topk 3"),
        (f"{SMALL} --global-batch 8..4", "--global-batch '8..4'"),
        (f"{SMALL} --global-batch many", "--global-batch 'many'"),
        (f"{SMALL} --global-batch 0", "--global-batch '0'"),
        (f"{SMALL} --space dp=2", "--space: 'dp=2'"),
        (f"{SMALL} --space tp=0", "--space: '0' are no values for tp"),
        (f"{SMALL} --space sp=yes", "write sp=0,1"),
        (f"{SMALL} --recompute some", "--recompute 'some'"),
        (f"{SMALL} --json /nowhere/at/all.json", "--json /nowhere/at/all.json can't be written"),
        (f"{SMALL} --fast", "--fast"),
        (f"{LLAMA3_8B.replace('--num-query-groups 8', '')} --hardware h100 --gpus 8", "--num-query-groups"),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(flags: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refusal(flags, capsys)


def test_flags_are_called_as_upstream_calls_them() -> None:
    from megatron.training.arguments import add_megatron_arguments

    upstream = {flag for action in add_megatron_arguments(tool._Parser())._actions for flag in action.option_strings}
    groups = [group for group in tool._parser()._action_groups if group.title and "Megatron" in group.title]
    assert len(groups) == 2
    ours = {action.option_strings[0] for group in groups for action in group._group_actions}
    assert ours <= upstream


def test_it_starts_without_torch_or_megatron() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(tool.__file__).parent)!r}); import plan; "
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(tool.__file__).parents[1])
