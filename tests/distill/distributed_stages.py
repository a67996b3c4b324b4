"""A tiny run of two stages by `train_stages` for any number of processes, of 8 sequences in each step together.

    python distributed_stages.py FOLDER     (behind torchrun: several processes)

trains a student by its teacher's kept outputs with linear maps, which the second stage takes up, and a discriminator,
and calls it again, which finds the run finished. Each process prints where the run ended.
"""

import sys
from pathlib import Path

from accelerate import PartialState

from moebert_kernels.convert import model_fingerprint
from moebert_kernels.distill.evaluation import Evaluator
from moebert_kernels.distill.processes import end_processes
from moebert_kernels.distill.run import train_stages
from tests.distill.test_stages import TWO_STAGES
from tests.distill.tiny import tiny_bert
from tests.distill.tiny_run import tiny_split


def main(folder: Path) -> None:
    recipe = TWO_STAGES.with_values(
        {
            "per_device_train_batch_size": 8 // PartialState(cpu=True).num_processes, "adam_epsilon": 1e-4,
            "train_sampling_strategy": "random", "teacher_outputs": str(folder / "outputs"),
            "objective_options.adversary": {"dropout": 0.0, "warmup": 0.0},
        }
    )  # fmt: skip
    for _ in range(2):
        student = tiny_bert(0)
        result = train_stages(
            student, recipe, tiny_split(32), output_dir=folder / "run", teacher=tiny_bert(1, layers=3, hidden=32),
            evaluate=Evaluator(tiny_split(12, seed=7)), best_metric="accuracy",
        )  # fmt: skip
        print(f"ended at {result.step}, best at {result.best_step}: {model_fingerprint(student)}\n", end="", flush=True)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]))
    end_processes()
