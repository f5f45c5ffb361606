"""Make the decisions of a run again from its log: ``python tools/replay.py RUN_DIR``.

Without further flags every decision has to come out as it was recorded, to the last bit; the exit status is 1 where one
does not. With other settings it shows what they would have decided at each of these points, knowing what the run knew
there; the run itself would then have gone another way, so it does not tell how that would have ended:

    python tools/replay.py runs/demo --policy cbs
    python tools/replay.py runs/demo --objective paper --switch-rule threshold:0.10
    python tools/replay.py runs/demo --space "tp=1 pp=1 gbs=8..64" --json replay.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from copus_ext.core.planner.replay import Replayed

BAD_INPUT = 2
_SETTINGS = ("policy", "schedule", "objective", "switch_rule", "dwell_steps", "max_growth", "lr_rule", "probe_budget")


def main() -> int:
    """Print the decisions; 0, or 1 where one was not reproduced, or 2 for bad input."""
    # As torchrun has it for the ranks: how sums of products are cut among threads decides about their last bits.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    from copus_ext.core.errors import UserError

    flags = _parser().parse_args()
    try:
        return _replay(flags)
    except (UserError, ValueError) as error:
        print(f"replay.py: {error}", file=sys.stderr)
    except (KeyError, TypeError) as error:
        print(f"replay.py: the log is of another version, or of no adaptive run: {error!r}", file=sys.stderr)
    return BAD_INPUT


def _replay(flags: argparse.Namespace) -> int:
    from copus_ext.core.errors import UserError
    from copus_ext.core.events import read_events
    from copus_ext.core.planner.replay import replay

    changes = {name: value for name in _SETTINGS if (value := getattr(flags, name)) is not None}
    log = flags.run_dir / "events.jsonl"
    if not log.exists():
        raise UserError(f"there is no {log}; give the --copus-dir of a run")
    found = list(replay(read_events(log), changes, flags.space))
    changed = bool(changes) or flags.space is not None
    if flags.json:
        flags.json.write_text(json.dumps(_to_json(found, changes, flags.space), indent=1) + "\n")
    try:
        _print(found, changed, flags.all)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the decisions has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if changed or not any(each.differences for each in found) else 1


def _parser() -> argparse.ArgumentParser:
    from copus_ext.core.planner.policy import PolicySettings
    from copus_ext.core.planner.registry import POLICIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="what --copus-dir was")
    parser.add_argument("--all", action="store_true", help="print every decision, not only those that differ")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write all of it for machines")
    group = parser.add_argument_group("other settings, as the flags --copus-...")
    group.add_argument("--policy", metavar="NAME", help=f"one of {', '.join(POLICIES)}, with its options")
    group.add_argument("--space", metavar="SPACE")
    recorded = PolicySettings()
    for name in _SETTINGS[1:]:
        default = getattr(recorded, name)
        kind = str if default is None else type(default)
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar=name.rpartition("_")[2].upper())
    return parser


def _print(found: Sequence[Replayed], changed: bool, everything: bool) -> None:
    for each in found:
        differs = str(each.decision.chosen) != each.recorded["chosen"] if changed else bool(each.differences)
        if differs or everything:
            print(f"iteration {each.recorded['iteration']:6d} | recorded | {each.recorded['reason']}")
            print(f"{'':16s} | replayed | {each.decision.reason}")
        if each.differences and not changed:
            print(f"{'':16s} | differs in {', '.join(each.differences)}")
    if changed:
        other = sum(str(each.decision.chosen) != each.recorded["chosen"] for each in found)
        print(f"{other} of {len(found)} decisions would have been others")
    else:
        same = sum(not each.differences for each in found)
        print(f"{same} of {len(found)} decisions reproduced to the last bit")


def _to_json(found: Sequence[Replayed], changes: dict[str, Any], space: str | None) -> dict[str, Any]:
    decisions = [
        {
            "iteration": each.recorded["iteration"],
            "consumed_samples": each.recorded["consumed_samples"],
            "recorded": each.recorded["chosen"],
            "replayed": str(each.decision.chosen),
            "reason": each.decision.reason,
            "differences": list(each.differences),
        }
        for each in found
    ]
    return {
        "changes": changes | ({} if space is None else {"space": space}),
        "decisions": len(found),
        "reproduced": sum(not each.differences for each in found),
        "same_choice": sum(each["recorded"] == each["replayed"] for each in decisions),
        "points": decisions,
    }


if __name__ == "__main__":
    sys.exit(main())
