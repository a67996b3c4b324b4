"""`moebert --version`."""

from typer.testing import CliRunner

import moebert_kernels
from moebert_kernels.cli import app


def test_the_version_is_printed_and_nothing_else_is_done():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"moebert_kernels {moebert_kernels.__version__}\n")
