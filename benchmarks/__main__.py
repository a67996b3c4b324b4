"""`python -m benchmarks run`: measure, print with ratios, judge the requirements, write JSON; `report`: show it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report, results, suites
from benchmarks.environment import results_folder
from benchmarks.measuring import Target


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("run", help="measure")
    measured.add_argument("--what", choices=("all", *suites.ALL), action="append", help="default: all; may be repeated")
    measured.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    measured.add_argument("--smoke", action="store_true", help="tiny shapes: try the code, prove and save nothing")
    measured.add_argument("--seconds", type=float, help="timing per case (default: by case)")
    measured.add_argument("--min-rounds", type=int, help="rounds per case even past that time (default: by case)")
    measured.add_argument("--threads", type=int, help="torch's threads (default: 2, with --smoke 1)")
    measured.add_argument("--output", type=Path, help="folder (default: benchmarks/results/<device>)")
    report.add_arguments(commands.add_parser("report", help=report.__doc__, description=report.__doc__))
    options = parser.parse_args(arguments)
    return report.main(options) if options.command == "report" else run(options)


def run(options: argparse.Namespace) -> int:
    """Returns 0 if every provider passed its gate and every requirement holds, else 1."""
    chosen = suites.ALL if not options.what or "all" in options.what else tuple(dict.fromkeys(options.what))
    target = Target.of(options.device, options.smoke)
    folder = options.output or (None if options.smoke else results_folder(target))
    failed, warnings = [], []
    for what in chosen:
        result = results.run_suite(
            what, suites.cases(what, target), target, seconds=options.seconds, min_rounds=options.min_rounds,
            threads=options.threads or (1 if options.smoke else 2), folder=folder,
        )  # fmt: skip
        failed += results.failures(result)
        warnings += [] if options.smoke else filter(None, [results.busy_warning(result)])
        if folder:
            print(f"written: {folder / what}.json")
    for line in (*(f"BUSY MACHINE: {line}" for line in warnings), *(f"NOT AS REQUIRED: {line}" for line in failed)):
        print(line)
    print(f"{len(failed)} failed" if failed else "every provider agrees with its reference, every requirement holds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
