"""Accuracy over latency of a converted encoder, against what else halves its time: same teacher, same steps.

    python experiments/base_encoder.py teacher --data FOLDER --task rte mrpc --seed 1
    python experiments/base_encoder.py student --data FOLDER --task rte mrpc --seed 1 --arm moe dense
    python experiments/base_encoder.py student --data FOLDER --seed 1 --arm moe dense --rate 0
    python experiments/base_encoder.py latency --data FOLDER --task mrpc --seed 1
    python experiments/base_encoder.py report

FOLDER holds RTE, MRPC, CoLA, STS-B, SST-2, TREC and SICK as .tsv or .tsv.gz. Without --model the base is
all-MiniLM-L6-v2; a base-size one is all-mpnet-base-v2 (--model FOLDER --name mpnet), which is on PyPI in five parts.
A tenth of the training rows chooses between the learning rates of --rate, which all students try alike; with the rate 0
a student is converted and not trained. The test part is labelled test rows where there are some, else the development
rows, and chooses nothing. Every run is one file in experiments/base_encoder/runs: a run that is interrupted goes on
from its last checkpoint in --work, one that is done is not made again, and several processes share the work. A model
travels in small files by `model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="60MB")`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for the benchmarks
from datasets import disable_progress_bars
from encoder_arms import ARMS, DTYPES
from encoder_latency import measure_latency
from encoder_report import report
from encoder_study import Cell, Place, Settings, run_students
from encoder_tasks import FILES

from moebert_kernels.demo.data import base_model
from moebert_kernels.errors import UserError

HERE = Path(__file__).resolve().parent / "base_encoder"
FOUR = ("rte", "mrpc", "cola", "stsb")
# the tasks and seeds of the table; the last four are what two shared cores can do, with --rows 2500 --epochs 3
# --dtype bf16, "2500" with --choosing 12000, "32k" with more text to choose experts by; these and "minilm" with
# --no-in-turn, "turn" with layers corrected in turn; other names try a setting
WANTED = {
    "minilm": (tuple(FILES), (1, 2, 3)),
    "mpnet": (FOUR, (1, 2)),
    "minilm-2500": ((*FOUR, "trec"), (1, 2, 3)),
    "mpnet-2500": ((*FOUR, "trec"), (1, 2)),
    "mpnet-32k": ((*FOUR, "trec"), (1, 2, 3)),
    "mpnet-turn": ((*FOUR, "trec"), (1, 2, 3)),
}
HELP = {
    "length": "tokens of a text at most",
    "batch": "sequences at once",
    "teacher_epochs": "epochs of fine-tuning",
    "epochs": "epochs of distillation",
    "rows": "training rows at most, of which a tenth is then held out",
    "unlabelled": "training rows beyond those, without their labels, that students follow their teacher on, at most",
    "corrupted": "copies of all these rows, 15 %% of the tokens exchanged, that students follow their teacher on",
    "choosing": "tokens of the training text that choose experts, labels or not",
    "in_turn": "correct the layers of chosen experts and of the dense model one after another",
    "scored": "rows whose labels rank neurons",
    "weight": "weight of the layer-wise term and of the predictions' term",
}
TEACHER_RATES, STUDENT_RATES = (1e-4,), (2e-4,)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = made.add_subparsers(dest="stage", required=True)
    for stage in ("teacher", "student", "latency"):
        options = stages.add_parser(stage)
        options.add_argument("--data", type=Path, required=True, help="the folder with all tasks")
        options.add_argument("--model", type=Path, help="a folder of transformers; default: all-MiniLM-L6-v2")
        options.add_argument("--name", default="minilm", help="of the model and its settings, in the results")
        one = stage == "latency"  # whose models differ in their weights alone from one task to another
        tasks = {"nargs": 1, "required": True} if one else {"nargs": "+", "default": list(FILES)}
        options.add_argument("--task", choices=tuple(FILES), help="default: all, but for latency", **tasks)
        options.add_argument("--seed", nargs=1 if one else "+", type=int, default=[1], help="default: 1")
        options.add_argument("--work", type=Path, default=Path("base-encoder-work"), help="models and caches; large")
        options.add_argument("--output", type=Path, default=HERE, help="runs, tables and charts")
        options.add_argument("--device", default="cpu", help="cpu or cuda")
        options.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="in training, by autocast")
        if stage != "teacher":
            options.add_argument("--arm", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="default: all")
        if one:
            options.add_argument("--form", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
        rates = TEACHER_RATES if stage == "teacher" else STUDENT_RATES
        options.add_argument("--rate", nargs="+", type=float, default=list(rates), help="learning rates to try")
        for entry in fields(Settings):
            if entry.name != "autocast":
                name, text = f"--{entry.name.replace('_', '-')}", f"{HELP[entry.name]}; default: {entry.default}"
                flag: Any = argparse.BooleanOptionalAction
                kind = {"action": flag} if entry.default is True else {"type": type(entry.default)}
                options.add_argument(name, default=entry.default, help=text, **kind)
    options = stages.add_parser("report")
    options.add_argument("--output", type=Path, default=HERE)
    return made


def place_of(args: argparse.Namespace) -> Place:
    values = {entry.name: getattr(args, entry.name, None) for entry in fields(Settings)}
    values["autocast"] = {"fp32": "float32", "bf16": "bfloat16"}[args.dtype]
    base = args.model or base_model()
    return Place(args.name, base, args.data, args.work, args.output, Settings(**values), args.device)


def run(args: argparse.Namespace) -> None:
    if args.stage == "report":
        print(report(args.output, WANTED if args.output.resolve() == HERE else {}))
        return
    place = place_of(args)
    cells = [Cell(place, task, seed) for seed in args.seed for task in args.task]
    if args.stage == "teacher":
        for cell in cells:
            cell.make_teacher(args.rate)
    elif args.stage == "student":
        run_students(cells, args.arm, args.rate)
    else:
        measure_latency(cells[0], args.arm, args.form)


def main() -> None:
    args = parser().parse_args()
    disable_progress_bars()
    try:
        run(args)
    except UserError as error:
        print(f"base_encoder: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
