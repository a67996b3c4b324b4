"""One run of the demo's recipe: a fine-tuned teacher, the experts its text chooses, and students distilled alike.

Everything lies in one folder. A step whose result is there is not done again, and a step that was interrupted goes on.
The teacher's outputs are computed once for all students.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from moebert_kernels.convert import SiteChoice, choose_experts, convert_to_moe, dense_student, parameter_counts
from moebert_kernels.data.metrics import standard_error
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.data.tasks import TaskData, load_task
from moebert_kernels.demo.data import REVIEWS
from moebert_kernels.distill.evaluation import Evaluator
from moebert_kernels.distill.identity import check_same, model_files, row_facts
from moebert_kernels.distill.loading import keep_lengths, load_model, load_tokenizer
from moebert_kernels.distill.recipe import Recipe as Stages
from moebert_kernels.distill.recipe import Stage
from moebert_kernels.distill.run import train_stages
from moebert_kernels.files import once
from moebert_kernels.layers import MoEConfig

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["moe", "dense"]
Result = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What is trained for how long. Batches are of similar lengths; rates fall linearly to 0."""

    finetune_epochs: int = 2
    distill_epochs: int = 2
    learning_rate: float = 5e-5
    distill_learning_rate: float = 5e-5
    distill_weight: float = 1.0
    batch_size: int = 32
    max_length: int = 128
    num_experts: int = 4
    train_examples: int | None = None  # None: all
    validation_examples: int | None = None


FULL = Recipe()
QUICK = Recipe(finetune_epochs=1, distill_epochs=1, train_examples=2000, validation_examples=200)


class Study:
    """The recipe with one seed.

    Args:
        folder: where everything is written.
        base_model: the folder of the pretrained model.
        data: the folder of train.tsv, validation.tsv and test.tsv.
        seed: of the new head, the order of the data, dropout and hash tables.

    Raises:
        UserError: the folder belongs to another recipe, seed, model or data, or cannot be written.
    """

    def __init__(self, folder: Path, base_model: Path, data: Path, recipe: Recipe = FULL, seed: int = 0):
        self.folder, self.base_model, self.recipe, self.seed = folder, base_model, recipe, seed
        self._data = data
        rows = row_facts(TaskData(REVIEWS, self._splits))
        wanted = asdict(recipe) | {"seed": seed, "files of the model": model_files(base_model), **rows}
        check_same(
            once(folder / "recipe.json", lambda: wanted), wanted,
            f"output: expected a new folder or one of this recipe, seed and data, got {folder} with results of",
            " (use another --output)",
        )  # fmt: skip

    def teacher(self) -> Result:
        """Fine-tune the pretrained model; see `student` for the result."""
        return self._once("teacher", self._make_teacher)

    def student(self, kind: Kind, size: int) -> Result:
        """Convert and distil.

        Args:
            kind: "moe", or "dense" for the teacher with feed-forwards of an expert's size and a fitted second weight.
            size: neurons of an expert.

        Returns:
            `name`, `path` of the model, `accuracy` on the test part with `standard_error`, `accuracy_before`
            distillation, `accuracy_last` of the weights after the last step, `validation_accuracy`, `correct` (a
            0 or 1 for each test sentence), parameter counts, `seconds` of training.
        """
        return self._once(f"{kind}-{size}", lambda name: self._make_student(name, kind, size))

    def finish(self) -> None:
        """Remove what no later step needs: the choice, and the teacher's outputs, about a gigabyte."""
        for name in ("choice", "teacher-outputs"):
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _once(self, name: str, make: Callable[[str], Result]) -> Result:
        return once(self.folder / "results" / f"{name}.json", lambda: make(name))

    def _make_teacher(self, name: str) -> Result:
        torch.manual_seed(self.seed)
        model = load_model(self.base_model, REVIEWS, new_head=True)
        return self._trained(name, model, self.recipe.finetune_epochs, self.recipe.learning_rate)

    def _make_student(self, name: str, kind: Kind, size: int) -> Result:
        teacher = load_model(self.teacher()["path"], REVIEWS)
        config = MoEConfig.chosen(num_experts=self.recipe.num_experts, expert_size=size)
        chosen = self._chosen(teacher, config)
        if kind == "moe":
            student = convert_to_moe(
                copy.deepcopy(teacher), config, chosen=chosen, batches=self._texts(), seed=self.seed, progress=True
            )
        else:
            student = dense_student(teacher, chosen=chosen, batches=self._texts(), progress=True)
        before = self._before(name, student)
        weight = self.recipe.distill_weight
        result = self._trained(
            name, student, self.recipe.distill_epochs, self.recipe.distill_learning_rate, teacher,
            objective="layerwise", loss_weights={"hidden": weight, "prediction": weight},
            teacher_outputs=str(self.folder / "teacher-outputs"),
            # half precision halves the file; its rounding is far below what a student can match
            teacher_outputs_dtype="float16",
        )  # fmt: skip
        return result | {"accuracy_before": before, "expert_size": size}

    def _before(self, name: str, student: Any) -> float:
        return self._once(f"{name}-before", lambda _: self._test(student))["accuracy"]

    def _trained(
        self, name: str, model: Any, epochs: int, learning_rate: float, teacher: Any = None, **distillation: Any
    ) -> Result:
        settings = {
            "num_train_epochs": epochs, "learning_rate": learning_rate, "seed": self.seed,
            "per_device_train_batch_size": self.recipe.batch_size, **distillation,
        }  # fmt: skip
        start = time.monotonic()
        fitted = train_stages(
            model, Stages(name, (Stage(settings=settings),)), self._train, output_dir=self.folder / name,
            evaluate=self._validate, best_metric="accuracy", teacher=teacher,
        )  # fmt: skip
        seconds = time.monotonic() - start
        correct = [int(a == b) for a, b in zip(self._test.predict(model), self._test.references, strict=True)]
        accuracy = sum(correct) / len(correct)
        return {
            "name": name,
            "path": str(fitted.model_dir.resolve()),
            "accuracy": accuracy,
            "accuracy_last": accuracy if fitted.best_step == fitted.step else self._last_accuracy(name),
            "standard_error": standard_error(accuracy, len(correct)),
            "validation_accuracy": fitted.best_metrics["accuracy"],
            "best_step": fitted.best_step,
            "correct": "".join(map(str, correct)),
            "seconds": seconds,
            **parameter_counts(model),
        }

    def _last_accuracy(self, name: str) -> float:
        """Of the weights after the last step, which validation did not choose."""
        return self._test(load_model(self.folder / name / "final", REVIEWS))["accuracy"]

    def _chosen(self, teacher: Any, config: MoEConfig) -> list[SiteChoice]:
        """By the training sentences; both students are of this one choice."""
        folder = self.folder / "choice"
        return choose_experts(teacher, self._texts(), config, seed=self.seed, folder=folder, progress=True)

    def _texts(self) -> list[Any]:
        """Batches of the training sentences, in the same order for every seed."""
        return [self._train.collate(range(n, min(n + 32, len(self._train)))) for n in range(0, len(self._train), 32)]

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.base_model)
        keep_lengths(tokenizer, REVIEWS.name, self.recipe.max_length)
        return tokenizer

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        splits = load_task(REVIEWS, self._data).splits
        for name, limit in (("train", self.recipe.train_examples), ("validation", self.recipe.validation_examples)):
            if limit is not None:
                splits[name] = splits[name].select(range(min(limit, len(splits[name]))))
        return splits

    def _split(self, name: str) -> TokenizedSplit:
        return TokenizedSplit(self._splits[name], REVIEWS, self.tokenizer, max_length=self.recipe.max_length)

    @cached_property
    def _train(self) -> TokenizedSplit:
        return self._split("train")

    @cached_property
    def _validate(self) -> Evaluator:
        return Evaluator(self._split("validation"))

    @cached_property
    def _test(self) -> Evaluator:
        return Evaluator(self._split("test"))
