"""Print the summary of a run and write its report: ``python tools/report.py RUN_DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from copus_ext.core.report.page import report_run


def main() -> int:
    """Write ``report.html`` beside ``events.jsonl``; 2 where there is no such file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="what --copus-dir was")
    directory = parser.parse_args().run_dir
    log = directory / "events.jsonl"
    if not log.exists():
        print(f"report.py: there is no {log}; give the --copus-dir of a run", file=sys.stderr)
        return 2
    print(report_run(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
