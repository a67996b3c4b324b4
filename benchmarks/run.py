"""Measure, print with ratios, judge the requirements, write JSON."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from benchmarks import results, suites
from benchmarks.environment import results_folder
from benchmarks.measuring import Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--what", choices=("all", *suites.ALL), action="append", help="default: all; may be repeated")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: try the code, prove and save nothing")
    parser.add_argument("--seconds", type=float, help="timing per case (default: by case)")
    parser.add_argument("--min-rounds", type=int, help="rounds per case even past that time (default: by case)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: 2, with --smoke 1)")
    parser.add_argument("--output", type=Path, help="folder (default: benchmarks/results/<device>)")


def main(options: argparse.Namespace) -> int:
    """Returns 0 if every provider passed its gate and every requirement holds, else 1."""
    chosen = suites.ALL if not options.what or "all" in options.what else tuple(dict.fromkeys(options.what))
    target = Target.of(options.device, options.smoke)
    folder = options.output or (None if options.smoke else results_folder(target))
    failed, warnings = [], []
    for what in chosen:
        result = results.run_suite(
            what,
            importlib.import_module(f"benchmarks.bench_{what}").cases(target),
            target,
            seconds=options.seconds,
            min_rounds=options.min_rounds,
            threads=options.threads or (1 if options.smoke else 2),
            folder=folder,
        )
        failed += results.failures(result)
        warnings += [] if options.smoke else filter(None, [results.busy_warning(result)])
        if folder:
            print(f"written: {folder / what}.json")
    for line in warnings:
        print(f"BUSY MACHINE: {line}")
    for line in failed:
        print(f"NOT AS REQUIRED: {line}")
    print(
        "every provider agrees with its reference, every requirement holds" if not failed else f"{len(failed)} failed"
    )
    return 1 if failed else 0
