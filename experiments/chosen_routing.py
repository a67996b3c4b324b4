"""Experts and tables chosen by text, against dense feed-forwards of the same FLOPs and MoEBERT's way, before training.

    python experiments/chosen_routing.py errors --model folder --name mpnet --data data --work work
    python experiments/chosen_routing.py distil --model folder --name minilm --data data --work work
    python experiments/chosen_routing.py speed --model folder --name minilm --data data --work work
    python experiments/chosen_report.py

`errors`: for each kind of text (reviews: SST-2; news and captions: STS-B; questions: QQP) experts are chosen, and
judged layer by layer on text of each kind that chose nothing. `distil`: students of three kinds follow the model
without labels, for the same steps, and the chosen one once more for half of them; loss, also on text that trained
nobody, and the correlation of the embeddings' cosines with people's scores on STS-B and SICK. `speed`: CPU time of the
students on real text, in turns. The data is that of GLUE and SICK, gzipped. `errors` and `distil` go on where they were
interrupted, one process for each file of results. chosen_report.py writes table.md and a chart for each model.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import operator
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
from moebert_kernels.files import replacing, write_json
from moebert_kernels.layers import MoEConfig, moe_layers

HERE = Path(__file__).resolve().parent / "chosen_routing"
KINDS = ("reviews", "news", "questions")
MAX_LENGTH, AT_ONCE = 48, 32  # tokens of a sentence, sentences of a batch that is read
CHOOSING, JUDGING = 24000, 6000  # tokens
BATCHES, B, T = 2, 8, 128  # of `speed`
ARMS = ("dense", "random", "chosen")
HALF = "chosen, half of the steps"
HELD_OUT = 320  # sentences at the end of the training order, on which the students are judged
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

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.texts), AT_ONCE):
            yield encoded(self.tokenizer, self.texts[start : start + AT_ONCE])


def encoded(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))


def choose(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], kind: str, args: argparse.Namespace
) -> list[SiteChoice]:
    folder = args.work / args.name / (kind if args.tokens == CHOOSING else f"{kind}-{args.tokens}")
    return choose_experts(model, Texts(tokenizer, texts), max_tokens=args.tokens, folder=folder, progress=True)


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
        choices = choose(model, tokenizer, texts[kind], kind, args)
        seconds, judged = time.time() - start, {}
        for other in KINDS:
            reports = judge_experts(model, choices, Texts(tokenizer, texts[other][-1500:]), max_tokens=JUDGING)
            judged[other] = [asdict(report) for report in reports]
        print(report_table([choice.report for choice in choices]), flush=True)
        own = [asdict(choice.report) for choice in choices]
        note = "" if args.tokens == CHOOSING else f", {args.tokens:,} tokens"
        found[kind] = {"note": note, "seconds": seconds, "choice": own, "judged": judged}
        write_json(file, found)


def students(teacher: Any, tokenizer: Any, texts: Sequence[str], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The three students, of which each has the FLOPs of the others."""
    choices = choose(teacher, tokenizer, texts, "news", args)
    strength = torch.stack([choice.strength for choice in choices])
    chosen = convert_to_moe(copy.deepcopy(teacher), MoEConfig.chosen(), chosen=choices)
    return {
        "dense": dense_student(teacher, chosen=choices),
        "random": convert_to_moe(copy.deepcopy(teacher), MoEConfig.moebert(), importance=strength, seed=seed),
        "chosen": chosen,
        HALF: copy.deepcopy(chosen),
    }


def embedding(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    output = model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return F.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=1), output.hidden_states


@torch.no_grad()
def correlations(model: nn.Module, tokenizer: Any, data: Path) -> dict[str, float]:
    """Spearman's, times 100, of the embeddings' cosines with people's scores."""
    found = {}
    for name in SCORE_COLUMNS:
        one, two, scores = scored_pairs(data, name)
        ordered = sorted({*one, *two}, key=len)
        parts = [embedding(model, encoded(tokenizer, ordered[k : k + 50]))[0] for k in range(0, len(ordered), 50)]
        place, rows = {text: k for k, text in enumerate(ordered)}, torch.cat(parts)
        cosines = (rows[[place[text] for text in one]] * rows[[place[text] for text in two]]).sum(1).tolist()
        found[name.partition("/")[0]] = 100 * float(spearmanr(cosines, scores).statistic)
    return found


def by_length(texts: Sequence[str], size: int, seed: int) -> list[Sequence[str]]:
    """Batches of texts of about one length, in a random order: 16 of them are sorted at a time."""
    batches, shuffle = [], random.Random(seed).shuffle
    for start in range(0, len(texts), 16 * size):
        window = sorted(texts[start : start + 16 * size], key=len)
        some = [window[k : k + size] for k in range(0, len(window), size)]
        shuffle(some)
        batches += some
    return batches


class Targets:
    """What the teacher makes of batches of texts; kept in a folder, so that it computes them for one student alone."""

    def __init__(self, teacher: nn.Module, tokenizer: Any, batches: Sequence[Sequence[str]], folder: Path) -> None:
        self.teacher, self.tokenizer, self.batches, self.folder = teacher, tokenizer, batches, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, number: int) -> tuple[dict[str, Tensor], Tensor, tuple[Tensor, ...]]:
        """A batch, its embeddings and the layers' hidden states."""
        batch, file = encoded(self.tokenizer, self.batches[number]), self.folder / f"{number:04d}.pt"
        if not file.exists():
            with replacing(file) as partial, torch.no_grad():
                torch.save(embedding(self.teacher, batch), partial)
        return batch, *torch.load(file)


def loss_of(student: nn.Module, targets: Targets, number: int) -> Tensor:
    """Of the hidden states, relative to the teacher's, and of the embedding."""
    batch, wanted, states_wanted = targets(number)
    got, states = embedding(student, batch)
    weight = batch["attention_mask"] / batch["attention_mask"].sum()
    layers = [
        ((state - target).square().mean(-1) * weight).sum() / (target.square().mean(-1) * weight).sum()
        for state, target in zip(states[1:], states_wanted[1:], strict=True)
    ]
    return torch.stack(layers).mean() + (got - wanted).square().sum(1).mean()


def distilled(
    student: nn.Module, tokenizer: Any, targets: Targets, steps: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Follow the teacher for some steps: losses by sixths of them, before and after on the last batches."""
    for module in student.modules():  # the teacher's outputs have no dropout
        for name in ("p", "output_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    held_out = range(args.steps, len(targets.batches))

    @torch.no_grad()
    def judged() -> dict[str, Any]:
        loss = statistics.mean(float(loss_of(student.eval(), targets, n)) for n in held_out)
        return correlations(student, tokenizer, args.data) | {"loss": loss}

    result: dict[str, Any] = {"before": judged()}
    optimizer = torch.optim.AdamW(student.train().parameters(), args.rate, weight_decay=0.01, fused=True)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = args.rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
        loss = loss_of(student, targets, step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    part = max(1, steps // 6)
    return result | {
        "losses": [statistics.mean(losses[k : k + part]) for k in range(0, steps, part)],
        "after": judged(),
        "steps": steps,
    }


def settings_of(args: argparse.Namespace, arm: str) -> dict[str, Any]:
    """What the results of one arm depend on, besides the seed."""
    steps = args.steps // (2 if arm == HALF else 1)
    return {"steps": steps, "batch": args.batch, "rate": args.rate, "tokens": args.tokens}


def check_settings(file: Path, found: dict[str, Any], args: argparse.Namespace) -> None:
    """Stop before results of other settings are put beside those of a file; older ones know their steps alone."""
    for seed, arms in found.items():
        for arm, result in arms.items() if seed != "teacher" else ():
            other = {name: result[name] for name, one in settings_of(args, arm).items() if result.get(name, one) != one}
            if other:
                raise SystemExit(
                    f"name: expected results of the same settings in {file}, got seed {seed}, {arm}: {other}"
                )


def distil(args: argparse.Namespace) -> None:
    """Write distil-NAME.json: seed -> arm -> losses by sixths of the steps, correlations before and after."""
    tokenizer, teacher = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model).eval()
    texts = sentences(args.data, "news")
    choosing, training = texts[:2000], texts[2000:]  # the choice of `errors` serves here too
    file = HERE / f"distil-{args.name}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found.setdefault("teacher", correlations(teacher, tokenizer, args.data))
    check_settings(file, found, args)
    for seed in args.seeds:
        done = found.setdefault(str(seed), {})
        if all(arm in done for arm in args.arms):
            continue
        made = students(teacher, tokenizer, choosing, seed, args)
        order = list(training)
        random.Random(seed).shuffle(order)
        parts = (order[: args.batch * args.steps], order[-HELD_OUT:])
        batches = [batch for part in parts for batch in by_length(part, args.batch, seed)]
        targets = Targets(teacher, tokenizer, batches, args.work / args.name / f"targets-{args.steps}-{seed}")
        for arm in [arm for arm in args.arms if arm not in done]:
            start, steps = time.time(), settings_of(args, arm)["steps"]
            done[arm] = distilled(made.pop(arm), tokenizer, targets, steps, args)
            done[arm] |= {"seconds": time.time() - start, **settings_of(args, arm)}
            print(seed, arm, json.dumps(done[arm]), flush=True)
            write_json(file, found)


def speed(args: argparse.Namespace) -> None:
    """Write speed-NAME.json: ratios of CPU times, and the fullest expert's share, by kind of text."""
    tokenizer, teacher = AutoTokenizer.from_pretrained(args.model), AutoModel.from_pretrained(args.model).eval()
    news = sentences(args.data, "news")
    made = students(teacher, tokenizer, news[:2000], 0, args)
    models = {"teacher": teacher} | {arm: made[arm].eval() for arm in ARMS}
    found = {}
    for kind in args.kinds:
        text = tokenizer(" ".join(sentences(args.data, kind)[2000:5000]))["input_ids"]
        ids = torch.tensor(text[: BATCHES * B * T]).view(BATCHES, B, T)
        times: dict[str, list[float]] = {name: [] for name in models}
        for number in range(-1, args.rounds):
            order = random.Random(number).sample(list(models), len(models))
            for batch in ids:
                spent = dict.fromkeys(models, 0.0)
                for name in (*order, *reversed(order)):  # so that a drift of the machine's speed hits all alike
                    start = time.process_time()
                    with torch.inference_mode():
                        models[name](input_ids=batch, attention_mask=torch.ones_like(batch))
                    spent[name] += time.process_time() - start
                for name in times:
                    times[name] += [spent[name]] * (number >= 0)
        ratios = {
            f"{one} / {other}": statistics.quantiles(map(operator.truediv, times[one], times[other]), n=4)
            for one, other in (("chosen", "random"), ("chosen", "dense"), ("teacher", "chosen"))
        }
        loads = {
            arm: statistics.mean(
                float(torch.bincount(layer.router.table.long()[batch].flatten(), minlength=4).max()) * 4 / batch.numel()
                for layer in moe_layers(models[arm]) for batch in ids
            )
            for arm in ("random", "chosen")
        }  # fmt: skip
        found[kind] = {"ratios": ratios, "fullest expert": loads, "rounds": args.rounds, "tokens": args.tokens}
        print(kind, json.dumps(found[kind]), flush=True)
    write_json(HERE / f"speed-{args.name}.json", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "distil", "speed"))
    parser.add_argument("--model", type=Path, required=True, help="a folder of transformers")
    parser.add_argument("--name", required=True, help="of the model, in the results")
    parser.add_argument("--data", type=Path, required=True, help="the folder with all data sets")
    parser.add_argument("--work", type=Path, default=Path("work"), help="choices and the teacher's outputs; large")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--arms", nargs="+", choices=(*ARMS, HALF), default=(*ARMS, HALF))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=CHOOSING, help="how many choose experts")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--rate", type=float, default=1e-4)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="no importance scores")
    {"errors": errors, "distil": distil, "speed": speed}[args.what](args)


if __name__ == "__main__":
    main()
