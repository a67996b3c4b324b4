"""Training on a task: stages one after another on `MoETrainer`, into a folder that AutoModel loads.

In the folder: `best/`, the model with its tokenizer and card; `final/`, the weights after the last step, where they are
others (of a stage that nobody judges the only ones);
`trainer_state.json`, the log; `run.json`, what decides the result and, when the run is finished, its outcome; while it
is not, `Trainer`'s checkpoints.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from moebert_kernels.convert import model_fingerprint
from moebert_kernels.convert.card import save_with_card
from moebert_kernels.data.metrics import Metrics
from moebert_kernels.data.split import TokenizedSplit
from moebert_kernels.distill.arguments import MoETrainingArguments
from moebert_kernels.distill.callbacks import StopCallback
from moebert_kernels.distill.identity import check_same
from moebert_kernels.distill.loading import check_reach, quiet_transformers
from moebert_kernels.distill.microbert import MicroBertObjective
from moebert_kernels.distill.multi_task import JoinedTasks
from moebert_kernels.distill.named_objectives import make_objective
from moebert_kernels.distill.objectives import Objective
from moebert_kernels.distill.recipe import MICROBERT, Recipe, Stage, flat
from moebert_kernels.distill.run_state import last_whole_checkpoint
from moebert_kernels.distill.settings import OF_DATA
from moebert_kernels.distill.task_trainer import TaskTrainer
from moebert_kernels.distill.teacher import check_one_head
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.errors import UserError
from moebert_kernels.files import alone_in, check_writable, recover_folder, write_folder, write_tensors, write_text
from moebert_kernels.nn.context import drop_autocast

RUN = "run.json"
MAPS = "maps.safetensors"  # the objective's maps as a finished run left them
DEFAULTS: dict[str, Any] = {
    "seed": 0, "logging_steps": 10, "train_sampling_strategy": "group_by_length", "save_total_limit": 2,
    "per_device_eval_batch_size": 64, "restore_callback_states_from_checkpoint": True,
}  # fmt: skip
_MISFIT = "expected training arguments that fit each other and this machine, got others"
# These change how often and where a run reports and saves, not where it ends; it may go on under other values.
_FREE = ("save_steps", "save_total_limit", "logging_steps", "logging_strategy", "logging_first_step", "report_to",
         "run_name", "project", "disable_tqdm", "teacher_outputs", "per_device_eval_batch_size",
         "restore_callback_states_from_checkpoint")  # fmt: skip


@dataclass(frozen=True)
class RunResult:
    """Where a run ended. The model that was given holds the weights of `model_dir`."""

    step: int
    model_dir: Path
    stopped_early: bool
    best_step: int | None
    best_metrics: Metrics
    history: list[dict[str, Any]]  # one entry per evaluation: step, epoch and the metrics


def train_stages(
    student: nn.Module,
    recipe: Recipe,
    train: TokenizedSplit | JoinedTasks,
    *,
    output_dir: str | Path,
    evaluate: Callable[[nn.Module], Metrics] | None = None,
    best_metric: str | None = None,
    greater_is_better: bool = True,
    teacher: nn.Module | TeacherCache | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> RunResult:
    """Train `student`; an interrupted call, made again, goes on where it was, and ends with bitwise the same weights.

    What does not fit in any of the stages is found before the first one trains. A map of the same two states as in an
    earlier stage goes on from there. Each of several stages keeps the teacher's outputs, if it does, in its own folder.

    Args:
        student: a transformers model for the task; holds the weights of the result's `model_dir` at the end.
        recipe: stages without a term are skipped. The last stage writes into `output_dir`, the others into
            `output_dir/NAME`; only the last is evaluated, as the first ones may leave the head untrained.
        train: the training data, with its tokenizer, which is saved with the model.
        evaluate: gives metrics by name. Its `fingerprint`, if it has one, names the data that it judges on.
        best_metric: the metric that chooses the checkpoint to keep, of equals the later. Needed with `evaluate`.
        teacher: of the same task, or its kept outputs; None for recipes that need none.
        identity: further JSON-able facts (a task's name, a file) that must agree when the run goes on.
        resume: False starts again, dropping the runs in the folder and their models.

    Raises:
        UserError: as `MoETrainer`; a recipe without terms, or one that needs a teacher and got none; texts longer than
            one of the models takes; the folder cannot be written, belongs to another run or is written by another
            process.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when a checkpoint is written.
    """
    stages, output_dir = recipe.active, Path(output_dir)
    if recipe.needs_teacher:
        if teacher is None:
            raise UserError(f"teacher: expected one for {recipe.name}, got none")
        check_one_head("model", student)
    longest = max(int(train.lengths.max()), train.pad_to or 0)
    models: dict[str, Any] = {"model": student, "teacher": teacher if recipe.needs_teacher else None}
    for name, model in models.items():
        if isinstance(model, nn.Module):
            check_reach(name, model.config, longest)
    objectives = [_objective(stage, student, teacher) for stage in stages]
    facts = {"training data": train.fingerprint, "validation data": getattr(evaluate, "fingerprint", None)}
    facts |= {"model weights": model_fingerprint(student), **(identity or {})}
    runs = []
    for stage, objective in zip(stages, objectives, strict=True):
        last = stage is stages[-1]
        judging: dict[str, Any] = {}
        if last:
            judging = {"evaluate": evaluate, "best_metric": best_metric, "greater": greater_is_better}
        if (kept := stage.settings.get("teacher_outputs")) is not None and len(stages) > 1:
            stage = replace(stage, settings={**stage.settings, "teacher_outputs": str(Path(kept) / stage.name)})
        runs.append(
            _Run(
                student, stage, train, output_dir if last else output_dir / stage.name, objective,
                None if objective is None else teacher, facts, **judging,
            )
        )  # fmt: skip
    with alone_in("output_dir", output_dir) if runs[-1].writes else nullcontext():
        return _train(runs, objectives, resume)


def _train(runs: list[_Run], objectives: list[Objective | None], resume: bool) -> RunResult:
    if runs[-1].writes:
        prepare_folder(runs[-1].folder)
    for run in runs:
        run.check(resume)
    for run in () if resume else runs:
        run.drop()
    carried: dict[tuple[int, int], Tensor] = {}
    for run, objective in zip(runs, objectives, strict=True):
        if isinstance(objective, MicroBertObjective):
            objective.first_maps = carried
        result = run.train()
        if isinstance(objective, MicroBertObjective) and objective.maps is not None and run is not runs[-1]:
            carried = carried | _trained_maps(objective, run.folder)
    return result


def _objective(stage: Stage, student: nn.Module, teacher: Any) -> Objective | None:
    if not stage.needs_teacher:
        return None
    options = dict(stage.settings.get("objective_options") or {})
    if stage.objective == MICROBERT:
        options = {"terms": stage.terms, **options}
    return make_objective(stage.objective or "", options, student, teacher)


def _trained_maps(objective: MicroBertObjective, folder: Path) -> dict[tuple[int, int], Tensor]:
    """The maps that a finished stage left in its folder, whether it was trained now or earlier."""
    file = folder / MAPS
    if not file.exists():
        raise UserError(
            f"stages: expected the maps of the finished one in {file}, got none (use another output folder)"
        )
    return objective.named_maps(load_file(file))


def prepare_folder(folder: Path) -> None:
    """Make `folder`, and put right what an interruption left in it.

    Raises:
        UserError: it cannot be made or written.
    """
    check_writable("output_dir", folder)
    for name in ("best", "final"):
        recover_folder(folder / name)


def check_folder(folder: Path, stage: Stage, facts: Mapping[str, Any]) -> None:
    """Raise UserError for a folder with a run of other settings, or of other `facts`: of what is known without data."""
    saved = _saved(folder)
    made = (*OF_DATA, "objective")  # of which the run notes what they became
    known = {name: value for name, value in _facts(stage).items() if name not in made} | dict(facts)
    if saved:
        saved["identity"] = {name: saved["identity"].get(name) for name in known}
    _check_same_run(folder, saved, known)


def _check_same_run(folder: Path, saved: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    finished = saved.get("result") is not None
    if finished or (saved and last_whole_checkpoint(folder) is not None):
        kind = "a finished" if finished else "an unfinished"
        check_same(
            saved["identity"], identity,
            f"output_dir: expected a new folder or one of the same run, got {folder} with {kind} run of",
            " (resume=False replaces it, another output_dir keeps it)",
        )  # fmt: skip


def _saved(folder: Path) -> dict[str, Any]:
    file = folder / RUN
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _facts(stage: Stage) -> dict[str, Any]:
    settings = {name: value for name, value in stage.settings.items() if name not in _FREE}
    return {"stage": stage.name, "seed": DEFAULTS["seed"], **flat(settings)}


class _Run:
    """One stage in its folder."""

    def __init__(
        self, student: nn.Module, stage: Stage, train: Any, folder: Path, objective: Objective | None, teacher: Any,
        identity: Mapping[str, Any], *, evaluate: Any = None, best_metric: str | None = None, greater: bool = True,
    ) -> None:  # fmt: skip
        self.student, self.train_data, self.folder = student, train, folder
        self.objective, self.teacher, self.evaluate = objective, teacher, evaluate
        settings = {name: value for name, value in stage.settings.items() if name not in OF_DATA}
        for name in ("objective", "objective_options", *["teacher_outputs"] * (objective is None)):
            settings.pop(name, None)  # the objective is made
        self.settings = {**DEFAULTS, **settings, "loss_weights": stage.weights}
        if train.pad_to is not None:
            self.settings["train_sampling_strategy"] = settings.get("train_sampling_strategy", "random")
        facts = _facts(stage)
        strategy = self.settings.get("eval_strategy") or ("steps" if "eval_steps" in settings else "epoch")
        if evaluate is None:
            self.settings |= {"eval_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": None}
        else:
            if strategy == "no":
                raise UserError("eval_strategy: expected steps or epoch, as the best one's model is kept, got no")
            steps = self.settings.get("eval_steps") or self.settings["logging_steps"]  # as transformers has it
            given = {
                "eval_strategy": strategy, "save_strategy": strategy, "save_steps": steps,
                "load_best_model_at_end": True, "metric_for_best_model": best_metric, "greater_is_better": greater,
            }  # fmt: skip
            self.settings = {**given, **self.settings, "eval_strategy": strategy}
            if not self.settings["load_best_model_at_end"]:
                raise UserError("load_best_model_at_end: expected True, since the best evaluation's model is kept, got"
                                f" {self.settings['load_best_model_at_end']}")  # fmt: skip
            if strategy == "steps" and self.settings["save_steps"] != steps:
                raise UserError(
                    f"save_steps: expected eval_steps' {steps}, since the weights of the best evaluation are kept, got"
                    f" {self.settings['save_steps']}"
                )
            if strategy == "steps" and not self.settings.get("eval_steps"):
                facts["logging_steps"] = steps  # which decide here what the best evaluation is
        self.identity = json.loads(json.dumps({**facts, **identity}, default=str))
        processes = self._arguments()
        self.writes, self._wait = processes.should_save, processes.distributed_state.wait_for_everyone

    def _arguments(self) -> MoETrainingArguments:
        try:
            return MoETrainingArguments(str(self.folder), **self.settings)
        except UserError:
            raise
        except (ImportError, ValueError, TypeError) as error:  # transformers'
            reason = " ".join(str(error).split())
            raise UserError(f"settings: {_MISFIT} ({reason})") from None

    def trainer(self) -> TaskTrainer:
        return TaskTrainer(
            self.student, self._arguments(), train=self.train_data, judge=self.evaluate, objective=self.objective,
            teacher=self.teacher,
        )  # fmt: skip

    def check(self, resume: bool) -> None:
        """Refuse what `train` would refuse before its first step; another run in the folder too, with `resume`."""
        if not any(parameter.requires_grad for parameter in self.student.parameters()):
            raise UserError("model: expected at least one parameter that requires a gradient, got none")
        self._check_metric()
        self._wait()
        is_new = self.writes and not self.folder.exists()
        try:
            trainer = self.trainer()
            trainer.create_optimizer()  # which looks at the routers
        except UserError:
            raise
        except (ImportError, ValueError) as error:  # of what the settings ask for, as of an optimizer or a tracker
            raise UserError(f"settings: {_MISFIT} ({' '.join(str(error).split())})") from error
        except RuntimeError as error:
            if "to be installed" not in str(error):
                raise
            raise UserError(f"report_to: expected trackers that are installed, got others ({error})") from error
        finally:
            if is_new:  # made by transformers
                with suppress(OSError):
                    self.folder.rmdir()
        if isinstance(trainer.teacher, TeacherCache):
            self.teacher = trainer.teacher
            self.settings.pop("teacher_outputs", None)
        facts = trainer._identity() | {"processes": trainer.args.world_size}
        self.identity |= json.loads(json.dumps(facts, default=str))
        if resume:
            _check_same_run(self.folder, _saved(self.folder), self.identity)

    def drop(self) -> None:
        """Remove the run in the folder and its models, which must not be taken for the new one's."""
        if self.writes:
            for name in ("best", "final"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._drop_checkpoints()
            (self.folder / RUN).unlink(missing_ok=True)
        self._wait()

    def _check_metric(self) -> None:
        """Raise UserError for a metric that no evaluation will give; a function that names none gives any."""
        wanted = str(self.settings.get("metric_for_best_model") or "").removeprefix("eval_")
        names = getattr(self.evaluate, "metric_names", ())
        if self.evaluate is not None and not wanted:
            raise UserError("best_metric: expected the name of a metric that evaluate gives, got None")
        if wanted and names and wanted not in names:
            raise UserError(f"metric_for_best_model: expected one of {', '.join(names)}, got {wanted!r}")

    def train(self) -> RunResult:
        saved = _saved(self.folder)
        if saved.get("result") is not None:
            result = RunResult(**saved["result"] | {"model_dir": self.folder / saved["result"]["model_dir"]})
            self._load(result.model_dir)
            return result
        trainer = self.trainer()
        self._wait()  # until all have looked at what is there
        if self.writes:
            prepare_folder(self.folder)
            if not saved or saved["identity"] != self.identity:
                self._drop_checkpoints()
                write_text(self.folder / RUN, json.dumps({"identity": self.identity, "result": None}))
        self._wait()
        if self.objective is not None and trainer.is_world_process_zero():
            config: Any = self.student.config
            layers = config.get_text_config().num_hidden_layers
            print(self.objective.summary(layers, trainer.teacher.info.num_layers), file=sys.stderr)
        stop = StopCallback(None if trainer.args.world_size == 1 else trainer._sum)
        trainer.add_callback(stop)
        with stop, quiet_transformers():
            trainer.train(resume_from_checkpoint=True)
        return self._finish(trainer)

    def _finish(self, trainer: TaskTrainer) -> RunResult:
        state = trainer.state
        history = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
        evaluations: list[dict[str, Any]] = [
            {"step": entry["step"], "epoch": entry["epoch"], "metrics": trainer.metrics_in(entry)} for entry in history
        ]
        best_step = state.best_global_step if self.evaluate is not None else None
        best: Metrics = next((entry["metrics"] for entry in evaluations if entry["step"] == best_step), {})
        name = "final" if self.evaluate is None else "best"
        result = RunResult(
            state.global_step, Path(name), state.global_step < state.max_steps, best_step, best, evaluations
        )
        trainer.save_state()
        self._wait()  # until all have loaded the best checkpoint
        if self.writes:
            write_folder(self.folder / name, lambda folder: self._write(folder, best, self.folder / name))
            if self.objective is not None and self.objective.maps is not None:
                write_tensors(self.folder / MAPS, self.objective.maps.state_dict())
            if best_step not in (None, state.global_step):
                self._keep_last(state.global_step)
            facts = asdict(result) | {"model_dir": name}
            write_text(self.folder / RUN, json.dumps({"identity": self.identity, "result": facts}))
            self._drop_checkpoints()
        self._wait()
        drop_autocast(self.student)
        return replace(result, model_dir=self.folder / name)

    def _write(self, folder: Path, scores: Metrics, previous: Path) -> None:
        with quiet_transformers():
            save_with_card(self.student, folder, scores, previous=previous)
        self.train_data.tokenizer.save_pretrained(folder)

    def _keep_last(self, step: int) -> None:
        """Make the last checkpoint, without what only `Trainer` reads, the folder `final`."""
        checkpoint = self.folder / f"checkpoint-{step}"
        for pattern in ("*.pt", "*.pth", "*.bin", "trainer_state.json"):
            for file in checkpoint.glob(pattern):
                file.unlink()
        if (checkpoint / "config.json").exists():
            shutil.rmtree(self.folder / "final", ignore_errors=True)
            checkpoint.rename(self.folder / "final")

    def _load(self, folder: Path) -> None:
        with quiet_transformers():
            kind: Any = type(self.student)
            saved = kind.from_pretrained(folder)
        self.student.load_state_dict(saved.state_dict())

    def _drop_checkpoints(self) -> None:
        for path in self.folder.glob("checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)
