"""Published measurements of training runs, one a line of a CSV file, as what the models of time and memory work on.

The columns are those of ``copus_ext/published/points.csv``. A column that is missing or empty says that the source does
not tell; what a row needs at least are the sizes of the model, the GPU, and how many of them.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import RunOptions
from copus_ext.core.errors import UserError
from copus_ext.core.plan import Layout, Plan

_NEEDED = ("layers", "hidden", "heads", "ffn", "vocab", "seq", "n_gpus", "gbs")

# Programs that are the same software under several names.
_FAMILY = {"mlm2022": "mlm2021", "vtrain": "mlm2021", "lumi": "mlm2021", "mcoreCI": "mcore", "mcore0.8": "mcore"}
# Publishers that report about the same software, on the same machines.
_NVIDIA = ("dgxc-benchmarking", "NVIDIA/NeMo", "nemo-framework", "NeMo-Megatron-Launcher")
# How each software ran, as its sources say or its defaults were at the time. One not listed: today's Megatron.
_OVERLAPPED = RunOptions(overlap_grad_reduce=True, overlap_param_gather=True)
_NEMO = replace(_OVERLAPPED, tp_comm_overlap=True, gradient_bytes=2)
_STACKS = {
    "nemo25": _NEMO,
    "nemo24": _NEMO,
    "bridge25": _NEMO,
    "bridge26": _NEMO,
    "mcore": replace(_OVERLAPPED, tp_comm_overlap=True),
    "mlm2021": RunOptions(gradient_bytes=2, dropout=True, overlap_p2p=False, scatter_gather=True),
    "bigscience": RunOptions(gradient_bytes=2, overlap_p2p=False, scatter_gather=True),
    "nanotron": RunOptions(overlap_p2p=False),
}
# Bytes/s of a GPU's way out of its node, where a source tells of another than usual: 100 Gbit/s, 4 x 100 Gbit/s for 8.
_FABRICS = {"vtrain": 12.5e9, "bigscience": 6.25e9}


@dataclass(frozen=True)
class Point:
    """One row. Sizes that the source does not give are None: the micro-batch, the chunks of the pipeline."""

    row: Mapping[str, str]
    model: ModelShape
    layout: Layout
    micro_batch: int | None
    vpp: int | None
    global_batch: int
    gpu: str
    gpus: int
    options: RunOptions
    inter_node_bandwidth: float | None

    @property
    def source(self) -> str:
        """Who published it."""
        return self.row.get("source", "")

    @property
    def publisher(self) -> str:
        """Whose pages or papers the source is one of: several releases of one benchmark are not independent."""
        word = self.source.split(" ", 1)[0]
        return "nvidia" if any(name in word for name in _NVIDIA) else word if word != "arXiv" else self.source

    @property
    def division(self) -> str:
        """The model and how it is divided among ranks; how many replicas there are does not count."""
        layout = self.layout
        return f"{self.model} tp{layout.tp} pp{layout.pp} vpp{self.vpp} cp{layout.cp} ep{layout.ep}"

    @property
    def stack(self) -> str:
        """With what software it was measured, without the precision."""
        return family(self.row.get("stack", ""))

    def plan(self, micro_batch: int, vpp: int) -> Plan:
        """The plan, with what the source leaves open."""
        return Plan(replace(self.layout, vpp=vpp), micro_batch, self.global_batch)

    @property
    def step_time_s(self) -> float | None:
        """Measured seconds of a step: as given, or from tokens per second, or from FLOP/s; None if none is given."""
        if seconds := _number(self.row, "step_time_s"):
            return seconds
        tokens = self.global_batch * self.model.seq
        if rate := _number(self.row, "tokens_per_s_per_gpu"):
            return tokens / (rate * self.gpus)
        if rate := _number(self.row, "tflops_per_gpu"):
            return _flops(self) / (rate * 1e12 * self.gpus)
        return None


def family(stack: str) -> str:
    """The software that a name in the column ``stack`` stands for, whatever its precision."""
    name = stack.removesuffix("fp8")
    return _FAMILY.get(name, name)


def _flops(point: Point) -> float:
    """FLOPs of a step as the source counts them: with recompute, Narayanan et al. 2021 (arXiv 2104.04473, eq. 3)."""
    model, batch = point.model, point.global_batch
    flops = model.flops_per_sequence() * batch
    if not point.row.get("flops_kind", "").startswith("hardware"):
        return flops
    head = 6.0 * batch * model.seq * model.embedding_params
    return (flops - head) * 4 / 3 + head


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a file of points, as text.

    Raises:
        UserError: a file that is not there, or lacks a column that no prediction can do without.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise UserError(f"--points {path}: {reason}; give a CSV file like copus_ext/published/points.csv") from None
    if missing := [name for name in (*_NEEDED, "gpu") if name not in (reader.fieldnames or ())]:
        raise UserError(f"--points {path} has no column {', '.join(missing)}; see copus_ext/published/points.csv")
    return rows


def read_points(path: str | Path) -> list[Point | None]:
    """Every row of the file; None for one that says too little to predict anything.

    Raises:
        UserError: as :func:`read_rows`, and a value that can't be; the message names the line.
    """
    points = []
    for line, row in enumerate(read_rows(path), start=2):
        try:
            points.append(_point(row))
        except ValueError as error:
            raise UserError(f"--points {path}: line {line}: {error}; correct it, or leave it empty") from None
    return points


def _point(row: dict[str, str]) -> Point | None:
    if not all(_number(row, name) for name in _NEEDED):
        return None
    sizes = {name: int(_number(row, name) or 1) for name in ("tp", "pp", "cp", "ep")}
    gpus = int(_number(row, "n_gpus") or 1)
    layout = Layout(
        dp=gpus // (sizes["tp"] * sizes["pp"] * sizes["cp"]),
        **sizes,
        sequence_parallel=_flag(row, "sp", False),
        distributed_optimizer=_flag(row, "zero1", True),
        recompute=row.get("recompute") or "none",
    )
    options = _STACKS.get(family(row.get("stack", "")), _OVERLAPPED)
    return Point(
        row=row,
        model=_model(row),
        layout=layout,
        micro_batch=_whole(row, "mbs"),
        vpp=1 if sizes["pp"] == 1 else _whole(row, "vpp"),
        global_batch=int(_number(row, "gbs") or 1),
        gpu=row["gpu"],
        gpus=gpus,
        options=replace(options, fp8=row.get("precision") == "fp8"),
        inter_node_bandwidth=_FABRICS.get(row.get("stack", "")),
    )


def _model(row: Mapping[str, str]) -> ModelShape:
    heads = _whole(row, "heads") or 1
    experts = _whole(row, "experts") or 0
    return ModelShape(
        layers=_whole(row, "layers") or 1,
        hidden=_whole(row, "hidden") or 1,
        heads=heads,
        kv_heads=_whole(row, "kv_heads") or heads,
        ffn=_whole(row, "ffn") or 1,
        vocab=_whole(row, "vocab") or 1,
        seq=_whole(row, "seq") or 1,
        gated=_flag(row, "gated", False),
        tied=_flag(row, "tied", False),
        experts=experts,
        experts_per_token=_whole(row, "experts_per_token") or 1,
        moe_ffn=(_whole(row, "moe_ffn") or _whole(row, "ffn") or 1) if experts else 0,
        param_bytes=4 if row.get("precision") == "fp32" else 2,
        flash_attention=(row.get("attn") or "flash") == "flash",
    )


def _number(row: Mapping[str, str], name: str) -> float | None:
    text = (row.get(name) or "").strip()
    return float(text) if text else None


def _whole(row: Mapping[str, str], name: str) -> int | None:
    number = _number(row, name)
    return None if number is None else int(number)


def _flag(row: Mapping[str, str], name: str, default: bool) -> bool:
    number = _number(row, name)
    return default if number is None else bool(number)
