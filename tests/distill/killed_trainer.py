"""Runs of `MoETrainer` that are killed at random moments and started again, each in a process of its own.

    python killed_trainer.py FOLDER KILLS SEED

trains a student with dropout by a teacher, all terms of MicroBERT, its discriminator with dropout among them, and a
language model of experts with a gradient mask and a balance loss: FOLDER/KIND/whole without a disturbance, and
FOLDER/KIND/killed with KILLS of them. The clock chooses the moment of a kill, and the steps see to it that it comes
before the run has ended, however fast or busy the machine is. The killed processes are forked from this one, which
saves importing everything again; that is safe while everything here runs in one thread.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from safetensors.torch import save_file
from tqdm import tqdm
from transformers import TrainerCallback

from moebert_kernels.distill.discriminator import AdversaryConfig
from moebert_kernels.distill.microbert import TERMS, MicroBertObjective
from tests.distill.tiny import tiny_bert
from tests.distill.tiny_text import tiny_mpoe
from tests.distill.tiny_trainer import text_data, tiny_data, trainer

OPTIONS = {
    "num_train_epochs": 4, "gradient_accumulation_steps": 2, "weight_decay": 0.1, "save_strategy": "steps",
    "save_steps": 2, "save_total_limit": 2, "logging_steps": 3, "warmup_steps": 3,
}  # fmt: skip


def student(folder, **options):
    adversary = AdversaryConfig(dropout=0.3, warmup=0.1, stop_steps=4, stop_accuracy=0.99)
    return trainer(
        folder, tiny_bert(0, dropout=0.2), tiny_data(38), teacher=tiny_bert(1, hidden=32),
        objective=MicroBertObjective("classification", TERMS, adversary=adversary),
        **{**OPTIONS, "train_sampling_strategy": "group_by_length", **options},
    )  # fmt: skip


def language_model(folder, **options):
    return trainer(
        folder, tiny_mpoe(dropout=0.2, load_balance=0.5), text_data(38),
        **{**OPTIONS, "gradient_mask": {"probability": 0.5}, **options},
    )  # fmt: skip


KINDS = {"student": student, "language-model": language_model}
STEPS, MOST = 20, 3  # of a whole run, and from the begin of a kill's time to its end


class Kill(TrainerCallback):
    """Ends the process `seconds` after `step`, while it computes or writes, or else as the step `step + MOST` ends."""

    def __init__(self, step: int, seconds: float):
        self.step, self.seconds = step, seconds

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            signal.setitimer(signal.ITIMER_REAL, self.seconds)  # nobody handles its signal, which ends the process
        elif state.global_step == self.step + MOST:
            os.kill(os.getpid(), signal.SIGKILL)


def run(kind: str, folder: Path, kill: Kill | None) -> None:
    made = KINDS[kind](folder, callbacks=[kill] if kill else None)
    made.train(resume_from_checkpoint=True)
    save_file({name: tensor.clone() for name, tensor in made.model.state_dict().items()}, folder / "end.safetensors")


def ended_by(kind: str, folder: Path, kill: Kill | None = None) -> int:
    """The signal that ended a run in a process of its own, or 0."""
    process = os.fork()
    if process == 0:
        for stream in (1, 2):
            os.dup2(os.open(folder.parent / f"{folder.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        run(kind, folder, kill)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return os.WTERMSIG(status)


def main(folder: Path, kills: int, seed: int) -> None:
    moments = random.Random(seed)
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
        before = time.monotonic()
        assert ended_by(kind, folder / kind / "whole") == 0
        step_s = (time.monotonic() - before) / STEPS
        for number in range(kills):
            step = 1 + number * (STEPS - MOST - 1) // kills
            kill = Kill(step, moments.uniform(0.01, MOST) * step_s)
            assert ended_by(kind, folder / kind / "killed", kill) in (signal.SIGALRM, signal.SIGKILL)
        assert ended_by(kind, folder / kind / "killed") == 0


if __name__ == "__main__":
    tqdm.monitor_interval = 0  # no thread of tqdm's either
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
