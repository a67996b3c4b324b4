"""One training loop for fine-tuning and distillation, on accelerate.

An optimizer step looks at a window of micro-batches and weighs each by its share of the window's sequences (with causal
language models, whose loss is a mean over labels, of its labels), so a window equals one large batch whatever the sizes
in it. Several processes take turns in the window's micro-batches.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from moebert_kernels.convert.card import save_with_card
from moebert_kernels.distill.checkpoint import (
    Checkpoints,
    Part,
    aligned,
    write_folder,
    write_tensors,
    write_text,
)
from moebert_kernels.distill.config import Batch, Batches, FitConfig, FitResult, Metrics
from moebert_kernels.distill.identity import check_run
from moebert_kernels.distill.loss import Loss
from moebert_kernels.distill.objectives import Objective, batch_weight
from moebert_kernels.distill.progress import RunLog, StopRequest, TermMeter, quiet_transformers
from moebert_kernels.distill.setup import check_experts, check_teacher, new_optimizer, prepare_folder, run_identity
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.errors import UserError
from moebert_kernels.nn import GradientMask, shared_fold

MAPS = "state/maps.safetensors"  # the objective's maps as a finished run left them, in its output folder


def fit(
    model: nn.Module,
    train: Batches,
    *,
    config: FitConfig,
    output_dir: str | Path,
    objective: Objective | None = None,
    teacher: nn.Module | TeacherCache | None = None,
    evaluate: Callable[[nn.Module], Metrics] | None = None,
    identity: Mapping[str, Any] | None = None,
    also_save: Callable[[Path], object] | None = None,
    gradient_mask: GradientMask | None = None,
    resume: bool = True,
) -> FitResult:
    """Train `model`; an interrupted call, made again, goes on where it was and ends with bitwise the same (fp32, CPU).

    Writes into `output_dir`: `final/` and, with `evaluate`, `best/` (both for from_pretrained), `log.jsonl`, and in
    `state/` the checkpoints of an unfinished run, and of a finished one the objective's maps. None of these is ever
    half-written.

    Args:
        model: a transformers model; moved to the device, and holds the weights of `FitResult.model_dir` at the end.
        train: the training data; see `Batches`.
        config: the settings. The loss is the sum of the terms ("task", "balance" and the objective's), weighted by
            `config.weights`.
        objective: distils from `teacher`; None trains on the labels alone.
        teacher: a transformers model, never changed, or its cached outputs.
        evaluate: called with the model in eval mode and without gradients; `config.best_metric` names the judge. Its
            `fingerprint`, if it has one, names the data that it judges on: a run is not resumed with another one.
        identity: further JSON-able facts (a task's name, a file) that must agree when the run is resumed.
        also_save: called with each model folder that is written, e.g. `tokenizer.save_pretrained`.
        gradient_mask: of the model's central tensors; draws for each optimizer step.
        resume: False starts again, dropping the run in `output_dir`, finished or not, and its models.

    Raises:
        UserError: models, objective, cache, routing or data do not fit; `output_dir` cannot be written or belongs to
            another run; no checkpoint in it is whole; a loss term is not finite or contributes nothing.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, when a checkpoint is written.

    Reseeds the global random generators from `config.seed`.
    """
    run = _Run(
        model, train, config, Path(output_dir), objective, teacher, evaluate, identity or {}, also_save, gradient_mask
    )  # fmt: skip
    try:
        return run.fit(resume)
    finally:
        run.release()


def check_fit(
    model: nn.Module,
    train: Batches,
    *,
    config: FitConfig,
    output_dir: str | Path,
    objective: Objective | None = None,
    teacher: nn.Module | TeacherCache | None = None,
    evaluate: Callable[[nn.Module], Metrics] | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = True,
) -> None:
    """Raise UserError for what `fit` would refuse before its first step; for a run that waits for another to end."""
    run = _Run(model, train, config, Path(output_dir), objective, teacher, evaluate, identity or {}, None, None)
    try:
        if resume and run.finished_progress() is None:
            run.checkpoints.check()
    finally:
        run.release()


@dataclass
class _Progress:
    """Where a run is; JSON-able."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # micro-batches of this epoch that were used
    best: dict[str, Any] | None = None  # {"step", "value", "metrics"}
    stale: int = 0  # evaluations since the best one
    history: list[dict[str, Any]] = field(default_factory=list)
    log_size: int = 0
    meter: dict[str, Any] | None = None
    adversary: dict[str, Any] | None = None


class _Run:
    """One call of `fit`."""

    def __init__(self, model, train, config, output_dir, objective, teacher, evaluate, identity, also_save, mask):
        check_teacher(model, objective, teacher, config)
        check_experts(model, config, mask)
        if len(train) == 0:
            raise UserError("train: expected at least one batch, got none")
        AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
        self.accelerator = accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.config: FitConfig = config
        self.train: Batches = train
        self.output_dir, self.objective, self.evaluate, self.also_save = output_dir, objective, evaluate, also_save
        self.gradient_mask: GradientMask | None = mask

        self.student = aligned(model).to(accelerator.device)
        self.loss = Loss(model, objective, teacher, config, accelerator)
        self.adversary = self.loss.adversary

        self.window = config.accumulation * self.world
        self.steps_per_epoch = math.ceil(len(train) / self.window)
        self.total_steps = min(config.epochs * self.steps_per_epoch, config.max_steps or math.inf)
        optimizer = new_optimizer(self.loss.trained, config, accelerator.device)
        warmup = math.ceil(config.warmup_ratio * self.total_steps)
        # not prepared by accelerate, which would step it once per process
        self.scheduler = get_scheduler(config.schedule, optimizer, warmup, self.total_steps)
        self.parts = {"model": Part(self.loss.trained, optimizer, self.scheduler)}
        if self.adversary is not None:
            self.parts["discriminator"] = self.adversary.part
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

        masked = {} if mask is None else {f"gradient_mask.{name}": value for name, value in mask.identity().items()}
        judged_on = {"validation data": getattr(evaluate, "fingerprint", None)}
        identity = {**judged_on, **masked, **identity}
        self.identity = run_identity(model, train, config, objective, self.loss.teacher, self.world, identity)
        state_dir = output_dir / "state"
        self.finished = state_dir / "finished.json"
        self.checkpoints = Checkpoints(state_dir, self.identity, self.rank, accelerator.wait_for_everyone)
        self.meter = TermMeter(self._sum)
        self.log = RunLog(output_dir / "log.jsonl", writes=self.rank == 0)
        self.at = _Progress()

    def release(self) -> None:
        """Take autocast off the caller's model."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def finished_progress(self) -> dict[str, Any] | None:
        """Where the run ended, if it did.

        Raises:
            UserError: another run ended in the folder.
        """
        if not self.finished.exists():
            return None
        saved = json.loads(self.finished.read_text(encoding="utf-8"))
        check_run(self.output_dir, True, saved["identity"], self.identity)
        return saved["progress"]

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    def fit(self, resume: bool) -> FitResult:
        if self.rank == 0:
            prepare_folder(self.output_dir, resume)
        self.accelerator.wait_for_everyone()
        progress = self.finished_progress()
        if progress is not None:
            self.at = _Progress(**progress)
            self.checkpoints.clear()
            return self._result(reload=True)
        progress = self.checkpoints.load(self.parts)
        if progress is None:
            set_seed(self.config.seed, device_specific=True)
        else:
            self.at = _Progress(**progress)
            self.meter.load_state(self.at.meter, self.accelerator.device, self.rank)
            if self.adversary is not None:
                self.adversary.load_state(self.at.adversary, self.rank)
        self.log.truncate(self.at.log_size)
        if self.objective is not None and self.rank == 0:
            print(self.loss.summary(), file=sys.stderr)
        self._train(resumed=progress is not None)
        if self.loss.weighted is not None:  # which an early stop may leave to judge
            self.meter.check_contributions(self.at.step, self.loss.weighted)
        self._write_model("final")
        if self.rank == 0:
            if self.loss.maps is not None:
                write_tensors(self.output_dir / MAPS, self.loss.maps.state_dict())
            write_text(self.finished, json.dumps({"identity": self.identity, "progress": asdict(self.at)}))
        self.checkpoints.clear()
        return self._result(reload=self.at.best is not None and self.at.best["step"] != self.at.step)

    def _train(self, resumed: bool) -> None:
        at, config = self.at, self.config
        self.model.train()
        bar = tqdm(total=self.total_steps, initial=at.step, desc=self.output_dir.name, disable=self.rank != 0)
        windows = self._windows(resumed)
        with StopRequest() as stop, bar:
            while not self._done():
                window = next(windows)
                self._update(window)
                at.step, at.batch = at.step + 1, at.batch + len(window)
                epoch_ends = at.batch == len(self.train)
                if epoch_ends:
                    at.epoch, at.batch = at.epoch + 1, 0
                bar.update()
                self._report(bar)
                every = epoch_ends if config.eval_steps is None else at.step % config.eval_steps == 0
                improved = self.evaluate is not None and (every or at.step == self.total_steps) and self._evaluate()
                stopping = self._stop_agreed(stop) and not self._done()
                if improved or stopping or at.step % config.save_steps == 0:
                    self._save()
                if stopping:
                    where = f"step {at.step} of {self.total_steps}"
                    bar.write(f"stopped at {where}; the same call goes on from there", file=sys.stderr)
                    raise KeyboardInterrupt(where)

    def _done(self) -> bool:
        patience = self.config.patience
        return self.at.step >= self.total_steps or (patience is not None and self.at.stale >= patience)

    def _stop_agreed(self, stop: StopRequest) -> bool:
        """Whether all processes stop after this step; several only ask each other where they wait anyway."""
        if self.world == 1:
            return stop.requested
        if self.at.step % self.config.log_steps:
            return False
        return bool(self.accelerator.reduce(torch.tensor(float(stop.requested), device=self.accelerator.device)))

    def _windows(self, resumed: bool) -> Iterator[list[Batch]]:
        """An optimizer step's micro-batches, from where the run is on; sets the random generators of a resumed run."""
        skip = self.at.batch
        for epoch in range(self.at.epoch, self.config.epochs):
            if resumed and not skip:
                self.checkpoints.restore_rng()
            batches = iter(self.train(epoch))
            count = sum(1 for _ in islice(batches, skip))
            if resumed and skip:  # only now: making the iterator and skipping may draw
                self.checkpoints.restore_rng()
            resumed, skip = False, 0
            while window := list(islice(batches, self.window)):
                count += len(window)
                yield window
            if count != len(self.train):
                raise UserError(f"train: expected {len(self.train)} batches in epoch {epoch}, got {count}")

    def _update(self, window: list[Batch]) -> None:
        """One optimizer step on the mean over the window's sequences, or labels."""
        weights = [batch_weight(batch, self.loss.causal) for batch in window]
        if not sum(weights):
            raise UserError(f"labels: expected at least one in an optimizer step, got none after step {self.at.step}")
        mine = list(zip(window, weights, strict=True))[self.rank :: self.world]
        if not mine:  # an epoch's last window may be short, but every process takes part in the all-reduce
            mine = [(window[0], 0)]
        with ExitStack() as stack:  # gradients are complete at its end, and reduced
            if self.gradient_mask is not None:
                stack.enter_context(self.gradient_mask.step(self.at.step))
            if self.config.shared_fold:
                stack.enter_context(shared_fold(self.student))
            if len(window) > 1:
                self.loss.count([batch for batch, weight in mine if weight], self._sum)
            for i, (batch, weight) in enumerate(mine):
                last, share = i == len(mine) - 1, weight / sum(weights)
                with nullcontext() if last else self.accelerator.no_sync(self.model), self.loss.part(share):
                    batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
                    terms = self.loss.terms(self.model, batch)
                    total = self.loss.total(terms, self._share)
                    # distributed gradients are averaged over the processes, hence `world`
                    self.accelerator.backward(total * (share * self.world))
                self.meter.add({"loss": total, **terms}, weight)
        beside = self.loss.parameters_beside()
        if self.world > 1:
            for parameter in beside:  # which no distributed wrapper knows
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        if self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_([*self.model.parameters(), *beside], self.config.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.adversary is not None:
            self.adversary.step([weight for _, weight in mine], sum(weights), self._share, self._sum)

    @property
    def _share(self) -> float:
        """Of the run that is done."""
        return self.at.step / self.total_steps

    def _report(self, bar: tqdm) -> None:
        at = self.at
        if at.step % self.config.log_steps and at.step != self.total_steps:
            return
        means = self.meter.means(at.step, self.loss.weighted, last=at.step == self.total_steps)
        self.meter.reset()
        if self.adversary is not None:
            means |= self.adversary.means(at.step, self._sum)
        rate = self.scheduler.get_last_lr()[0]
        self.log.write(step=at.step, epoch=at.step / self.steps_per_epoch, learning_rate=rate, **means)
        bar.set_postfix({name: f"{mean:.4g}" for name, mean in means.items()}, refresh=False)

    def _evaluate(self) -> bool:
        """Evaluate, log, and keep the model if it is the best so far; returns whether it is."""
        at = self.at
        self.meter.means(at.step, self.loss.weighted)  # not the metrics of a broken run
        self.model.eval()
        with torch.no_grad():
            metrics = {name: float(value) for name, value in self.evaluate(self.student).items()}
        self.model.train()
        entry = {"step": at.step, "epoch": at.step / self.steps_per_epoch, "metrics": metrics}
        at.history.append(entry)
        self.log.write(**entry)

        value = metrics[self._judge(metrics)] * (1 if self.config.greater_is_better else -1)
        value = -math.inf if math.isnan(value) else value  # not a number: the best only until there is one
        at.stale = 0 if at.best is None or value > at.best["value"] else at.stale + 1
        if at.best is not None and value < at.best["value"]:
            return False
        # of equals the later: trained for longer, at a lower rate
        at.best = {"step": at.step, "value": value, "metrics": metrics}
        self._write_model("best")
        return True

    def _judge(self, metrics: Metrics) -> str:
        name = self.config.best_metric
        if name is None and len(metrics) == 1:
            return next(iter(metrics))
        if name not in metrics:
            raise UserError(f"best_metric: expected one of {', '.join(metrics)}, got {name!r}")
        return name

    def _write_model(self, name: str) -> None:
        def write(folder: Path) -> None:
            scores = next((entry["metrics"] for entry in self.at.history if entry["step"] == self.at.step), None)
            with quiet_transformers():
                save_with_card(self.student, folder, scores, previous=self.output_dir / name)
            if self.also_save is not None:
                self.also_save(folder)

        if self.rank == 0:
            write_folder(self.output_dir / name, write)
        self.accelerator.wait_for_everyone()

    def _save(self) -> None:
        self.meter.means(self.at.step, self.loss.weighted)  # a broken run must not replace a good checkpoint
        self.at.log_size, self.at.meter = self.log.size(), self.meter.state()
        if self.adversary is not None:
            self.at.adversary = self.adversary.state(self._sum)
        self.checkpoints.save(self.at.step, self.parts, asdict(self.at))

    def _result(self, reload: bool) -> FitResult:
        at = self.at
        model_dir = self.output_dir / ("final" if at.best is None else "best")
        if reload:
            self.accelerator.wait_for_everyone()
            with quiet_transformers():
                saved = type(self.student).from_pretrained(model_dir)
            self.student.load_state_dict(saved.state_dict())
        return FitResult(
            step=at.step,
            model_dir=model_dir,
            stopped_early=at.step < self.total_steps,
            best_step=None if at.best is None else at.best["step"],
            best_metrics={} if at.best is None else at.best["metrics"],
            history=at.history,
        )
