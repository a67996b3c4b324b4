"""Runs of a tiny distillation that are killed at random moments and started again, each in a process of its own.

    python killed_run.py FOLDER KILLS

writes FOLDER/whole (a run that nobody disturbs) and FOLDER/killed (one that is killed KILLS times), and prints how many
of the kills found the run alive. The killed processes are forked from this one, which saves importing everything again;
that is safe while everything here runs in one thread.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from moebert_kernels.distill import FitConfig, LayerwiseObjective, fit
from tests.distill.tiny import TinyBatches, accuracy, tiny_bert


class NoisyBatches(TinyBatches):
    """Draws from the global generators as it goes, as some data loaders do, and says when it begins."""

    def __init__(self, begun, **options):
        super().__init__(**options)
        self.begun = begun

    def __call__(self, epoch):
        os.write(self.begun, b"1")
        torch.rand(3), random.random()
        for batch in super().__call__(epoch):
            torch.rand(2)
            yield batch


def noisy_accuracy(model):
    return {key: value + 0.5 * torch.rand(()).item() for key, value in accuracy(model).items()}


def run(folder: Path, begun: int) -> None:
    config = FitConfig(
        epochs=6, learning_rate=3e-3, accumulation=2, weight_decay=0.1, warmup_ratio=0.2,
        eval_steps=5, save_steps=2, log_steps=3,
    )  # fmt: skip
    fit(
        tiny_bert(0, dropout=0.2), NoisyBatches(begun, examples=38), config=config, output_dir=folder,
        objective=LayerwiseObjective("classification"), teacher=tiny_bert(1), evaluate=noisy_accuracy,
    )  # fmt: skip


def start(folder: Path) -> int:
    """Fork a run; returns its process id when its first batch is about to be made."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.dup2(os.open(folder.parent / f"{folder.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        run(folder, begun=write)
        os._exit(0)
    os.close(write)
    os.read(read, 1)
    return process


def main(folder: Path, kills: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    before = time.monotonic()
    run(folder / "whole", begun=os.open(os.devnull, os.O_WRONLY))
    duration, killed = time.monotonic() - before, 0
    for _ in range(kills):
        process = start(folder / "killed")
        time.sleep(random.uniform(0.0, duration / kills))
        os.kill(process, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(process, 0)[1])
    assert os.waitpid(start(folder / "killed"), 0)[1] == 0
    print(killed)


if __name__ == "__main__":
    tqdm.monitor_interval = 0  # no thread of tqdm's either
    main(Path(sys.argv[1]), int(sys.argv[2]))
