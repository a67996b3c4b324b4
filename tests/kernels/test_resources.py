"""Every kernel and configuration compiles for every architecture, without spills, as the committed table says."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_table_of_resources(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.resources", "--check", "--arch", str(arch)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
