"""The console script `moebert`. Commands import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

import moebert_kernels
from moebert_kernels.cli.ablate import ablate
from moebert_kernels.cli.convert import convert
from moebert_kernels.cli.dense import merge, student
from moebert_kernels.cli.export import export
from moebert_kernels.cli.importance import importance
from moebert_kernels.cli.measure import bench, demo, doctor, evaluate
from moebert_kernels.cli.options import EXAMPLES, defaults_by_task
from moebert_kernels.cli.quantize import quantize
from moebert_kernels.cli.running import command
from moebert_kernels.cli.train import distill, finetune

app = typer.Typer(
    help="Turn a Transformer's feed-forward layers into a Mixture-of-Experts that is faster, and distil it so that it"
    " stays accurate: finetune, importance, convert, distill, eval, quantize. An interrupted command goes on when it"
    " is run again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# these take further --NAME VALUE, training arguments, and look at them themselves
_OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}
for _name, _function in (
    ("doctor", doctor),
    ("finetune", finetune),
    ("importance", importance),
    ("convert", convert),
    ("distill", distill),
    ("ablate", ablate),
    ("merge", merge),
    ("student", student),
    ("quantize", quantize),
    ("export", export),
    ("eval", evaluate),
    ("bench", bench),
    ("demo", demo),
):
    app.command(
        _name,
        context_settings=_OPEN if _name in ("finetune", "distill", "ablate") else None,
        epilog=f"Example: {EXAMPLES[_name]}" + f"\n\n{defaults_by_task()}" * (_name in ("finetune", "distill")),
    )(command(_function))


def _print_version(asked: bool) -> None:
    if asked:
        print(f"moebert_kernels {moebert_kernels.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
