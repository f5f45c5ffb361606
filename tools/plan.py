"""Which layout should a training job have? ``python tools/plan.py --model llama3-70b --hardware h100 --gpus 512``.

Predicts memory and step time of every plan that Megatron allows, and prints the fastest ones for each global batch. The
model is a well-known one, or described by Megatron's own flags. Nothing is run, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from copus_ext.core.cost.hardware import Hardware
from copus_ext.core.cost.hardware_file import load_hardware, shipped_hardware
from copus_ext.core.cost.known_models import KNOWN_MODELS
from copus_ext.core.cost.model_shape import ModelShape
from copus_ext.core.cost.options import CUDA_CONTEXT_BYTES, RunOptions
from copus_ext.core.cost.search import SearchResult, SearchSpace, search_plans
from copus_ext.core.cost.step_time import PARTS
from copus_ext.core.errors import UserError
from copus_ext.core.plan import RECOMPUTE_CHOICES

_GIB = 2**30
_LARGEST = 2**31  # of any number: products of two of them are still exact
_DEFAULT_TOKENS = (2**20, 2**24)  # of a global batch, where none is named
# What the table shows of a step's parts; those that are not named are "other".
_SPLIT = {
    "compute": ("matmul", "attention", "traffic", "overhead"),
    "tensor": ("tensor",),
    "context": ("context",),
    "expert": ("expert",),
    "pipeline": ("pipeline", "bubble"),
    "data": ("data",),
    "optim": ("optimizer",),
}
_SHAPE_OF_FLAG = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_query_groups": "kv_heads",
    "ffn_hidden_size": "ffn",
    "seq_length": "seq",
    "vocab_size": "vocab",
    "num_experts": "experts",
    "moe_router_topk": "experts_per_token",
    "moe_ffn_hidden_size": "moe_ffn",
}
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size")


@dataclass(frozen=True)
class _Request:
    """What the flags ask for, checked."""

    name: str
    model: ModelShape
    hardware_name: str
    hardware: Hardware
    gpus: int
    space: SearchSpace
    options: RunOptions
    top: int
    json: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Search and print: 0 where there is a plan for some global batch, 1 where there is none, 2 for bad input."""
    try:
        request = _request(_parser().parse_args(argv))
        found = search_plans(request.model, request.hardware, request.gpus, request.space, request.options)
        if request.json:
            _write(request.json, _as_json(request, found))
    except UserError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(_report(request, found)))
    return 0 if len(found.table) else 1


# -- flags


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as for all other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    known, files = ", ".join(KNOWN_MODELS), ", ".join(shipped_hardware())
    parser.add_argument("--hardware", required=True, metavar="NAME", help=f"{files}, or a TOML file")
    parser.add_argument("--gpus", required=True, type=_count, metavar="N", help="devices of the whole job")
    parser.add_argument("--gpus-per-node", type=_count, metavar="N", help="instead of what the hardware's file says")
    parser.add_argument(
        "--model", metavar="NAME", help=f"{known}; Megatron's flags below change it or describe another"
    )
    parser.add_argument(
        "--global-batch",
        metavar="SIZES",
        help="sequences: 1000,2000 or 256..4096 by powers of two (default: those of 1 to 16 million tokens)",
    )
    parser.add_argument("--top", type=_count, default=3, metavar="N", help="plans to show for each global batch (3)")
    parser.add_argument(
        "--space",
        default="",
        help='sizes to choose from, like "tp=4,8 pp=8,16 vpp=1,2 cp=1 ep=8 mbs=1,2 sp=1 zero1=1" (default: all)',
    )
    parser.add_argument("--recompute", default=",".join(RECOMPUTE_CHOICES), metavar="NAMES", help="(all three)")
    parser.add_argument("--tp-across-nodes", action="store_true", help="try tensor parallelism beyond a node, too")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all of it to a file as well")
    _add_model_flags(parser.add_argument_group("model, as in Megatron"))
    _add_run_flags(parser.add_argument_group("how it is run, as in Megatron but for what is said to be on"))
    return parser


def _add_model_flags(group: Any) -> None:
    for name in _SHAPE_OF_FLAG:
        flags = [f"--{name.replace('_', '-')}", *(["--seq"] if name == "seq_length" else [])]
        group.add_argument(*flags, type=_count, metavar="N")
    group.add_argument("--group-query-attention", action="store_true", help="follows from --num-query-groups, too")
    group.add_argument("--swiglu", action="store_true")
    group.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    group.add_argument("--make-vocab-size-divisible-by", type=_count, default=128, metavar="N")
    group.add_argument("--account-for-embedding-in-pipeline-split", action="store_true")
    group.add_argument("--account-for-loss-in-pipeline-split", action="store_true")


def _add_run_flags(group: Any) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--bf16", action=switch, default=True, help="on; fp32 without it and --fp16")
    group.add_argument("--fp16", action="store_true")
    group.add_argument("--fp8-format", choices=("e4m3", "hybrid"))
    group.add_argument("--transformer-impl", choices=("transformer_engine", "local"), default="transformer_engine")
    group.add_argument("--overlap-grad-reduce", action=switch, default=True, help="on")
    group.add_argument("--overlap-param-gather", action=switch, default=True, help="on")
    group.add_argument("--no-overlap-p2p-communication", action="store_true")
    group.add_argument("--tp-comm-overlap", action="store_true")
    group.add_argument("--grad-reduce-in-bf16", action="store_true")
    group.add_argument("--no-gradient-accumulation-fusion", action="store_true")
    group.add_argument("--hidden-dropout", type=float, default=0.0, metavar="P", help="(0)")


def _count(text: str) -> int:
    try:
        (number,) = _several(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {_LARGEST:,}") from None
    return number


def _request(flags: argparse.Namespace) -> _Request:
    hardware = load_hardware(flags.hardware, flags.gpus_per_node)
    known = KNOWN_MODELS.get((flags.model or "").lower())
    if flags.model is not None and known is None:
        raise UserError(
            f"--model {flags.model} is not known; give one of {', '.join(KNOWN_MODELS)}, or Megatron's flags"
        )
    model = _shape(flags, known.shape if known else None)
    extra = flags.account_for_embedding_in_pipeline_split + flags.account_for_loss_in_pipeline_split
    space = SearchSpace(
        global_batches=_global_batches(flags.global_batch, model),
        recompute=_names(flags.recompute),
        tp_across_nodes=flags.tp_across_nodes,
        counted_as_layers=extra or (known.counted_as_layers if known else 0),
        **_sizes(flags.space),
    )
    return _Request(
        name=flags.model or "the model",
        model=_padded(model, space, hardware, flags),
        hardware_name=flags.hardware,
        hardware=hardware,
        gpus=flags.gpus,
        space=space,
        options=_options(flags),
        top=flags.top,
        json=flags.json,
    )


def _options(flags: argparse.Namespace) -> RunOptions:
    return RunOptions(
        context_bytes=CUDA_CONTEXT_BYTES,
        overlap_grad_reduce=flags.overlap_grad_reduce,
        overlap_param_gather=flags.overlap_param_gather,
        overlap_p2p=not flags.no_overlap_p2p_communication,
        tp_comm_overlap=flags.tp_comm_overlap,
        gradient_bytes=2 if flags.grad_reduce_in_bf16 else 4,
        dropout=flags.hidden_dropout > 0,
        fp8=flags.fp8_format is not None,
        fused_accumulation=not flags.no_gradient_accumulation_fusion,
        fused_adam=flags.transformer_impl == "transformer_engine",  # whose Adam upstream takes where it is there
    )


def _shape(flags: argparse.Namespace, known: ModelShape | None) -> ModelShape:
    """The known model with what the flags change, or all from flags with upstream's defaults; vocabulary not padded."""
    given = {shape: getattr(flags, name) for name, shape in _SHAPE_OF_FLAG.items() if getattr(flags, name) is not None}
    given = _with_defaults(flags, given) if known is None else {**asdict(known), **given}
    given["gated"] = flags.swiglu or bool(given.get("gated"))
    given["tied"] = bool(given.get("tied", True)) and not flags.untie_embeddings_and_output_weights
    given["flash_attention"] = flags.transformer_impl == "transformer_engine"
    given["param_bytes"] = 2 if flags.bf16 or flags.fp16 else 4
    if given["experts"]:
        given["moe_ffn"] = given["moe_ffn"] or given["ffn"]
        if flags.moe_router_topk is None and not (known and known.experts):
            given["experts_per_token"] = 2
    _check(given)
    return ModelShape(**given)


def _with_defaults(flags: argparse.Namespace, given: dict[str, Any]) -> dict[str, Any]:
    """What upstream's ``validate_args`` makes of flags that are left out."""
    if missing := [name for name in _NEEDED if _SHAPE_OF_FLAG[name] not in given]:
        flag = missing[0].replace("_", "-")
        raise UserError(f"--{flag} is missing; give it, or a --model of {', '.join(KNOWN_MODELS)}")
    hidden = given["hidden"]
    ffn = int(4 * hidden * 2 / 3 / 64) * 64 if flags.swiglu else 4 * hidden
    if flags.group_query_attention and "kv_heads" not in given:
        raise UserError("--group-query-attention needs --num-query-groups; give the number of key-value heads")
    return {"kv_heads": given["heads"], "ffn": ffn, "experts": 0, "experts_per_token": 1, "moe_ffn": 0} | given


def _check(shape: dict[str, Any]) -> None:
    """Check what upstream checks of sizes among each other."""
    if shape["hidden"] % shape["heads"]:
        raise UserError(
            f"--hidden-size {shape['hidden']} is not divisible by --num-attention-heads {shape['heads']}; change one"
        )
    if shape["heads"] % shape["kv_heads"]:
        raise UserError(
            f"--num-attention-heads {shape['heads']} is not divisible by --num-query-groups {shape['kv_heads']}; "
            "change one"
        )
    if shape["experts"] and shape["experts_per_token"] > shape["experts"]:
        raise UserError(
            f"--moe-router-topk {shape['experts_per_token']} is more than --num-experts {shape['experts']}; change one"
        )


def _padded(model: ModelShape, space: SearchSpace, hardware: Hardware, flags: argparse.Namespace) -> ModelShape:
    """With one vocabulary that every tensor parallel size of the search divides, as a COPUS run has."""
    wanted = space.tp or range(1, (model.heads if space.tp_across_nodes else hardware.devices_per_node) + 1)
    sizes = [tp for tp in wanted if model.heads % tp == 0 and flags.gpus % tp == 0]
    multiple = flags.make_vocab_size_divisible_by * math.lcm(*sizes)
    return replace(model, vocab=math.ceil(model.vocab / multiple) * multiple)


def _global_batches(text: str | None, model: ModelShape) -> tuple[int, ...]:
    if text is None:
        low, high = (tokens / model.seq for tokens in _DEFAULT_TOKENS)
        return tuple(2**k for k in range(32) if low <= 2**k <= high) or (1,)
    try:
        low_text, dots, high_text = text.partition("..")
        if not dots:
            return _several(text)
        first, last = _several(low_text), _several(high_text)
        batches = tuple(first[0] << k for k in range(last[0].bit_length()) if first[0] << k <= last[0])
    except ValueError:
        batches = ()
    if not batches:
        raise UserError(f"--global-batch {text!r} is not understood; write 1000,2000 or 256..4096")
    return batches


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in RECOMPUTE_CHOICES]:
        raise UserError(f"--recompute {unknown[0]!r} is not known; choose from {', '.join(RECOMPUTE_CHOICES)}")
    return names


def _sizes(text: str) -> dict[str, Any]:
    """The fields of :class:`SearchSpace` that ``--space`` names."""
    fields = {size: size for size in ("tp", "pp", "vpp", "cp", "ep")} | {"mbs": "micro_batches"}
    switches = {"sp": "sequence_parallel", "zero1": "distributed_optimizer"}
    sizes: dict[str, Any] = {}
    for word in text.split():
        name, _, values = word.partition("=")
        read: Callable[[str], tuple[int, ...]] = _switches if name in switches else _several
        field = (fields | switches).get(name)
        if field is None or field in sizes:
            raise UserError(
                f"--space: {word!r} is not understood; write each of {', '.join(fields | switches)} once, like tp=4,8"
            )
        try:
            sizes[field] = read(values)
        except ValueError:
            example = f"{name}=0,1" if name in switches else f"{name}=1,2,4"
            raise UserError(f"--space: {values!r} are no values for {name}; write {example}") from None
    return sizes


def _several(text: str) -> tuple[int, ...]:
    """Numbers between commas; a ValueError where one is not in the range that makes sense."""
    numbers = tuple(int(part) for part in text.split(","))
    if not 1 <= min(numbers) <= max(numbers) <= _LARGEST:
        raise ValueError
    return numbers


def _switches(text: str) -> tuple[bool, ...]:
    parts = text.split(",")
    if not set(parts) <= {"0", "1"}:
        raise ValueError
    return tuple(part == "1" for part in parts)


# -- what is printed


def _report(request: _Request, found: SearchResult) -> list[str]:
    lines = _heading(request, found)
    for batch in sorted(set(request.space.global_batches)):
        lines += ["", *_table(request, found, batch)]
    return [*lines, "", *_others(found)]


def _heading(request: _Request, found: SearchResult) -> list[str]:
    model, hardware, options = request.model, request.hardware, request.options
    precision = "fp8" if options.fp8 else f"{8 * model.param_bytes}-bit"
    overlapped = [flag for flag in ("overlap_grad_reduce", "overlap_param_gather") if getattr(options, flag)]
    return [
        f"{request.name}: {model.params / 1e9:,.1f} billion parameters, {model.seq:,} tokens a sequence, {precision}, "
        f"{'fused' if model.flash_attention else 'plain'} attention",
        *([f"with {' '.join('--' + flag.replace('_', '-') for flag in overlapped)}"] if overlapped else []),
        f"{request.gpus:,} x {request.hardware_name}: {hardware.flops / 1e12:,.0f} TFLOP/s and "
        f"{hardware.memory_bytes / _GIB:,.0f} GiB each, {hardware.devices_per_node} to a node",
        f"{found.candidates:,} plans that Megatron allows, {len(found.table):,} worth timing, in "
        f"{found.seconds_to_score:.2f} s",
    ]


def _table(request: _Request, found: SearchResult, batch: int) -> list[str]:
    entries = [_entry(request, found, int(row)) for row in found.best(batch, request.top)]
    title = f"global batch {batch:,} ({batch * request.model.seq / 1e6:,.2f} million tokens)"
    if not entries:
        return [f"{title}: {_why_none(request, found, batch)}"]
    splits = [_split(entry) for entry in entries]
    columns = [name for name in splits[0] if any(split[name] >= 0.005 for split in splits)]
    width = max(len(title) - 2, *(len(entry["plan"]) for entry in entries))
    head = f"{title:{width + 2}}   s/step  tok/s/GPU     MFU    GiB  |" + "".join(f"{name:>9}" for name in columns)
    rows = [
        f"  {entry['plan']:{width}} {entry['step_s']:8.3f} {entry['tokens_per_s_per_gpu']:10,.0f} "
        f"{100 * entry['mfu']:6.1f}% {entry['memory_bytes'] / _GIB:6.1f}  |"
        + "".join(f"{100 * split[name]:8.1f}%" for name in columns)
        for entry, split in zip(entries, splits, strict=True)
    ]
    return [head, *rows]


def _split(entry: dict[str, Any]) -> dict[str, float]:
    """Shares of a step."""
    parts, total = entry["parts"], entry["step_s"]
    shares = {name: sum(parts[part] for part in grouped) / total for name, grouped in _SPLIT.items()}
    return shares | {"other": max(0.0, 1 - sum(shares.values()))}


def _why_none(request: _Request, found: SearchResult, batch: int) -> str:
    if batch not in found.smallest:
        return "no plan; see below for what speaks against all of them"
    table, needed = found.smallest[batch]
    limit = request.space.memory_share * request.hardware.memory_bytes
    return f"no plan fits; the smallest, {table.plan(0)}, needs {needed / _GIB:,.1f} of {limit / _GIB:.1f} GiB"


def _others(found: SearchResult) -> list[str]:
    """Why the rest of the plans are not among those that were timed."""
    if not found.ruled_out:
        return ["no plan was ruled out"]
    width = max(len(f"{count:,}") for count in found.ruled_out.values())
    return ["ruled out:", *(f"  {count:{width},}  {reason}" for reason, count in found.ruled_out.items())]


# -- what is written


def _entry(request: _Request, found: SearchResult, row: int) -> dict[str, Any]:
    """One plan with its figures as plain values."""
    plan, seconds = found.table.plan(row), float(found.parts.total[row])
    sequences_per_s = plan.global_batch / seconds / request.gpus
    return {
        "plan": str(plan),
        **plan.to_json(),
        "step_s": seconds,
        "tokens_per_s_per_gpu": sequences_per_s * request.model.seq,
        "mfu": sequences_per_s * request.model.flops_per_sequence() / request.hardware.flops,
        "memory_bytes": float(found.memory[row]),
        "parts": {name: float(getattr(found.parts, name)[row]) for name in PARTS},
    }


def _as_json(request: _Request, found: SearchResult) -> dict[str, Any]:
    batches = sorted(set(request.space.global_batches))
    return {
        "model": {"name": request.name, **asdict(request.model), "params": request.model.params},
        "hardware": {"name": request.hardware_name, **asdict(request.hardware)},
        "gpus": request.gpus,
        "options": asdict(request.options),
        "seconds_to_score": found.seconds_to_score,
        "considered": found.considered,
        "candidates": found.candidates,
        "timed": len(found.table),
        "ruled_out": found.ruled_out,
        "plans": {
            str(batch): [_entry(request, found, int(row)) for row in found.best(batch, request.top)]
            for batch in batches
        },
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path} can't be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
