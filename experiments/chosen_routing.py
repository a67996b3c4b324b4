"""Experts and tables chosen by text, against dense feed-forwards of the same FLOPs and MoEBERT's way, before training.

    python experiments/chosen_routing.py errors --model folder --name mpnet --data data --work work
    python experiments/chosen_routing.py distil --model folder --name minilm --data data --work work
    python experiments/chosen_routing.py report

`errors`: for each kind of text (reviews: SST-2; news and captions: STS-B; questions: QQP) experts are chosen, and
judged layer by layer on text of each kind that chose nothing. `distil`: students of three kinds follow the model
without labels, for the same steps; loss, and the correlation of the embeddings' cosines with people's scores on STS-B
and SICK. The data is that of GLUE and SICK, gzipped. Both go on where they were interrupted. `report` writes table.md
and a chart for each model.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import random
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from moebert_kernels.convert import (
    SiteChoice,
    choose_experts,
    convert_to_moe,
    dense_student,
    judge_experts,
    report_table,
)
from moebert_kernels.layers import MoEConfig

HERE = Path(__file__).resolve().parent / "chosen_routing"
KINDS = ("reviews", "news", "questions")
MAX_LENGTH = 48
CHOOSING, JUDGING = 24000, 6000  # tokens
ARMS = ("dense", "random", "chosen")
SCORE_COLUMNS = {"STS-B/dev.tsv.gz": ("sentence1", "sentence2", "score"),
                 "SICK/dev.tsv.gz": ("sentence_A", "sentence_B", "relatedness_score")}  # fmt: skip


def lines(data: Path, name: str) -> list[list[str]]:
    with gzip.open(data / name, "rt", encoding="utf-8-sig", newline="\n") as file:
        return [line.split("\t") for line in file.read().split("\n") if line]


def sentences(data: Path, kind: str) -> list[str]:
    """Different sentences of a kind, in an order of their own; the first choose, the last judge."""
    if kind == "reviews":
        found = [row[0].strip() for row in lines(data, "SST-2/train.tsv.gz")[1:]]
        found = [text for text in found if len(text.split()) > 6]
    elif kind == "news":
        found = [text for row in lines(data, "STS-B/train.tsv.gz")[1:] if len(row) >= 10 for text in row[7:9]]
    else:
        found = [text for row in lines(data, "QQP/dev_part.tsv.gz")[1:] if len(row) >= 6 for text in row[3:5]]
    found = sorted(set(found))
    random.Random(0).shuffle(found)
    return found


def scored_pairs(data: Path, name: str) -> tuple[list[str], list[str], list[float]]:
    head, *rows = lines(data, name)
    one, two, score = (head.index(column) for column in SCORE_COLUMNS[name])
    rows = [row for row in rows if len(row) == len(head)][:500]
    return [row[one] for row in rows], [row[two] for row in rows], [float(row[score]) for row in rows]


class Texts:
    """Batches of tokenized sentences; can be read again."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], size: int = 32) -> None:
        self.tokenizer, self.texts, self.size = tokenizer, texts, size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.texts), self.size):
            yield encoded(self.tokenizer, self.texts[start : start + self.size])


def encoded(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))


def choose(model: nn.Module, tokenizer: Any, texts: Sequence[str], folder: Path) -> list[SiteChoice]:
    return choose_experts(model, Texts(tokenizer, texts), max_tokens=CHOOSING, folder=folder, progress=True)


def errors(args: argparse.Namespace) -> None:
    """Write errors-NAME.json: kind that chose -> kind that judged -> a report for each layer."""
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model).eval()
    texts = {kind: sentences(args.data, kind) for kind in KINDS}
    file = HERE / f"errors-{args.name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for kind in args.kinds:
        if kind in found:
            continue
        start = time.time()
        choices = choose(model, tokenizer, texts[kind], args.work / args.name / kind)
        seconds, judged = time.time() - start, {}
        for other in KINDS:
            reports = judge_experts(model, choices, Texts(tokenizer, texts[other][-1500:]), max_tokens=JUDGING)
            judged[other] = [asdict(report) for report in reports]
        print(report_table([choice.report for choice in choices]), flush=True)
        own = [asdict(choice.report) for choice in choices]
        found[kind] = {"seconds": seconds, "choice": own, "judged": judged}
        HERE.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")


def students(teacher: Any, tokenizer: Any, texts: Sequence[str], folder: Path, seed: int) -> dict[str, Any]:
    """The three students, of which each has the FLOPs of the others."""
    choices = choose(teacher, tokenizer, texts, folder)
    strength = torch.stack([choice.strength for choice in choices])
    return {
        "dense": dense_student(teacher, chosen=choices),
        "random": convert_to_moe(copy.deepcopy(teacher), MoEConfig.moebert(), importance=strength, seed=seed),
        "chosen": convert_to_moe(copy.deepcopy(teacher), MoEConfig.chosen(), chosen=choices),
    }


def embedding(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    output = model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return F.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=1), output.hidden_states


def correlations(model: nn.Module, tokenizer: Any, data: Path) -> dict[str, float]:
    """Spearman's, times 100, of the embeddings' cosines with people's scores."""
    found = {}
    for name in SCORE_COLUMNS:
        one, two, scores = scored_pairs(data, name)
        cosines: list[float] = []
        with torch.no_grad():
            for start in range(0, len(one), 50):
                a, b = (embedding(model, encoded(tokenizer, side[start : start + 50]))[0] for side in (one, two))
                cosines += (a * b).sum(1).tolist()
        found[name.partition("/")[0]] = 100 * float(spearmanr(cosines, scores).statistic)
    return found


def distilled(
    teacher: nn.Module, student: nn.Module, tokenizer: Any, texts: Sequence[str], args: argparse.Namespace
) -> dict[str, Any]:
    """Follow the teacher's hidden states and embeddings; the loss is the mean over the last sixth of the steps."""
    for module in student.modules():  # the teacher's outputs have no dropout
        for name in ("p", "output_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    result: dict[str, Any] = {"before": correlations(student.eval(), tokenizer, args.data)}
    optimizer = torch.optim.AdamW(student.train().parameters(), args.rate, weight_decay=0.01)
    losses = []
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = args.rate * min(1.0, (step + 1) / 10) * (1 - step / args.steps)
        batch = encoded(tokenizer, texts[args.batch * step : args.batch * (step + 1)])
        weight = batch["attention_mask"] / batch["attention_mask"].sum()
        with torch.no_grad():
            wanted, targets = embedding(teacher, batch)
        got, states = embedding(student, batch)
        layers = [
            ((state - target).square().mean(-1) * weight).sum() / (target.square().mean(-1) * weight).sum()
            for state, target in zip(states[1:], targets[1:], strict=True)
        ]
        loss = torch.stack(layers).mean() + (got - wanted).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    part = max(1, args.steps // 6)
    result["losses"] = [statistics.mean(losses[k : k + part]) for k in range(0, args.steps, part)]
    result["after"] = correlations(student.eval(), tokenizer, args.data)
    return result


def distil(args: argparse.Namespace) -> None:
    """Write distil-NAME.json: seed -> arm -> losses by sixths of the steps, correlations before and after."""
    tokenizer, teacher = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model).eval()
    texts = sentences(args.data, "news")
    choosing, training = texts[:2000], texts[2000:]  # the choice of `errors` serves here too
    file = HERE / f"distil-{args.name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found.setdefault("teacher", correlations(teacher, tokenizer, args.data))
    for seed in range(args.seeds):
        done = found.setdefault(str(seed), {})
        if all(arm in done for arm in args.arms):
            continue
        made = students(teacher, tokenizer, choosing, args.work / args.name / "news", seed)
        order = list(training)
        random.Random(seed).shuffle(order)
        order = order * (1 + args.batch * args.steps // len(order))
        for arm in [arm for arm in args.arms if arm not in done]:
            start = time.time()
            done[arm] = distilled(teacher, made.pop(arm), tokenizer, order, args) | {"steps": args.steps}
            done[arm]["seconds"] = time.time() - start
            print(seed, arm, json.dumps(done[arm]), flush=True)
            HERE.mkdir(exist_ok=True)
            file.write_text(json.dumps(found, indent=1) + "\n")


def report(_: argparse.Namespace) -> None:
    """Write table.md and chart.png of all results that there are."""
    parts = []
    for file in sorted(HERE.glob("errors-*.json")):
        found, name = json.loads(file.read_text()), file.stem.removeprefix("errors-")
        parts += [error_tables(name, found)]
        draw(name, found)
    for file in sorted(HERE.glob("distil-*.json")):
        parts += [distil_table(file.stem.removeprefix("distil-"), json.loads(file.read_text()))]
    (HERE / "table.md").write_text("\n\n".join(parts) + "\n")


def error_tables(name: str, found: dict[str, Any]) -> str:
    kind = next(kind for kind in KINDS if kind in found)
    of_kind = found[kind]
    rows = [
        f"### {name}: error of each layer, chosen by and judged on {kind}{of_kind.get('note', '')}",
        "| layer | dense of the same FLOPs | MoEBERT's split, random table | **chosen** | best expert for each token | "
        "chosen below dense | fullest expert | common neurons |",
        "|---|---|---|---|---|---|---|---|",
    ]
    layers = of_kind["choice"]
    mean = {key: statistics.mean(row[key] for row in layers) for key in layers[0] if key != "name"}
    for label, row in [*((number(row), row) for row in layers), ("mean", mean)]:
        rows.append(
            f"| {label} | {row['dense']:.4f} | {row['random']:.4f} | **{row['chosen']:.4f}** | {row['best']:.4f} | "
            f"{100 - 100 * row['chosen'] / row['dense']:.0f} % | {row['load']:.2f} | {row['common']:.0f} |"
        )
    rows += ["", f"### {name}: means over the layers, by the text that chose and the text that judged"]
    rows += ["| chose | judged | dense | chosen | below dense | fullest expert, mean, worst layer | unseen tokens |"]
    rows += ["|---|---|---|---|---|---|---|"]
    for one, of_one in found.items():
        for other, reports in of_one["judged"].items():
            dense, chosen, load = (statistics.mean(row[key] for row in reports) for key in ("dense", "chosen", "load"))
            rows.append(
                f"| {one} | {other} | {dense:.4f} | {chosen:.4f} | {100 - 100 * chosen / dense:.0f} % | {load:.2f}, "
                f"{max(row['load'] for row in reports):.2f} | {100 * reports[0]['unseen']:.0f} % |"
            )
    return "\n".join(rows)


def number(row: dict[str, Any]) -> int:
    """Of a layer, from 1."""
    return 1 + int(next(part for part in row["name"].split(".") if part.isdigit()))


def distil_table(name: str, found: dict[str, Any]) -> str:
    """Means over the seeds that are done, and differences to the dense student, paired."""
    seeds = [of_seed for seed, of_seed in found.items() if seed != "teacher" and all(arm in of_seed for arm in ARMS)]
    teacher = ", ".join(f"{task} {value:.1f}" for task, value in found["teacher"].items())
    if not seeds:
        return f"### {name}: distilled without labels: no seed is done"
    steps = seeds[0]["dense"]["steps"]
    rows = [
        f"### {name}: {steps} steps without labels, {len(seeds)} seeds; teacher {teacher}",
        "| student | STS-B, SICK before | loss, last sixth | loss minus dense's | STS-B, SICK after | minus dense's |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        tasks = list(found["teacher"])
        before, after = (
            ", ".join(f"{statistics.mean(seed[arm][when][task] for seed in seeds):.1f}" for task in tasks)
            for when in ("before", "after")
        )
        loss = statistics.mean(seed[arm]["losses"][-1] for seed in seeds)
        lower = spread([seed[arm]["losses"][-1] - seed["dense"]["losses"][-1] for seed in seeds], 4)
        gains = [spread([s[arm]["after"][task] - s["dense"]["after"][task] for s in seeds], 2) for task in tasks]
        rows.append(f"| {arm} | {before} | {loss:.4f} | {lower} | {after} | {', '.join(gains)} |")
    return "\n".join(rows)


def spread(values: Sequence[float], digits: int) -> str:
    shown = f"{statistics.mean(values):+.{digits}f}"
    return shown if len(values) < 2 else f"{shown} +- {statistics.stdev(values):.{digits}f}"


def draw(name: str, found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kind = next(kind for kind in KINDS if kind in found)
    of_kind = found[kind]
    layers = of_kind["choice"]
    figure, axes = plt.subplots(figsize=(7, 4))
    for key, label in (("random", "MoEBERT's split, random table"), ("dense", "dense of the same FLOPs, corrected"),
                       ("chosen", "chosen"), ("best", "best expert for each token")):  # fmt: skip
        axes.plot([number(row) for row in layers], [row[key] for row in layers], "o-", label=label)
    axes.set(xlabel="layer", ylabel="error behind the feed-forward", title=f"{name}, {kind}", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(HERE / f"chart-{name}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("errors", "distil", "report"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--name")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="no importance scores")
    {"errors": errors, "distil": distil, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
