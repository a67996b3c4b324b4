"""`MoETrainer` in several processes on gloo: the weights of one process, whole or sharded, and sharded checkpoints."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.distill.distributed_stages import main
from tests.helpers import ROOT

SCRIPT, STAGES = (str(ROOT / f"tests/distill/distributed_{name}.py") for name in ("trainer", "stages"))
WHOLE = ("split", "gated", "mpo", "masked", "microbert", "recomputed")
SHARDED = ("split", "gated", "mpo")


def train(folder, processes, kinds=(), sharded=False, script=SCRIPT):
    """Run the script; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [] if processes == 1 and not sharded else [
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launch, script, str(folder), *kinds],
        env=environment | ({"FSDP": "2"} if sharded else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(folder, 1, WHOLE)
    return folder


def assert_same_ends(folder, one, kinds):
    for kind in kinds:
        got, wanted = (load_file(place / f"{kind}.safetensors") for place in (folder, one))
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5, msg=f"{kind}: {name}")


def assert_saved(folder, kinds):
    """The folder that `save_model` wrote loads as the model that was trained."""
    for kind in kinds:
        auto = AutoModelForCausalLM if kind == "mpo" else AutoModelForSequenceClassification
        got, wanted = (
            auto.from_pretrained(folder / f"{kind}-model").state_dict(), load_file(folder / f"{kind}.safetensors"),
        )  # fmt: skip
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(one, tmp_path):
    """Also where one of them has no token for an expert, with masks, maps and a discriminator."""
    train(tmp_path, 2, WHOLE)
    assert_same_ends(tmp_path, one, WHOLE)


@pytest.mark.slow
def test_shards_train_to_the_weights_of_one_process_and_go_on_in_one(one, tmp_path):
    train(tmp_path / "2", 2, [f"{kind}:5" for kind in SHARDED], sharded=True)
    assert_same_ends(tmp_path / "2", one, SHARDED)
    assert_saved(tmp_path / "2", SHARDED)
    for kind in SHARDED:
        shutil.copytree(tmp_path / "2" / kind / "checkpoint-5", tmp_path / "1" / kind / "checkpoint-5")
    said = train(tmp_path / "1", 1, SHARDED, sharded=True)
    assert all(f"{kind} began after step 5" in said for kind in SHARDED)
    assert_same_ends(tmp_path / "1", one, SHARDED)


@pytest.mark.slow
def test_stages_of_two_processes_end_as_those_of_one(tmp_path, capsys):
    """Both processes hold the best weights at the end, and again when the finished run is called once more."""
    main(tmp_path / "one")
    one = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ended")]
    said = train(tmp_path / "two", 2, script=STAGES).splitlines()
    assert len(one) == 2 and len(set(one)) == 1
    assert len(said) == 4 and len(set(said)) == 1 and said[0].partition(":")[0] == one[0].partition(":")[0]
    assert_same_ends(tmp_path / "two/run/best", tmp_path / "one/run/best", ["model"])
    assert not list(tmp_path.glob("*/run/**/checkpoint-*"))
