"""MicroBERT-style students of 3 layers: distillation through a task-routed mixture of experts, and what each part does.

    python experiments/microbert.py --data FOLDER               # everything that is not done yet, then the report
    python experiments/microbert.py --data FOLDER --train       # without the report: several processes share the work
    python experiments/microbert.py --data FOLDER --report      # the report of what is done, on an idle machine

FOLDER holds SST-2, MRPC, CoLA and STS-B, each with train.tsv and dev.tsv (or .gz). One all-MiniLM-L6-v2 becomes a MoE
with routing by task and is trained on all four, then merged into a plain BERT for each: the teachers, the same ones
for all seeds. The student is every other layer of all-MiniLM-L6-v2. Validation chooses the epoch; scores are of the
labelled test set where there is one (SST-2, MRPC), else of one half of the validation set, and the other half chooses.
Writes results.json, table.md and two charts into experiments/microbert.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout  # comes with torch

from moebert_kernels.bench.benchmark import environment
from moebert_kernels.bench.tables import millions
from moebert_kernels.bench.timing import compare_models, random_inputs
from moebert_kernels.convert import StudentShape, convert_to_moe, make_student, merge, parameter_counts
from moebert_kernels.data.held_out import hold_out
from moebert_kernels.data.metrics import compute_metrics
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import TASKS, TaskData, load_task
from moebert_kernels.demo.data import base_model
from moebert_kernels.demo.run import step
from moebert_kernels.distill.evaluation import Evaluator
from moebert_kernels.distill.identity import changed, described, files_of
from moebert_kernels.distill.loading import load_as_saved, load_model, load_tokenizer
from moebert_kernels.distill.microbert import MicroBertObjective
from moebert_kernels.distill.multi_task import MEAN, JoinedTasks, MultiTaskEvaluator, load_report
from moebert_kernels.distill.recipe import Recipe, Stage, load_recipe
from moebert_kernels.distill.run import train_stages
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.files import once, write_json, write_text
from moebert_kernels.layers import MoEConfig
from moebert_kernels.study.ablation import ARMS, draw, summary, table

HERE = Path(__file__).resolve().parent / "microbert"
FOLDERS = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "stsb": "STS-B"}
MAIN = ("full", "lean", "kd", "finetune")
ABLATION = ("full", "no-fal", "no-gan", "no-moe", "no-hidden", "kd")
ABLATED = ("sst2", "mrpc")
RUNS = [(arm, task) for arm in dict.fromkeys((*MAIN, *ABLATION)) for task in (FOLDERS if arm in MAIN else ABLATED)]
LENGTH, BATCHES = 128, (1, 8)  # of the timings

Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is trained for how long, on how many rows of each task."""

    sst2: int = 2500
    mrpc: int = 1200
    cola: int = 4000
    stsb: int = 1500
    teacher_epochs: int = 3
    teacher_learning_rate: float = 1e-4
    teacher_batch_size: int = 32
    router_learning_rate: float = 1e-2  # a choice changes when logits move by tenths; at 5e-5 they hardly did
    epochs: int = 3
    learning_rate: float = 3e-4
    batch_size: int = 16
    max_length: int = 128
    num_experts: int = 4
    top_k: int = 2


class Study:
    """All runs, each a file of results in `work` that is made once."""

    def __init__(self, work: Path, base: Path, data: Path, settings: Settings):
        self.work, self.base, self.settings, self._data = work, base, settings, data
        files = {f"files of {name}": files_of(data / name) for name in FOLDERS.values()}
        wanted = asdict(settings) | files | {"files of the model": files_of(base)}
        (work / "locks").mkdir(parents=True, exist_ok=True)
        with FileLock(work / "locks" / "settings"):
            changes = changed(once(work / "settings.json", lambda: wanted), wanted)
        if changes:
            raise SystemExit(f"work: expected a new folder, got {work} with results of other {described(changes)}")

    def train(self, seeds: Sequence[int]) -> None:
        """Every student of the seeds. Another process with the same folder makes those that this one is not at."""
        with FileLock(self.work / "locks" / "teachers"):
            for task in FOLDERS:
                self.outputs(task)
            for task in ABLATED:
                self.outputs(task, dense=True)
        for wait in (False, True):
            for seed, (arm, task) in product(seeds, RUNS):
                try:
                    lock = FileLock(self.work / "locks" / f"{task}-{arm}-{seed}", blocking=wait).acquire()
                except Timeout:
                    continue
                with lock:
                    self.student(task, arm, seed)

    def has(self, seed: int) -> bool:
        """Whether a seed is complete."""
        return all((self.work / "results" / f"{task}-{arm}-{seed}.json").exists() for arm, task in RUNS)

    def student(self, task: str, arm: str, seed: int) -> Result:
        """Train one student; its scores and predictions."""
        teacher = self.teacher(task, ARMS[arm].dense_teacher)

        def train() -> Result:
            step(f"seed {seed}", f"{task}, {ARMS[arm].label}")
            student = self.new_student(task, seed)
            begun = time.monotonic()
            fitted = train_stages(
                student,
                self._recipe(arm).with_values({"seed": seed}),
                self.split(task, "train"),
                output_dir=self.work / "students" / f"{task}-{arm}-{seed}",
                teacher=self.outputs(task, ARMS[arm].dense_teacher),
                evaluate=self.evaluator(task, "validation"),
                best_metric=TASKS[task].main_metric,
            )
            seconds = time.monotonic() - begun
            return self._judged(student, task) | {"seconds": seconds, "path": str(fitted.model_dir.resolve())}

        result = once(self.work / "results" / f"{task}-{arm}-{seed}.json", train)
        return result | {"task": task, "arm": arm, "seed": seed, "teacher_score": teacher["score"]}

    def outputs(self, task: str, dense: bool = False) -> TeacherCache:
        """A teacher's outputs for all arms and seeds."""
        teacher = load_model(self.teacher(task, dense)["path"], TASKS[task])
        return TeacherCache.build(
            teacher, self.split(task, "train").batches(self.settings.teacher_batch_size),
            self.work / "outputs" / f"{task}{'-dense' * dense}",
            layers=states("microbert", teacher, self.new_student(task, 0)),
            dtype="float16",  # half the size; its rounding is far below what a student can match
        )  # fmt: skip

    def _recipe(self, arm: str) -> Recipe:
        values = {
            "num_train_epochs": self.settings.epochs, "learning_rate": self.settings.learning_rate,
            "per_device_train_batch_size": self.settings.batch_size,
        }  # fmt: skip
        return load_recipe("microbert").with_values(values | dict(ARMS[arm].values))

    def new_student(self, task: str, seed: int) -> Any:
        """Every other layer of the pretrained model, with a new head."""
        torch.manual_seed(seed)
        pretrained = load_model(self.base, TASKS[task], new_head=True)
        sizes = pretrained.config
        shape = StudentShape(
            sizes.num_hidden_layers // 2, sizes.hidden_size, sizes.intermediate_size, sizes.num_attention_heads
        )
        return make_student(pretrained, shape)

    def teacher(self, task: str, dense: bool = False) -> Result:
        """The plain BERT that the MoE is for a task, or a fine-tuned dense model; its scores and predictions."""
        name = f"{task}-teacher{'-dense' * dense}"
        return once(self.work / "results" / f"{name}.json", lambda: self._make_teacher(name, task, dense))

    def _make_teacher(self, name: str, task: str, dense: bool) -> Result:
        folder = self.work / "teachers" / name
        if dense:
            step("teacher", f"{task}, dense")
            torch.manual_seed(0)
            model = load_model(self.base, TASKS[task], new_head=True)
            path = train_stages(
                model, self._teacher_recipe(), self.split(task, "train"), output_dir=folder,
                evaluate=self.evaluator(task, "validation"), best_metric=TASKS[task].main_metric,
            ).model_dir  # fmt: skip
        else:
            path = folder
            model = merge(load_as_saved(self.moe()["path"]), task)
            model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
        return self._judged(model, task) | {"path": str(path.resolve())}

    def moe(self) -> Result:
        """The task-routed teacher of all tasks."""
        return once(self.work / "results" / "moe.json", self._make_moe)

    def _make_moe(self) -> Result:
        step("teacher", f"{self.settings.num_experts} experts, {self.settings.top_k} for each task, all tasks")
        labels = {name: TASKS[name].label_names for name in FOLDERS}
        experts = {"experts": "copy", "num_experts": self.settings.num_experts, "top_k": self.settings.top_k}
        torch.manual_seed(0)
        dense = load_model(self.base, TASKS["mrpc"], new_head=True)  # whose head gives way to one for each task
        model = convert_to_moe(dense, MoEConfig.task(labels, **experts))
        begun = time.monotonic()
        fitted = train_stages(
            model,
            self._teacher_recipe(router_learning_rate=self.settings.router_learning_rate),
            JoinedTasks({name: self.split(name, "train") for name in FOLDERS}, list(FOLDERS)),
            output_dir=self.work / "teachers" / "moe",
            evaluate=MultiTaskEvaluator(
                {name: self.evaluator(name, "validation") for name in FOLDERS},
                {name: TASKS[name].main_metric for name in FOLDERS},
            ),
            best_metric=MEAN,
        )
        return {
            "path": str(fitted.model_dir.resolve()), "experts": load_report(model),
            "seconds": time.monotonic() - begun, **parameter_counts(model),
        }  # fmt: skip

    def _teacher_recipe(self, **more: Any) -> Recipe:
        settings = {
            "num_train_epochs": self.settings.teacher_epochs, "learning_rate": self.settings.teacher_learning_rate,
            "per_device_train_batch_size": self.settings.teacher_batch_size, "weight_decay": 0.01, "warmup_steps": 0.1,
        }  # fmt: skip
        return Recipe("teacher", (Stage(settings=settings | more),))

    def _judged(self, model: Any, task: str) -> Result:
        judge = self.evaluator(task, "test")
        predictions = judge.predict(model)
        score = compute_metrics(TASKS[task], predictions, judge.references)[TASKS[task].main_metric]
        return {"score": score, "predictions": predictions, **parameter_counts(model)}

    def references(self) -> dict[str, list[Any]]:
        """The true labels or scores of the test rows, by task."""
        return {name: self.evaluator(name, "test").references for name in FOLDERS}

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base)

    @cache  # noqa: B019  a study lives as long as the program
    def data(self, task: str) -> TaskData:
        """A task's first training rows, and a test part."""
        loaded = load_task(TASKS[task], self._data / FOLDERS[task])
        loaded = loaded if "test" in loaded.splits else hold_out(loaded, "halves")
        rows = loaded.train.shuffle(seed=0).select(range(min(getattr(self.settings, task), len(loaded.train))))
        return TaskData(loaded.task, loaded.splits | {"train": rows})

    @cache  # noqa: B019
    def split(self, task: str, split: str) -> TokenizedSplit:
        rows = self.data(task).split(split)
        return TokenizedSplit(rows, TASKS[task], self.tokenizer, max_length=self.settings.max_length)

    def evaluator(self, task: str, split: str) -> Evaluator:
        return Evaluator(self.split(task, split))


def states(recipe: str, teacher: Any, student: Any) -> list[int]:
    """The teacher's states that a recipe needs."""
    objective = MicroBertObjective("classification", load_recipe(recipe).stages[0].terms)
    pairs = objective.pairs(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    return sorted(set(pairs.values()))


def speeds(study: Study, seed: int) -> Result:
    """Milliseconds of whole models on random ids: the routed teacher, its merged form, MoE student, student."""
    dense = load_model(study.teacher("mrpc", dense=True)["path"], TASKS["mrpc"])
    shape = (dense.config.num_hidden_layers, dense.config.intermediate_size)
    importance = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    models = {
        "task-routed teacher": load_model(study.moe()["path"], TASKS["mrpc"]),
        "teacher, merged": load_model(study.teacher("mrpc")["path"], TASKS["mrpc"]),
        "dense teacher": dense,
        "MoE student": convert_to_moe(copy.deepcopy(dense), importance=importance),
        "student": load_model(study.student("mrpc", "full", seed)["path"], TASKS["mrpc"]),
    }  # fmt: skip
    vocabulary = dense.config.vocab_size
    length = min(LENGTH, dense.config.max_position_embeddings)
    times = {B: compare_models(models, *random_inputs(vocabulary, B, length), rounds=21) for B in BATCHES}
    return {
        name: parameter_counts(model) | {f"B{B}_ms": times[B][name]["model_ms"] for B in BATCHES}
        for name, model in models.items()
    }


def cache_speed(study: Study) -> Result:
    """Seconds of a lean epoch with a live teacher and from the cache, and how far apart the students end.

    Times of two epochs minus those of one: what an epoch adds, without loading and saving.
    """
    task = TASKS["mrpc"]
    teacher: Any = load_model(study.teacher("mrpc")["path"], task)
    data = study.data("mrpc").train
    some = data.select(range(min(640, len(data))))
    train = TokenizedSplit(some, task, study.tokenizer, max_length=study.settings.max_length)
    seconds: dict[str, list[float]] = {"live": [], "cached": []}
    students = {}
    with tempfile.TemporaryDirectory() as folder:
        layers = states("microbert-lean", teacher, study.new_student("mrpc", 0))
        outputs = TeacherCache.build(teacher, train.batches(32), Path(folder) / "outputs", layers=layers, pooled=True)
        for epochs in (1, 2):
            recipe = load_recipe("microbert-lean").with_values({"num_train_epochs": epochs})
            for name, source in (("live", teacher), ("cached", outputs)):
                students[name] = study.new_student("mrpc", 0)
                begun = time.monotonic()
                output = Path(folder) / f"{name}-{epochs}"
                train_stages(students[name], recipe, train, teacher=source, output_dir=output)
                seconds[name].append(time.monotonic() - begun)
    one, other = (students[name].state_dict() for name in seconds)
    per_epoch = {name: two - one for name, (one, two) in seconds.items()}
    return {
        "rows": len(train),
        **{f"{name}_s": value for name, value in per_epoch.items()},
        "ratio": per_epoch["live"] / per_epoch["cached"],
        "largest_difference": max((one[name].double() - other[name].double()).abs().max().item() for name in one),
    }


def command(settings: Settings, seeds: Sequence[int]) -> str:
    """What makes such a study, from nothing to its report; where its own pretrained BERT is, it does not say."""
    values = asdict(settings)
    chosen = [
        f" --{name.replace('_', '-')} {values[name]}" for name in values if values[name] != getattr(Settings, name)
    ]
    return f"python experiments/microbert.py --data FOLDER --seeds {' '.join(map(str, seeds))}{''.join(chosen)}"


def report_of(study: Study, seeds: Sequence[int], measure: Callable[[], Result]) -> Result:
    """Everything of results.json."""
    records = [study.student(task, arm, seed) for seed, (arm, task) in product(seeds, RUNS)]
    references = study.references()
    ablated = {name: TASKS[name] for name in ABLATED}
    moe = {key: value for key, value in study.moe().items() if key != "path"}
    return {
        "command": command(study.settings, seeds), "settings": asdict(study.settings),
        "environment": environment(torch.device("cpu"), torch.float32),
        "rows": {task: len(study.split(task, "train")) for task in FOLDERS}, "moe_teacher": moe,
        "main": summary(records, {name: TASKS[name] for name in FOLDERS}, references, MAIN),
        "ablation": summary(records, ablated, references, ABLATION), **measure(),
    }  # fmt: skip


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"`{report['command']}`", "",
        "MicroBERT-style students, 3 layers of 384 from all-MiniLM-L6-v2's 6, after"
        f" {report['settings']['epochs']} epochs of"
        f" {', '.join(f'{count} {task}' for task, count in report['rows'].items())} rows. All four tasks:", "",
        table(report["main"]), "On SST-2 and MRPC, with parts left out:", "", table(report["ablation"]),
        f"Milliseconds on random ids, length {LENGTH}, median [quartiles] of interleaved runs, fp32,"
        f" {report['environment']['threads']} threads:", "",
        f"| model | parameters | {' | '.join(f'B = {B}' for B in BATCHES)} |", "|---" * (len(BATCHES) + 2) + "|",
    ]  # fmt: skip
    for name, entry in report["speeds"].items():
        cells = [f"{t['median']:.1f} [{t['q1']:.1f}, {t['q3']:.1f}]" for t in (entry[f"B{B}_ms"] for B in BATCHES)]
        lines.append(f"| {name} | {millions(entry['total_parameters'])} | {' | '.join(cells)} |")
    cached = report["cache"]
    lines += ["", f"A lean epoch of {cached['rows']} MRPC rows: {cached['live_s']:.1f} s with the teacher, "
              f"{cached['cached_s']:.1f} s from the cache: {cached['ratio']:.2f} times as fast; largest difference of"
              f" the students' weights after two epochs {cached['largest_difference']:.1e}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and report on the seeds that are complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("demo/microbert"), help="models and caches; large")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--base", type=Path, help="another pretrained BERT")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--train", action="store_true", help="make no report")
    parts.add_argument("--report", action="store_true", help="train nothing")
    for field in fields(Settings):
        kind = type(field.default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = parser.parse_args()

    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    study = Study(arguments.work, arguments.base or base_model(), arguments.data, settings)
    if not arguments.report:
        study.train(arguments.seeds)
    if arguments.train:
        return
    complete = [seed for seed in arguments.seeds if study.has(seed)]
    if not complete:
        parser.exit(2, "no seed is complete yet\n")
    report = report_of(
        study, complete, lambda: {"speeds": speeds(study, complete[0]), "cache": cache_speed(study)}
    )  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "results.json", report)
    write_text(arguments.output / "table.md", markdown(report))
    draw(report["main"], arguments.output / "chart.png", f"Students on {', '.join(FOLDERS.values())}")
    draw(report["ablation"], arguments.output / "ablation.png", "Parts left out, SST-2 and MRPC")
    print(markdown(report))


if __name__ == "__main__":
    main()
