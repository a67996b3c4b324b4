"""A tiny distillation for any number of processes: python distributed_run.py FOLDER ACCUMULATION."""

import sys

from moebert_kernels.distill import FitConfig, LayerwiseObjective, fit
from tests.distill.tiny import TinyBatches, tiny_bert

if __name__ == "__main__":
    folder, accumulation = sys.argv[1], int(sys.argv[2])
    config = FitConfig(epochs=4, learning_rate=1e-3, accumulation=accumulation, log_steps=2, save_steps=3)
    data = TinyBatches(examples=40, sizes=[8, 5, 8, 8, 8, 2, 1])
    objective = LayerwiseObjective("classification")
    fit(tiny_bert(0), data, config=config, output_dir=folder, objective=objective, teacher=tiny_bert(1))
