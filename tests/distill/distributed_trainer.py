"""Tiny runs of `MoETrainer` for any number of processes, of 8 sequences in each optimizer step together.

    python distributed_trainer.py FOLDER KIND[:STEPS] ...     (behind torchrun: several processes)

writes the weights of each run as FOLDER/KIND.safetensors, and its model as FOLDER/KIND-model. KIND is one of RUNS; with
FSDP=2 in the environment models are sharded, each layer and the experts in it as units. A run writes a checkpoint every
STEPS steps, and goes on from one that is there.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill.discriminator import AdversaryConfig
from moebert_kernels.distill.embedding import EmbeddingObjective
from moebert_kernels.distill.microbert import TERMS, MicroBertObjective
from moebert_kernels.distill.objectives import LayerwiseObjective
from moebert_kernels.distill.processes import end_processes
from moebert_kernels.layers import MoEConfig
from tests.distill.tiny import VOCAB, tiny_bert
from tests.distill.tiny_text import tiny_mpoe
from tests.distill.tiny_trainer import text_data, tiny_data, trainer

RARE = 59  # the only token of expert 3


def split(**options):
    """Experts by a hash, of which one is reached by a single token of a single sentence: by one process at most."""
    table = torch.arange(VOCAB) % 3
    table[RARE] = 3
    data = tiny_data(32)
    rows = [[token % RARE for token in row] for row in data["input_ids"]]
    rows[5][0] = RARE
    data = Dataset.from_dict({**data.to_dict(), "input_ids": rows})
    model = convert_to_moe(tiny_bert(0), MoEConfig.moebert(), tables=table, importance=torch.rand(2, 32))
    return trainer(
        data=data, model=model, teacher=tiny_bert(1), objective=LayerwiseObjective("classification"), **options
    )


def gated(**options):
    model = convert_to_moe(
        tiny_bert(0), MoEConfig.moebert(router="gate-token", load_balance=0.5), importance=torch.rand(2, 32)
    )
    return trainer(model=model, data=tiny_data(32), **options)


def mpo(**options):
    return trainer(model=tiny_mpoe(load_balance=0.5), data=text_data(32), **options)


def masked(**options):
    return trainer(
        model=tiny_mpoe(load_balance=0.5), data=text_data(32), gradient_mask={"probability": 0.5, "seed": 5},
        shared_fold=True, **options,
    )  # fmt: skip


def microbert(**options):
    """With linear maps and a discriminator, which no distributed wrapper knows."""
    objective = MicroBertObjective("classification", TERMS, adversary=AdversaryConfig(dropout=0.0, warmup=0.0))
    return trainer(teacher=tiny_bert(1, hidden=32), objective=objective, data=tiny_data(32), **options)


def recomputed(**options):
    """An encoder whose layers are recomputed, and whose pooler gets no gradient."""
    return trainer(
        model=tiny_bert(0).bert, teacher=tiny_bert(1).bert, objective=EmbeddingObjective(), gradient_checkpointing=True,
        data=tiny_data(32, labels=False), **options,
    )  # fmt: skip


RUNS = {
    "split": split, "gated": gated, "mpo": mpo, "masked": masked, "microbert": microbert, "recomputed": recomputed,
}  # fmt: skip


def shard_on_cpus() -> None:
    """accelerate shards models on GPUs alone; let it take processes on CPUs for such."""
    made = AcceleratorState.__init__

    def init(self: AcceleratorState, *args, fsdp_plugin=None, **options) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # which each new state takes over

    AcceleratorState.__init__ = init


def main(folder: Path, kinds: list[str]) -> None:
    processes = PartialState(cpu=True).num_processes
    if os.environ.get("FSDP"):
        shard_on_cpus()
    for kind in kinds:
        name, _, steps = kind.partition(":")
        layer = "GPT2Block" if name in ("mpo", "masked") else "BertLayer"
        sharded = {
            "fsdp": True,
            "fsdp_config": {
                "version": 2, "state_dict_type": "SHARDED_STATE_DICT",
                "transformer_layer_cls_to_wrap": ["MoEFeedForward", layer],
            },
        } if os.environ.get("FSDP") else {}  # fmt: skip
        torch.manual_seed(0)
        run = RUNS[name](
            folder=folder / name, per_device_train_batch_size=8 // processes, adam_epsilon=1e-4, num_train_epochs=3,
            save_strategy="steps", save_steps=int(steps or 100), **sharded,
        )  # fmt: skip
        run.train(resume_from_checkpoint=True)
        state = {  # a shard is gathered by all processes
            key: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for key, tensor in run.model.state_dict().items()
        }
        run.save_model(str(folder / f"{name}-model"))
        if run.args.should_save:
            save_file(state, folder / f"{name}.safetensors")
            print(name, "began after step", run._initial_global_step)


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]), sys.argv[2:])
    end_processes()
