"""Sentence embeddings without labels: all-MiniLM-L6-v2 with experts, and as a dense model of the same FLOPs.

    python experiments/minilm_embeddings.py --data FOLDER             # what is not done yet, then the report
    python experiments/minilm_embeddings.py --data FOLDER --seeds 0   # one seed
    python experiments/minilm_embeddings.py --data FOLDER --report    # the report of what is done

FOLDER holds STS-B and SICK, as train.tsv, dev.tsv and (SICK) test.tsv, or .gz of them. Both students start from
all-MiniLM-L6-v2, whose neurons are ranked by what they add to the output, and are trained on the training sentences
alone, no score among them, to embed them as it does (`MoETrainer`, objective "embedding"). Judged by the rank
correlation of the cosine of two sentences with people's scores: STS-B's validation and SICK's test pairs. Writes
results.json and table.md into experiments/minilm_embeddings, and students as sentence-transformers models into --work.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from moebert_kernels.bench.tables import millions
from moebert_kernels.convert import convert_to_moe, dense_student, parameter_counts
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.data.tasks import TaskData, custom_task, load_task
from moebert_kernels.demo.data import base_model
from moebert_kernels.distill import MoETrainer, MoETrainingArguments
from moebert_kernels.distill.embedding import Pooling, keep_pooling, read_pooling
from moebert_kernels.files import write_text
from moebert_kernels.layers import MoEConfig

HERE = Path(__file__).resolve().parent / "minilm_embeddings"
SIZE, SHARED = 384, 256  # of an expert, a quarter of the dense layer's 1,536 neurons; two thirds are in all four
KINDS = ("moe", "dense")
SICK = custom_task(("sentence_A", "sentence_B"), "relatedness_score", regression=True)
EPOCHS, LEARNING_RATE, BATCH, LENGTH = 1, 3e-4, 32, 64


def load(folder: Path) -> dict[str, TaskData]:
    """STS-B and SICK."""
    return {"stsb": load_task("stsb", folder / "STS-B"), "sick": load_task(SICK, folder / "SICK")}


def sentences(data: dict[str, TaskData]) -> list[str]:
    """Every training sentence once."""
    columns = [task.train[name] for task in data.values() for name in task.task.text_columns]
    return sorted({text for column in columns for text in column})


def contributions(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    """(L, D) how much each neuron adds to its feed-forward's output: the mean of |h_j| times the length of its row.

    A ranking that needs no labels, unlike `importance_scores`.
    """
    sites = find_sites(model)
    sums = [torch.zeros(site.weights().w2.shape[1]) for site in sites]
    hooks = [
        site.second_module.register_forward_pre_hook(lambda _, given, n=n: sums[n].add_(given[0].abs().sum((0, 1))))
        for n, site in enumerate(sites)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return torch.stack(
        [total * site.weights().w2.norm(dim=0) for total, site in zip(sums, sites, strict=True)]
    ).detach()


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], pooling: Pooling) -> Tensor:
    """(N, H) embeddings; each text is computed once, beside others of its length."""
    model.eval()
    ordered = sorted(set(texts), key=len)
    parts = []
    for start in range(0, len(ordered), 64):
        some = ordered[start : start + 64]
        batch = tokenizer(some, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        parts.append(pooling(model(**batch).last_hidden_state, batch["attention_mask"]))
    place = {text: n for n, text in enumerate(ordered)}
    return torch.cat(parts)[[place[text] for text in texts]]


def correlations(model: Any, tokenizer: Any, data: dict[str, TaskData], pooling: Pooling) -> dict[str, float]:
    """Spearman's correlation of cosines and scores, by data set."""
    found = {}
    for name, split in (("stsb", "validation"), ("sick", "test")):
        rows, columns = data[name].split(split), data[name].task.text_columns
        pairs = embed(model, tokenizer, [text for column in columns for text in rows[column]], pooling)
        first, second = pairs.chunk(2)
        found[name] = float(spearmanr((first * second).sum(-1).numpy(), rows["label"]).statistic)
    return found


def student(kind: str, teacher: Any, importance: Tensor, seed: int) -> Any:
    if kind == "dense":
        return dense_student(teacher, importance, SIZE, seed)
    config = MoEConfig.moebert(expert_size=SIZE, num_shared_neurons=SHARED)
    return convert_to_moe(copy.deepcopy(teacher), config, importance=importance, seed=seed)


def run(base: Path, data: dict[str, TaskData], folder: Path, seed: int) -> None:
    """Train the students of a seed that are not done."""
    tokenizer, teacher = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    pooling = read_pooling(base)
    assert pooling is not None
    texts = sentences(data)
    encoded = tokenizer(texts, truncation=True, max_length=LENGTH)
    columns = {name: encoded[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    train = Dataset.from_dict(columns | {"length": [len(row) for row in encoded["input_ids"]]})
    some = [
        tokenizer(texts[n::100], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        for n in range(4)
    ]
    importance = contributions(teacher, some)
    if not (folder / "teacher.json").exists():
        write_result(folder / "teacher.json", teacher, {"after": correlations(teacher, tokenizer, data, pooling)})
    for kind in KINDS:
        file = folder / f"{kind}-{seed}.json"
        if file.exists():
            continue
        model = student(kind, teacher, importance, seed)
        before = correlations(model, tokenizer, data, pooling)
        print(kind, seed, "before", before, flush=True)
        arguments = MoETrainingArguments(
            str(folder / f"{kind}-{seed}"), objective="embedding", loss_weights={"embedding": 10.0},
            num_train_epochs=EPOCHS, learning_rate=LEARNING_RATE, warmup_steps=50, lr_scheduler_type="linear",
            per_device_train_batch_size=BATCH, train_sampling_strategy="group_by_length", save_steps=200,
            save_total_limit=1, logging_steps=50, report_to=[], seed=seed, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        began = time.monotonic()
        trainer = MoETrainer(model, arguments, teacher=teacher, train_dataset=train, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model()
        keep_pooling(base, folder / f"{kind}-{seed}")
        after = correlations(model, tokenizer, data, pooling)
        seconds = round(time.monotonic() - began)
        write_result(file, model, {"before": before, "after": after, "seconds": seconds, "sentences": len(texts)})


def write_result(file: Path, model: nn.Module, result: dict[str, Any]) -> None:
    write_text(file, json.dumps(result | parameter_counts(model)))
    print(file.stem, result, flush=True)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Means over the seeds, for a document."""
    count = next(result["sentences"] for result in results.values() if "sentences" in result)
    lines = [
        f"Rank correlations (x 100) with people's scores; students were trained on {count:,} sentences without labels.",
        "",
        "| model | parameters | active | STS-B before | STS-B | SICK before | SICK |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("teacher", *KINDS):
        runs = [result for name, result in results.items() if name.partition("-")[0] == kind]
        if not runs:
            continue
        cells = [kind, millions(runs[0]["total_parameters"]), millions(runs[0]["active_parameters"])]
        for name in ("stsb", "sick"):
            for when in ("before", "after"):
                values = [100 * result[when][name] for result in runs if when in result]
                cells.append(f"{sum(values) / len(values):.1f}" if values else "")
                if len(values) > 1:
                    cells[-1] += f" ({min(values):.1f} to {max(values):.1f})"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("demo/minilm_embeddings"), help="models; large")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        data = load(arguments.data)
        for seed in arguments.seeds:
            run(base_model(), data, arguments.work, seed)
    names = ["teacher", *(f"{kind}-{seed}" for seed in arguments.seeds for kind in KINDS)]
    results = {name: json.loads((arguments.work / f"{name}.json").read_text()) for name in names
               if (arguments.work / f"{name}.json").exists()}  # fmt: skip
    write_text(HERE / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(HERE / "table.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
