from __future__ import annotations

from pathlib import Path

import pytest

from copus_ext.core.cost.points import Point, read_points
from copus_ext.core.cost.published import POINTS, open_plans
from copus_ext.core.errors import UserError

HEAD = "source,model,layers,hidden,heads,kv_heads,ffn,vocab,seq,gpu,n_gpus,tp,pp,vpp,cp,sp,zero1,recompute,mbs,gbs,"
HEAD += "tflops_per_gpu,tokens_per_s_per_gpu,step_time_s,flops_kind,precision,gated,tied,stack"
GPT = "a paper,gpt,24,2048,16,16,8192,50304,2048,H100,16,2,2,1,1,1,1,none,2,64"


def one(tmp_path: Path, line: str) -> Point:
    path = tmp_path / "points.csv"
    path.write_text(f"{HEAD}\n{line}\n")
    point = read_points(path)[0]
    assert point is not None
    return point


def test_a_row_becomes_a_plan_of_a_model(tmp_path: Path) -> None:
    point = one(tmp_path, f"{GPT},,,1.5,,bf16,0,1,mcore")
    assert [str(plan) for plan in open_plans(point)] == ["dp4,tp2,pp2,sp,zero1,mbs2,gbs64"]
    assert (point.model.layers, point.model.param_bytes, point.model.tied, point.gpus) == (24, 2, True, 16)
    assert point.step_time_s == 1.5


def test_step_times_follow_from_whatever_the_source_reports(tmp_path: Path) -> None:
    tokens = 64 * 2048
    assert one(tmp_path, f"{GPT},,1000,,,bf16,0,1,mcore").step_time_s == pytest.approx(tokens / 16_000)
    point = one(tmp_path, f"{GPT},200,,,model,bf16,0,1,mcore")
    layer = 12 * 2048**2
    model_flops = 6 * tokens * (24 * layer + 2048 * 50304) + 12 * 24 * tokens * 2048 * 2048
    assert point.step_time_s == pytest.approx(model_flops / (200e12 * 16))
    head = 6 * tokens * 2048 * 50304
    again = one(tmp_path, f"{GPT},200,,,hardware_with_recompute,bf16,0,1,mcore")
    assert again.step_time_s == pytest.approx(((model_flops - head) * 4 / 3 + head) / (200e12 * 16))
    assert one(tmp_path, f"{GPT},,,,,bf16,0,1,mcore").step_time_s is None


def test_what_a_source_leaves_open_may_be_anything_that_fits(tmp_path: Path) -> None:
    line = GPT.replace("2,2,1,1,1,1,none,2,64", "2,2,,1,1,1,none,,64")
    plans = open_plans(one(tmp_path, f"{line},,,1.5,,bf16,0,1,mcore"))
    assert {plan.micro_batch for plan in plans} == {1, 2, 4}
    assert {plan.layout.vpp for plan in plans} == {1, 2, 3, 4, 6, 12}
    assert all(plan.layout.vpp == 1 or plan.num_microbatches % 2 == 0 for plan in plans)


def test_software_with_several_names_is_one(tmp_path: Path) -> None:
    assert one(tmp_path, f"{GPT},,,1.5,,fp8,0,1,nemo24fp8").stack == "nemo24"
    assert one(tmp_path, f"{GPT},,,1.5,,fp8,0,1,nemo24fp8").options.fp8
    assert one(tmp_path, f"{GPT},,,1.5,,fp16,0,1,vtrain").stack == "mlm2021"


def test_a_row_that_tells_too_little_is_none_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(f"{HEAD}\n{GPT.replace(',24,', ',,')},,,1.5,,bf16,0,1,mcore\n")
    assert read_points(path) == [None]
    path.write_text(f"{HEAD}\n{GPT},,,1.5,,bf16,0,1,mcore\n{GPT.replace(',24,', ',many,')},,,1.5,,bf16,0,1,mcore\n")
    with pytest.raises(UserError, match=r"line 3.*many"):
        read_points(path)


def test_a_file_without_what_is_needed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--points .*nowhere\.csv"):
        read_points(tmp_path / "nowhere.csv")
    path = tmp_path / "points.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no column layers"):
        read_points(path)


def test_every_shipped_point_says_where_it_is_from_and_can_be() -> None:
    points = read_points(POINTS)
    told = [point for point in points if point is not None]
    assert len(told) > 350
    for point in told:
        assert point.source
        assert point.step_time_s
        assert open_plans(point), f"{point.source}: no plan has these sizes"
        share = point.model.flops_per_sequence() * point.global_batch / point.step_time_s / point.gpus
        assert 1e13 < share < 5e15, f"{point.source}: {share:.2g} FLOP/s on a GPU"
