"""Tasks, teachers and students of experiments/base_encoder.py: how they are trained and judged, and what is kept."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import concatenate_datasets
from encoder_arms import ARMS, DTYPES, TEACHER, Arm, chosen_config
from encoder_tasks import load
from filelock import FileLock, Timeout  # comes with torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.identity import commit
from moebert_kernels.convert import SiteChoice, choose_experts, importance_scores, parameter_counts
from moebert_kernels.convert.chosen import MOST_TOKENS
from moebert_kernels.data.columns import collator, tokenized
from moebert_kernels.data.extra import corrupted_copies
from moebert_kernels.data.metrics import compute_metrics
from moebert_kernels.data.tasks import TaskData
from moebert_kernels.distill import MoETrainer, MoETrainingArguments, TeacherCache
from moebert_kernels.errors import UserError
from moebert_kernels.files import replacing, write_json, write_tensors
from moebert_kernels.nn.context import drop_autocast
from moebert_kernels.serve import prepare
from moebert_kernels.serve.tiles import ENGINE as TILES

REDRAWN = 200  # times the test examples, for a score's error
Result = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs of a model have in common; see HELP in base_encoder.py."""

    length: int = 128
    batch: int = 32
    teacher_epochs: int = 3
    epochs: int = 3
    rows: int = 10000
    unlabelled: int = 0
    corrupted: int = 0
    choosing: int = MOST_TOKENS
    in_turn: bool = True
    scored: int = 1000
    weight: float = 1.0
    autocast: str = "float32"


def kind_of_model(folder: Path) -> str:
    """What two models must not be called by one name for."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return ", ".join(f"{config[key]}" for key in ("model_type", "num_hidden_layers", "hidden_size"))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model: expected a folder with an encoder's config.json, got {folder} ({error})") from None


@dataclass(frozen=True)
class Place:
    """Where a study of one model reads and writes."""

    name: str
    base: Path
    data: Path
    work: Path
    output: Path
    settings: Settings
    device: str = "cpu"

    def __post_init__(self) -> None:
        file = self.runs / "settings.json"
        wanted = asdict(self.settings) | {"model": kind_of_model(self.base)}
        self.runs.mkdir(parents=True, exist_ok=True)
        with self.lock("settings"):
            if not file.exists():
                write_json(file, wanted)
            found = json.loads(file.read_text())
        other = [
            f"{name} ({found.get(name)}, now {value})" for name, value in wanted.items() if found.get(name) != value
        ]
        if other:
            raise UserError(f"output: expected runs of the same settings, got {self.runs} of other {', '.join(other)}")

    @property
    def runs(self) -> Path:
        return self.output / "runs" / self.name

    @contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[None]:
        """Of one thing that one process makes; raises Timeout where another one is at it and `wait` is False."""
        folder = self.work / self.name / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / name, blocking=wait):
            yield


class Cell:
    """One task with one seed: the teacher, and what is made of it."""

    def __init__(self, place: Place, task: str, seed: int) -> None:
        self.place, self.name, self.seed, self.settings = place, task, seed, place.settings
        self.folder = place.work / place.name / f"{task}-{seed}"
        self._made: tuple[Arm | None, Any] = None, None

    # data

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.place.base)

    @cached_property
    def data(self) -> TaskData:
        return load(self.name, self.place.data, self.settings.rows)

    @cached_property
    def columns(self) -> dict[str, Any]:
        """Of the splits, of the "text" that chooses experts and calibrates, and of the rows "followed" by students."""
        found = {
            split: tokenized(rows, self.data.task, self.tokenizer, max_length=self.settings.length)
            for split, rows in self.data.splits.items()
        }
        train, more = found["train"], found.get("unlabelled", found["train"].select([]))
        text, numbers = concatenate_datasets([train, more]).remove_columns("example_id"), range(len(train) + len(more))
        text = text.add_column("example_id", [*numbers]).add_column("labelled", [n < len(train) for n in numbers])
        followed = text.select(range(min(len(train) + self.settings.unlabelled, len(text))))
        followed = followed if self.settings.unlabelled else train
        if self.settings.corrupted:
            followed = corrupted_copies(followed, self.tokenizer, self.settings.corrupted, self.seed)
        return found | {"text": text, "followed": followed}

    def batches(self, split: str, rows: Iterable[int]) -> Iterator[dict[str, Tensor]]:
        """Batches of these rows, padded, on the device."""
        columns, order = self.columns[split], list(rows)
        keys = [key for key in columns.column_names if key not in ("length", "example_id", "labelled")]
        make = collator(self.data.task, self.tokenizer)
        for start in range(0, len(order), self.settings.batch):
            some = columns[order[start : start + self.settings.batch]]
            batch = make([{key: some[key][n] for key in keys} for n in range(len(some["input_ids"]))])
            yield {key: value.to(self.place.device) for key, value in batch.items()}

    # what conversions need, see encoder_arms.Made

    @property
    def teacher_facts(self) -> Result:
        file = self.folder / "teacher.json"
        if not file.exists():
            raise UserError(f"teacher: expected one of {self.name}, seed {self.seed}, got none (run that stage first)")
        return json.loads(file.read_text())

    @cached_property
    def teacher(self) -> Any:
        facts = self.teacher_facts
        return self._loaded(self.folder / f"teacher-{facts['rate']}")

    def texts(self) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.columns["text"]), generator=generator).tolist()
        found, count = [], 0
        for batch in self.batches("text", order):
            batch.pop("labels")
            found.append(batch)
            count += int(batch["attention_mask"].sum())
            if count >= self.settings.choosing:
                break
        return found

    def chosen(self, part: int, experts: int = 4) -> list[SiteChoice]:
        name = f"choice-{experts}-of-{part}"
        with self.place.lock(f"{self.name}-{self.seed}-{name}"):
            return choose_experts(
                self.teacher, self.texts(), chosen_config(self.teacher, part, experts), seed=self.seed,
                max_tokens=self.settings.choosing, folder=self.folder / name,
            )  # fmt: skip

    def correcting(self) -> list[dict[str, Tensor]] | None:
        return self.texts() if self.settings.in_turn else None

    def importance(self, split: str) -> Tensor:
        name = {"train": "train", "held-out": "validation"}[split]
        file = self.folder / f"importance-{name}.safetensors"
        with self.place.lock(f"{self.name}-{self.seed}-importance"):
            if not file.exists():
                rows = range(min(self.settings.scored, len(self.columns[name])))
                write_tensors(file, {"scores": importance_scores(self.teacher, self.batches(name, rows))})
        return load_file(file)["scores"]

    def outputs(self) -> TeacherCache:
        """The teacher's outputs for the training rows, computed once for all students."""
        with self.place.lock(f"{self.name}-{self.seed}-outputs"):
            student, folder = copy.deepcopy(self.teacher), self.folder / "outputs"
            options = {"teacher_outputs": str(folder), "teacher_outputs_dtype": "float16", "objective": "layerwise"}
            self._trainer(student, "outputs-run", 1e-5, 1, teacher=self.teacher, **options)  # makes them
            return TeacherCache(folder)

    # training

    def _loaded(self, folder: Path, **options: Any) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **options)
        return model.to(self.place.device).eval()

    def _trainer(self, model: Any, name: str, rate: float, epochs: int, teacher: Any = None, **options: Any) -> Any:
        args = MoETrainingArguments(
            str(self.folder / name), num_train_epochs=epochs, learning_rate=rate, seed=self.seed, weight_decay=0.01,
            warmup_steps=0.06, per_device_train_batch_size=self.settings.batch, report_to="none", disable_tqdm=True,
            per_device_eval_batch_size=self.settings.batch, train_sampling_strategy="group_by_length",
            bf16=self.settings.autocast == "bfloat16", use_cpu=self.place.device == "cpu", save_strategy="steps",
            save_steps=0.25, save_total_limit=1, logging_steps=50, **options,
        )  # fmt: skip
        make, rows = collator(self.data.task, self.tokenizer), self.columns["train" if teacher is None else "followed"]
        return MoETrainer(model, args, train_dataset=rows, data_collator=make, teacher=teacher)

    def _trained(self, model: Any, name: str, rate: float, epochs: int, **options: Any) -> Result:
        """Steps of the run, and seconds by the wall clock since it was begun or last taken up."""
        start = time.monotonic()
        trainer = self._trainer(model, name, rate, epochs, **options)
        trainer.train(resume_from_checkpoint=True)
        drop_autocast(model)
        model.eval()
        return {"steps": trainer.state.global_step, "seconds": round(time.monotonic() - start, 1)}

    def make_teacher(self, rates: Iterable[float]) -> None:
        """Fine-tune with each rate; the one that is best on the held-out rows is the teacher from then on."""
        with self.place.lock(f"{self.name}-{self.seed}-teacher"):
            if (self.folder / "teacher.json").exists():
                return
            tried = [self._once(TEACHER, rate, lambda name, rate=rate: self._fine_tuned(name, rate)) for rate in rates]
            best = max(tried, key=lambda result: result["held_out"])
            if not (self.folder / f"teacher-{best['rate']}").exists():  # the results of another machine, for one
                raise UserError(
                    f"work: expected the weights of the teachers that {self.place.runs} has results of, got none in"
                    f" {self.folder} (copy them, or take another --output)"
                )
            write_json(self.folder / "teacher.json", best)

    def _fine_tuned(self, name: str, rate: float) -> Result:
        torch.manual_seed(self.seed)
        labels = dict(enumerate(self.data.task.label_names)) or {0: "LABEL_0"}
        options = {"id2label": labels, "label2id": {label: number for number, label in labels.items()}}
        model = self._loaded(self.place.base, **options)
        facts = self._trained(model, f"{name}-run", rate, self.settings.teacher_epochs)
        model.save_pretrained(self.folder / name)
        return facts | self.judged(model, student=False)

    def make_student(self, arm: str, rate: float) -> None:
        """Convert and distil, or with the rate 0 convert alone; does nothing where that is done.

        Raises:
            Timeout: another process is at it.
        """
        with self.place.lock(f"{self.name}-{self.seed}-{arm}-{rate}", wait=False):
            self._once(
                arm, rate, lambda name: self._distilled(name, ARMS[arm], rate) if rate else self._untrained(ARMS[arm])
            )

    def _student(self, arm: Arm) -> Any:
        """As it begins; what was made last is kept for another rate."""
        if self._made[0] is not arm:
            self._made = arm, arm.make(self)
        return copy.deepcopy(self._made[1])

    def _untrained(self, arm: Arm) -> Result:
        start = time.monotonic()
        student = self._student(arm)
        facts = {"steps": 0, "seconds": round(time.monotonic() - start, 1)}
        return facts | self._of_teacher() | self.judged(student, arm.packs)

    def _of_teacher(self) -> Result:
        best = self.teacher_facts
        return {"teacher": best["scores"]["float32"], "teacher_held_out": best["held_out"]}

    def _distilled(self, name: str, arm: Arm, rate: float) -> Result:
        student = self._student(arm)
        if not arm.dropout:
            without_dropout(student)
        before = self.score(student, "validation")
        weights = {} if arm.objective == "microbert" else dict.fromkeys(("hidden", "prediction"), self.settings.weight)
        facts = self._trained(
            student, f"{name}-run", rate, self.settings.epochs, objective=arm.objective,
            loss_weights=weights | dict(arm.weights), teacher_dropout=arm.dropout,
            teacher=self.teacher if arm.dropout else self.outputs(),
        )  # fmt: skip
        return facts | self._of_teacher() | {"held_out_before": before} | self.judged(student, arm.packs)

    def _once(self, arm: str, rate: float, make: Any) -> Result:
        file = self.place.runs / f"{self.name}-{self.seed}-{arm}-{rate}.json"
        if not file.exists():
            name = f"{arm}-{rate}"
            print(f"{time.strftime('%H:%M:%S')} {self.place.name} {file.stem}", flush=True)
            made = make(name)
            facts = {"task": self.name, "seed": self.seed, "arm": arm, "rate": rate, "device": self.place.device}
            facts |= {"commit": commit(), "torch": torch.__version__, "transformers": transformers.__version__}
            write_json(file, facts | made)
            print(
                f"{time.strftime('%H:%M:%S')} {made['held_out']:.4f} {made['scores']} {made['seconds']} s", flush=True
            )
            shutil.rmtree(self.folder / f"{name}-run", ignore_errors=True)
        return json.loads(file.read_text())

    # judging

    def answers(self, model: Any, split: str) -> np.ndarray:
        """(N,) classes or scores, in the order of the rows."""
        columns = self.columns[split]
        order = np.argsort(columns["length"], kind="stable")
        with torch.no_grad():
            logits = [
                model(**{key: value.to(model.device) for key, value in batch.items() if key != "labels"}).logits.float()
                for batch in self.batches(split, order.tolist())
            ]
        rows = torch.cat(logits).cpu().numpy()
        found = np.empty_like(rows)
        found[order] = rows
        return found[:, 0] if self.data.task.kind == "regression" else found.argmax(1)

    def score(self, model: Any, split: str, answers: np.ndarray | None = None, rows: Any = slice(None)) -> float:
        task = replace(self.data.task, metrics=(self.data.task.main_metric,))
        answers = self.answers(model, split) if answers is None else answers
        return compute_metrics(task, answers[rows], np.asarray(self.columns[split]["labels"])[rows])[task.main_metric]

    def teacher_answers(self) -> np.ndarray:
        """On the test rows."""
        with self.place.lock(f"{self.name}-{self.seed}-answers"):
            return once_array(self.folder / "teacher-answers.npy", lambda: self.answers(self.teacher, "test"))

    def agreement(self, answers: np.ndarray) -> float:
        """What the metric says of a student with its teacher's answers for labels: fidelity, without labels' noise."""
        task = replace(self.data.task, metrics=(self.data.task.main_metric,))
        return compute_metrics(task, answers, self.teacher_answers())[task.main_metric]

    def prepared(self, model: Any, dtype: str) -> Any:
        """In this form of DTYPES; training text calibrates."""
        form, calibrated, _ = dtype.partition("-calibrated")
        return prepare(model, form, batches=self.texts() if calibrated else None)

    def judged(self, model: Any, packs: bool = True, student: bool = True) -> Result:
        """Scores on the held-out rows and, in each dtype, on the test rows; the first one's error over examples."""
        model.eval()
        answers = self.answers(model, "test")
        draws = np.random.default_rng(0).integers(len(answers), size=(REDRAWN, len(answers)))
        scores = {"float32": self.score(model, "test", answers)}
        same = False
        for dtype in DTYPES[1:] if packs else ():
            if same and dtype in ("int8-calibrated", "int8-token"):
                scores[dtype] = scores["int8"]
                continue
            prepared = self.prepared(copy.deepcopy(model).cpu(), dtype)
            scores[dtype] = self.score(prepared, "test")
            if dtype == "int8":  # in the package's own kernel each row has a scale in any of the three
                same = all(choice.engine == TILES for _, choice in prepared.prepared_choices)
        agreement = {"agreement": self.agreement(answers)} if student else {}
        return agreement | {
            "metric": self.data.task.main_metric,
            "held_out": self.score(model, "validation"),
            "scores": scores,
            "error": float(np.std([self.score(model, "test", answers, rows) for rows in draws])),
            **parameter_counts(model),
        }


def once_array(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in this file, which is made where there is none."""
    if not file.exists():
        with replacing(file) as partial, partial.open("wb") as handle:
            np.save(handle, make())
    return np.load(file)


def without_dropout(model: Any) -> None:
    """A student that follows outputs without dropout has none."""
    for module in model.modules():
        for name in ("p", "output_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def run_students(cells: Iterable[Cell], arms: Iterable[str], rates: Iterable[float]) -> None:
    """Every arm of every cell; what another process is at is left to it."""
    for cell in cells:
        for arm in arms:
            for rate in rates:
                try:
                    cell.make_student(arm, rate)
                except Timeout:
                    print(f"{cell.name}-{cell.seed}-{arm}-{rate}: another process is at it", flush=True)
