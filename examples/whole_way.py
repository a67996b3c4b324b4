"""The whole way on a small model: fine-tune, convert, distil, save, load with AutoModel, prepare in int8, compare.

Random sentences about three topics stand in for your data, and a small random BERT for your encoder. It takes half
a minute of one core. The times of a model this small say little about those of yours.
"""

import copy
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig

from moebert_kernels.convert import convert_to_moe, parameter_counts  # lets AutoModel load converted models
from moebert_kernels.distill import MoETrainer, MoETrainingArguments
from moebert_kernels.layers import MoEConfig
from moebert_kernels.serve import prepare

TOPICS, WORDS, LENGTH = 3, 200, 32  # topics, words of each, words of a sentence


def sentences(count: int) -> Dataset:
    """Sentences in which two fifths of the words are about the topic that is the label."""
    labels = torch.randint(0, TOPICS, (count,))
    about_it = labels[:, None] * WORDS + torch.randint(0, WORDS, (count, LENGTH))
    others = torch.randint(0, TOPICS * WORDS, (count, LENGTH))
    ids = torch.where(torch.rand(count, LENGTH) < 0.4, about_it, others)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def train(model, folder: Path, teacher=None, **options):
    settings = {"num_train_epochs": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 32, "report_to": "none"}
    settings |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, **options}
    MoETrainer(model, MoETrainingArguments(folder, **settings), teacher=teacher, train_dataset=training).train()
    return model.eval()


@torch.inference_mode()
def accuracy(model) -> float:
    ids, labels = torch.tensor(test["input_ids"][:]), torch.tensor(test["labels"][:])
    return float((model(input_ids=ids).logits.argmax(-1) == labels).float().mean())


@torch.inference_mode()
def median_ms(models: dict, rounds: int = 15) -> dict[str, float]:
    """Times of one batch, measured in turns so that what else the machine does meets all models."""
    ids, times = torch.tensor(test["input_ids"][:32]), {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = perf_counter()
            model(input_ids=ids)
            times[name].append(1000 * (perf_counter() - start))
    return {name: median(of_model) for name, of_model in times.items()}


torch.manual_seed(0)
training, test = sentences(960), sentences(400)
config = BertConfig(
    vocab_size=TOPICS * WORDS, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
    num_labels=TOPICS,
)  # fmt: skip

with tempfile.TemporaryDirectory() as folder:
    work = Path(folder)
    teacher = AutoModelForSequenceClassification.from_config(config)
    train(teacher, work / "teacher-run", num_train_epochs=6)

    # Experts, and the table that sends each word to its expert, are chosen by text; labels are not used.
    batches = [{"input_ids": torch.tensor(training["input_ids"][i : i + 32])} for i in range(0, 960, 32)]
    student = convert_to_moe(copy.deepcopy(teacher), MoEConfig.chosen(), batches=batches).eval()
    converted = accuracy(student)

    student = train(student, work / "student-run", teacher, objective="layerwise")
    student.save_pretrained(work / "student")
    loaded = AutoModelForSequenceClassification.from_pretrained(work / "student").eval()
    assert accuracy(loaded) == accuracy(student)

    served = prepare(copy.deepcopy(loaded), "int8")
    served.save_pretrained(work / "served")

    models = {"dense teacher": teacher, "MoE student": loaded, "MoE student, int8": served}
    print(f"accuracy of the MoE before distillation: {converted:.3f}")
    for name, ms in median_ms(models).items():
        print(f"{name}: accuracy {accuracy(models[name]):.3f}, {ms:.1f} ms for 32 sentences")
    counts = parameter_counts(loaded)
    print(f"parameters of the MoE: {counts['total_parameters']:,}, used by a token: {counts['active_parameters']:,}")
