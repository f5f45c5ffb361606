r"""Measure the step times of plans in one job, which goes from plan to plan in place.

    torchrun --nproc-per-node 4 tools/profile_throughput.py <flags of pretrain_gpt_copus.py> \
        --copus-space "mbs=1,2,4 gbs=8..64" --profile-out profile.csv --profile-laps 3

A run reads the table with --copus-throughput-table. Started again, it goes on where it stopped. See docs/profile.md.
"""

from __future__ import annotations

import argparse
import sys

from copus_ext.core.errors import UserError
from copus_ext.run import start


def main() -> int:
    """Run the program; its exit status."""
    start.prepare_environment()
    try:
        from megatron.patches import apply_all

        apply_all()
        return _run()
    except UserError as error:
        return start.refuse("profile_throughput.py", error)


def _parser() -> argparse.ArgumentParser:
    from copus_ext.run.profile import add_profile_arguments

    return add_profile_arguments(start.flag_parser(__doc__))


def _run() -> int:
    flags, others = _parser().parse_known_args()
    sys.argv[1:] = others  # upstream reads its flags there itself, and refuses what it does not know
    raw = start.parse()
    from copus_ext.adapters.arguments import plan_of
    from copus_ext.run.config import check_flags, config_from_args
    from copus_ext.run.profile import ProfiledRun, keep_to_profile, settings_from
    from copus_ext.run.supported import check_supported

    check_supported(raw)
    check_flags(raw)
    base = plan_of(raw)
    settings = settings_from(flags, raw, base)
    config = config_from_args(raw, base)
    keep_to_profile(raw)
    ProfiledRun(raw, config, settings).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
