"""`python -m benchmarks run`: measure, print with ratios, judge the requirements, write JSON."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks import results

SUITES = ("ffn", "encoder", "routing", "expert_gemm", "importance")  # importance last: minutes of the original's way


def main(arguments: list[str] | None = None) -> int:
    """Returns 0 if every provider passed its gate and every requirement holds, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure and write results")
    run.add_argument("--what", choices=("all", *SUITES), action="append", help="default: all; may be repeated")
    run.add_argument("--smoke", action="store_true", help="tiny shapes: tries the code, proves nothing, saves nothing")
    run.add_argument("--seconds", type=float, help="timing per case (default: by suite)")
    run.add_argument("--min-rounds", type=int, default=7, help="rounds per case even past that time")
    run.add_argument("--threads", type=int, help="torch's threads (default: 2, with --smoke 1)")
    run.add_argument("--output", type=Path, help="folder (default: benchmarks/results/<device>)")
    options = parser.parse_args(arguments)

    chosen = SUITES if not options.what or "all" in options.what else tuple(dict.fromkeys(options.what))
    folder = options.output or results.RESULTS / results.device_slug()
    failed = []
    warnings = []
    for what in chosen:
        module = importlib.import_module(f"benchmarks.bench_{what}")
        seconds = options.seconds if options.seconds is not None else module.SECONDS
        result = results.run_suite(
            what,
            module.cases(smoke=options.smoke),
            seconds=0.0 if options.smoke else seconds,
            min_rounds=1 if options.smoke else options.min_rounds,
            threads=options.threads or (1 if options.smoke else 2),
            smoke=options.smoke,
        )
        failed += results.failures(result)
        warnings += [] if options.smoke else filter(None, [results.busy_warning(result)])
        if not options.smoke or options.output:
            print(f"written: {results.save(result, folder)}")
    for line in warnings:
        print(f"BUSY MACHINE: {line}")
    for line in failed:
        print(f"NOT AS REQUIRED: {line}")
    print(
        "every provider agrees with its reference, every requirement holds" if not failed else f"{len(failed)} failed"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
