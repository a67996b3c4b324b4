"""Tiny runs for any number of processes: python distributed_run.py FOLDER ACCUMULATION. A distillation into FOLDER, a
cache of its teacher's outputs into FOLDER/cache, and a masked MPOE language model, whose windows of text differ in
length, into FOLDER/lm; the same with one fold for each optimizer step into FOLDER/folded.
"""

import sys
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from moebert_kernels.distill import FitConfig, TeacherCache, fit
from moebert_kernels.distill.discriminator import AdversaryConfig
from moebert_kernels.distill.features import Batches
from moebert_kernels.distill.microbert import TERMS, MicroBertObjective
from moebert_kernels.nn import GradientMask
from tests.distill.tiny import TinyBatches, tiny_bert
from tests.distill.tiny_text import story, tiny_mpoe

if __name__ == "__main__":
    folder, accumulation = sys.argv[1], int(sys.argv[2])
    config = FitConfig(epochs=4, learning_rate=1e-3, accumulation=accumulation, log_steps=2, save_steps=3)
    data = TinyBatches(examples=40, sizes=[8, 5, 8, 8, 8, 2, 1])
    # no dropout, which would draw anew in each process
    objective = MicroBertObjective("classification", TERMS, adversary=AdversaryConfig(dropout=0.0))
    teacher = tiny_bert(1, hidden=32)
    fit(tiny_bert(0), data, config=config, output_dir=folder, objective=objective, teacher=teacher)

    runs = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    cache = TeacherCache.build(teacher, data, Path(folder) / "cache", shard_mib=0)
    assert len(cache) == 40 and len(runs) == len(data) * Accelerator().is_main_process

    config = FitConfig(epochs=3, learning_rate=1e-3, accumulation=accumulation, log_steps=2, adam_eps=1e-5)
    for name, shared_fold in (("lm", False), ("folded", True)):
        model = tiny_mpoe(load_balance=0.5)
        fit(
            model,
            Batches(story(), 1),
            config=replace(config, shared_fold=shared_fold),
            output_dir=Path(folder) / name,
            gradient_mask=GradientMask(model, 0.5, seed=5),
        )
