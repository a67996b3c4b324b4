"""Data and settings small enough to train in a second, for `MoETrainer`."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moebert_kernels.distill.arguments import MoETrainingArguments
from moebert_kernels.distill.trainer import MoETrainer
from tests.distill.tiny import VOCAB, tiny_bert


def tiny_tokenizer():
    """Words "0" to "59", which are their own numbers; 0 is padding."""
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(VOCAB)}, unk_token="1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", unk_token="1")


def tiny_data(examples=22, seed=0, labels=True):
    """Sentences of 2 to 9 random tokens; the label depends on them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (examples,), generator=generator).tolist()
    rows = [torch.randint(2, VOCAB, (length,), generator=generator).tolist() for length in lengths]
    columns = {"input_ids": rows, "attention_mask": [[1] * length for length in lengths]}
    return Dataset.from_dict(columns | ({"labels": [row[0] % 3 for row in rows]} if labels else {}))


def text_data(count=13, length=9):
    """Sentences whose first tokens, some of them, are labels."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(2, 50, (count, length), generator=generator).tolist()
    labels = [row[: 2 + number % 7] + [-100] * (length - 2 - number % 7) for number, row in enumerate(rows)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * count, "labels": labels})


def mostly_slow(names, fast):
    """Parameters of a test, of which those that are not `fast` wait for `-m slow`."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def settings(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4, "learning_rate": 3e-3, "num_train_epochs": 2, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "logging_steps": 2, "save_strategy": "no", "seed": 3,
    }  # fmt: skip
    return MoETrainingArguments(str(folder), **defaults | options)


def trainer(
    folder, model=None, data=None, teacher=None, objective=None, callbacks=None, judged_on=None, collator=None,
    **options,
):  # fmt: skip
    return MoETrainer(
        tiny_bert(0) if model is None else model,
        settings(folder, **options),
        teacher=teacher,
        objective=objective,
        callbacks=callbacks,
        train_dataset=tiny_data() if data is None else data,
        eval_dataset=judged_on,
        data_collator=collator,
        processing_class=tiny_tokenizer(),
    )


def terms_of(run, name):
    """What was logged of a term, in the order of the steps."""
    return [entry[name] for entry in run.state.log_history if name in entry]
