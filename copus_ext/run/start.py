"""The entry point: parse, check, then train. Bad input ends here, with one line and status 2."""

from __future__ import annotations

import argparse
import difflib
import os
import socket
import sys
import time
import warnings
from typing import NoReturn

from copus_ext.core.errors import UserError

BAD_INPUT = 2
_LET_RANK_0_SPEAK_S = 60.0

_CPU_FLAGS = {  # what upstream must be told where there is no accelerator; by argument name
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "no_persist_layer_norm": True,
    "apply_rope_fusion": False,
    "create_attention_mask_in_dataloader": False,  # unfused attention makes the causal mask itself, once
    "num_workers": 0,  # a loader process per rank and data set would take the cores the ranks compute on
}


def main() -> int:
    """Run the program; its exit status."""
    prepare_environment()
    try:
        from megatron.patches import apply_all

        apply_all()
        raw = parse()
        return _run(raw)
    except UserError as error:
        return refuse("pretrain_gpt_copus.py", error)


def refuse(program: str, error: UserError) -> int:
    """Say what is wrong, once; the exit status.

    The launcher kills all ranks when the first one ends, so the others let rank 0 speak. Who is not killed meanwhile
    saw something that rank 0 did not, such as files that are missing on one node.
    """
    rank = os.environ["RANK"]
    if rank != "0":
        time.sleep(_LET_RANK_0_SPEAK_S)
    print(f"{program}: {error}" + (f" (rank {rank})" if rank != "0" else ""), file=sys.stderr, flush=True)
    return BAD_INPUT


def prepare_environment() -> None:
    """What must be set before torch is imported. Without torchrun, this is a job of one rank."""
    for noise in ({"module": r"megatron\..*"}, {"message": ".*pin_memory.*"}, {"category": SyntaxWarning}):
        warnings.filterwarnings("ignore", **noise)  # upstream's, of GPU libraries that are not there
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # upstream insists, for tensor and context parallelism
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update({**single, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})


def parse() -> argparse.Namespace:
    """Upstream's arguments and ours before validation, fit for this machine.

    Raises:
        UserError: a flag that is not known, or data that are not there.
    """
    from megatron.training.arguments import parse_args

    from copus_ext.run.config import add_arguments

    raw = parse_args(lambda parser: _made_readable(add_arguments(parser)))
    set_cpu_flags(raw)
    _gather_outputs(raw)
    _check_data(raw)
    return raw


def _made_readable(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let ``--help`` work, which upstream breaks by a bare per cent sign, and tell a wrong flag in one line of 750."""

    def refuse(message: str) -> NoReturn:
        word = message.rpartition(": ")[2].split("=")[0].split(" ")[0]
        like = difflib.get_close_matches(word, parser._option_string_actions, n=1)
        raise UserError(message + (f"; did you mean {like[0]}?" if like and like[0] != word else ""))

    parser.error = refuse  # type: ignore[method-assign]
    for action in parser._actions:
        try:
            _ = (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")
    return parser


def _gather_outputs(raw: argparse.Namespace) -> None:
    """What a run writes goes under ``--copus-dir``, unless upstream's own flags say otherwise."""
    if raw.no_copus and not raw.log_gradient_noise_scale:
        return
    raw.tensorboard_dir = raw.tensorboard_dir or os.path.join(raw.copus_dir, "tensorboard")
    if raw.save is None and not raw.no_copus and (raw.save_interval or raw.exit_signal_handler):
        raw.save = os.path.join(raw.copus_dir, "checkpoints")


def flag_parser(description: str | None) -> argparse.ArgumentParser:
    """For a tool's own flags beside those of a run; what is wrong with them is a :class:`UserError`."""

    def refuse(message: str) -> NoReturn:
        raise UserError(message)

    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=style)
    parser.error = refuse  # type: ignore[method-assign]
    return parser


def set_cpu_flags(raw: argparse.Namespace) -> None:
    """Where there is no accelerator, set the flags that upstream needs there, and say so in one line."""
    import torch
    from megatron.core.transformer.enums import AttnBackend

    if torch.cuda.is_available():
        return
    for name, value in {**_CPU_FLAGS, "attention_backend": AttnBackend.unfused}.items():
        setattr(raw, name, value)
    if raw.rank == 0:
        print(
            "no accelerator: running on CPU with --distributed-backend gloo --transformer-impl local "
            "--use-cpu-initialization --attention-backend unfused, without fused kernels and data loader processes",
            flush=True,
        )


def _check_data(raw: argparse.Namespace) -> None:
    """There must be data, and every prefix that a flag names must have its two files.

    Raises:
        UserError: there is none, or a file is missing.
    """
    flags = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    lists = ("data_args_path", "per_split_data_args_path")  # files that hold the prefixes: upstream reads them
    if not raw.mock_data and not any(getattr(raw, name) for name in (*flags, *lists)):
        raise UserError("--data-path is missing; give the prefix of .bin and .idx files of tools/preprocess_data.py")
    for flag in flags:
        for word in getattr(raw, flag) or []:
            if word.replace(".", "", 1).isdigit() or "://" in word:  # a weight, or in an object store
                continue
            missing = [word + end for end in (".bin", ".idx") if not os.path.exists(word + end)]
            if missing:
                name = "--" + flag.replace("_", "-")
                raise UserError(f"{name} {word}: there is no {missing[0]}; make it with tools/preprocess_data.py")


def _run(raw: argparse.Namespace) -> int:
    from copus_ext.adapters.arguments import plan_of
    from copus_ext.run.config import check_flags, config_from_args
    from copus_ext.run.supported import check_supported

    check_supported(raw)
    if raw.no_copus:
        from copus_ext.run.plain import run_plain

        run_plain(raw, plan_of(raw))
        return 0
    check_flags(raw)
    config = config_from_args(raw, plan_of(raw))
    from copus_ext.run.driver import Driver

    Driver(raw, config).run()
    return 0
