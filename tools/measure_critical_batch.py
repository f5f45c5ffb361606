r"""Measure the critical batch of a run by branches: the flags of pretrain_gpt_copus.py, and those below.

    torchrun --nproc-per-node 4 tools/measure_critical_batch.py <flags of pretrain_gpt_copus.py> \
        --branch-at 1024,4096 --branch-multiples 1,2,4,8 --branch-samples 1024 --copus-dir runs/critical-batch

docs/critical-batch.md says what is measured, and what is written into --copus-dir.
"""

from __future__ import annotations

import argparse
import sys

from copus_ext.core.errors import UserError
from copus_ext.run import start
from copus_ext.run.branch_flags import add_branch_arguments, keep_to_branches, settings_from


def main() -> int:
    """Run the program; its exit status."""
    start.prepare_environment()
    try:
        flags, others = _parser().parse_known_args()
        if misspelt := [word for word in others if word.startswith("--branch")]:
            raise UserError(f"{misspelt[0]}: there is no such flag; --help lists those that begin with --branch")
        sys.argv[1:] = others  # upstream reads its flags there itself
        return _run(flags)
    except UserError as error:
        return start.refuse("measure_critical_batch.py", error)


def _parser() -> argparse.ArgumentParser:
    return add_branch_arguments(start.flag_parser(__doc__))


def _run(flags: argparse.Namespace) -> int:
    from megatron.patches import apply_all

    apply_all()
    raw = start.parse()
    from copus_ext.adapters.arguments import plan_of
    from copus_ext.run.config import check_flags, config_from_args
    from copus_ext.run.knowledge import load_knowledge
    from copus_ext.run.supported import check_supported

    check_supported(raw)
    check_flags(raw)
    config = config_from_args(raw, plan_of(raw))
    saved = None if raw.finetune else load_knowledge(raw.load, raw.ckpt_step)
    settings = settings_from(flags, raw, saved.plan if saved else config.base)
    keep_to_branches(raw, settings.base)
    from copus_ext.run.branches import BranchedRun

    BranchedRun(raw, config, settings).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
