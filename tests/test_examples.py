"""Every script in examples/ runs and says something, from any folder; so does training with accelerate's files."""

import os
import re
import subprocess
import sys

import pytest

from tests.forks import run_forked
from tests.helpers import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
def test_examples_run(tmp_path):
    programs = {path.stem: path.read_text() for path in EXAMPLES}
    for name, (status, printed) in run_forked(programs, tmp_path).items():
        assert status == 0 and printed.strip(), f"{name}:\n{printed}"


@pytest.mark.slow
def test_the_guides_training_runs_in_two_processes(tmp_path):
    """On a CPU, where accelerate takes DDP for both files; shards are in tests/distill/test_trainer_processes.py."""
    first = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/guide/trainer.md").read_text(), re.M | re.S)[1]
    last = re.search(r"^```py\n(.*?)^```", (ROOT / "docs/guide/several-gpus.md").read_text(), re.M | re.S)[1]
    # one write, which that of the other process cannot divide
    said = "print(f'process {trainer.args.process_index} {trainer.args.world_size}\\n', end='')\n"
    (tmp_path / "script.py").write_text(first + said + last)
    config = ROOT / "examples/accelerate/fsdp2.yaml"
    # port 0 is any free one: that of the file is the default, which another program may have
    launch = ("accelerate.commands.launch", "--config_file", config, "--main_process_port", "0")
    command = [sys.executable, "-m", *launch, "script.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"process \d \d", done.stdout)) == ["process 0 2", "process 1 2"]


def test_there_are_examples():
    assert EXAMPLES
