"""`python -m benchmarks COMMAND`: one module of this package for each command."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = ("run", "report")
# benchmarks/<command>.py: its docstring, add_arguments(parser) and main(options) -> exit status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in COMMANDS}
    for name, module in modules.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__))
    options = parser.parse_args(arguments)
    return modules[options.command].main(options)


if __name__ == "__main__":
    sys.exit(main())
