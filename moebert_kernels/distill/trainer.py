"""Fine-tuning and distillation on transformers' `Trainer`: its loop, checkpoints, trackers and processes, our losses.

An optimizer step looks at a window of micro-batches, in all processes. Every term is a mean over sequences (with causal
language models over labels), and a micro-batch counts by its share of the window's, so that a window equals one large
batch whatever the sizes in it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from moebert_kernels.distill.arguments import MoETrainingArguments
from moebert_kernels.distill.callbacks import DiscriminatorCallback, GradientMaskCallback, Window
from moebert_kernels.distill.discriminator import TERM as ADVERSARIAL
from moebert_kernels.distill.embedding import EmbeddingObjective
from moebert_kernels.distill.files import aligned
from moebert_kernels.distill.named_objectives import make_objective
from moebert_kernels.distill.objectives import Objective, batch_weight, is_causal, task_loss
from moebert_kernels.distill.orders import SeededLengthGroups, by_length, numbered
from moebert_kernels.distill.run_state import check_same_run, last_whole_checkpoint, load_state, save_state
from moebert_kernels.distill.teacher import LABEL_KEYS, LiveTeacher, Teacher, forward_keys, teacher_info
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.distill.terms import BALANCE, TASK, Terms
from moebert_kernels.errors import UserError
from moebert_kernels.layers import balance_losses, moe_config, summed_losses
from moebert_kernels.nn import BalanceWindow, GradientMask, MPOWeight, shared_fold

# columns that no model's forward names, but the losses and the teacher's kept outputs need
_OUR_COLUMNS = ("example_id", "labelled", "task_ids")
# Experts' biases and norms are stacked in one (E, I) or (E, H) parameter; a task router's logits are a bias too.
_UNDECAYED = ("bias", "b1", "b2", "norm_weight", "norm_bias", "logits")


class MoETrainer(Trainer):
    """transformers' `Trainer` for models with or without experts, with or without a teacher.

    Everything that is not named here is as in `Trainer`: data, collators, `compute_metrics`, checkpoints, trackers,
    `accelerate launch` and torchrun. What is added:

    - The loss is a weighted sum of named terms: "task" (the labels), "balance" (the routers', over the whole window)
      and the objective's. Each is logged, unweighted. One that is not finite, or that stays zero, stops the run.
    - `train(resume_from_checkpoint=True)` goes on from the last whole checkpoint, or begins where there is none, and
      ends with bitwise the weights of a run that nobody disturbed (fp32 on a CPU, the same number of processes).
    - Data without labels is trained on with the teacher alone; "task" then has no weight.

    Args:
        model: a transformers model; trained in place.
        args: settings.
        teacher: a transformers model, which is never changed, or its kept outputs (`TeacherCache`, whose examples are
            named by a column `example_id` of the data). Needed with an objective.
        objective: what the student follows; None: as `args.objective` says.
        callbacks, options: as for `Trainer`.

    Raises:
        UserError: model, teacher, objective and settings do not fit. `train` raises one where a term is not finite or
            contributes nothing, and where a checkpoint is of another run.
    """

    loss_is_scaled_for_ga = True  # each micro-batch counts by its share of the window
    args: Any  # MoETrainingArguments
    objective: Any  # an Objective, or None
    teacher: Any  # a Teacher, or None
    _signature_columns: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: MoETrainingArguments | None = None,
        *,
        teacher: nn.Module | TeacherCache | None = None,
        objective: Objective | None = None,
        callbacks: list[Any] | None = None,
        **options: Any,
    ) -> None:
        args = MoETrainingArguments("tmp_trainer") if args is None else args
        if model is None:
            raise UserError("model: expected a model, got None (a search over settings makes a trainer for each)")
        if objective is None and args.objective is not None:
            options_given: Any = args.objective_options
            objective = make_objective(args.objective, options_given, model, teacher)
        if (objective is None) != (teacher is None):
            given, missing = ("a teacher", "objective") if objective is None else ("an objective", "teacher")
            raise UserError(f"{missing}: expected one together with {given}, got None")
        if isinstance(teacher, nn.Module):
            ours = {id(parameter) for parameter in model.parameters()}
            if any(id(parameter) in ours for parameter in teacher.parameters()):
                raise UserError("teacher: expected weights of its own, got some that the student trains")
        super().__init__(aligned(model), args, callbacks=callbacks, **options)
        if self.args.n_gpu > 1:
            raise UserError("processes: expected one for each GPU, got one for several (start it by accelerate launch)")
        self.student: Any = model  # as it is without what distributes it
        self.objective, self._source = objective, teacher
        self._causal = is_causal(model)
        self._keys = [key for key in forward_keys(model) if not (self._causal and key == "labels")]
        self._moe = moe_config(getattr(model, "config", None))
        self._check_experts()
        self._losses = Terms(self.args.weights, self._moe, objective is not None, self._sum)
        self._balance = BalanceWindow(model) if self._losses.weights[BALANCE] else None
        self._mask = None
        if self.args.gradient_mask is not None:
            mask = GradientMask(model, **{"seed": self.args.seed, **self.args.gradient_mask})
            self._mask = GradientMaskCallback(mask)
            self.add_callback(self._mask)
        self.teacher = None if objective is None else self._prepared_teacher()
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self._window, self._open = Window([], 0), ExitStack()
        self._batches: list[Any] = []  # of the window, those to come
        if objective is not None and objective.adversary is not None:
            self.add_callback(DiscriminatorCallback(objective.adversary, lambda: self._window, self._sum))

    def _check_experts(self) -> None:
        if self.args.shared_fold and not any(isinstance(module, MPOWeight) for module in self.student.modules()):
            kind = type(self.student).__name__
            raise UserError(f"shared_fold: expected False for a model that folds no weights, got a {kind}")
        if self.is_fsdp_enabled and (self.args.shared_fold or self.args.gradient_mask is not None):
            raise UserError("fsdp: expected no shared_fold and no gradient_mask, which look at whole weights, got one")

    def _prepared_teacher(self) -> Teacher:
        """What gives the teacher's outputs, when the objective has accepted it and made what it trains."""
        objective: Objective = self.objective
        source: Any = self._source
        if isinstance(source, nn.Module):
            if self.args.teacher_outputs is not None:
                source = self._kept_outputs(source)
            else:
                source = LiveTeacher(
                    source, self.args.device, dropout=self.args.teacher_dropout, autocast=self.accelerator.autocast
                )
        elif (folder := self.args.teacher_outputs) is not None:
            raise UserError(f"teacher_outputs: expected none with a teacher's kept outputs, got {folder}")
        if isinstance(source, TeacherCache) and self.args.teacher_dropout:
            raise UserError("teacher_dropout: expected False with kept outputs, which do not change, got True")
        objective.check(self.student, source.info)
        if isinstance(source, TeacherCache):
            source.check_rows(self.train_dataset)
        objective.build(self.student, source.info, self.args.seed)
        if objective.maps is not None and self.is_fsdp_enabled:
            raise UserError("project: expected False under FSDP, which does not know the maps, got True")
        if objective.relation_layer is not None:
            source.record(objective.relation_layer)
        return source

    def _kept_outputs(self, teacher: nn.Module) -> TeacherCache:
        """The teacher's outputs for the training data, computed where they are missing, if the objective takes them."""
        self.train_dataset = numbered(self.train_dataset)
        models: Any = (self.student, teacher)
        ours, theirs = (model.config.get_text_config().num_hidden_layers for model in models)
        layers = sorted({theirs, *self.objective.pairs(ours, theirs).values()})
        kept = {"layers": layers, "pooled": self.objective.pooled, "dtype": self.args.teacher_outputs_dtype}
        info = replace(teacher_info(teacher, layers), stored_as="another dtype", pooled=self.objective.pooled)
        self.objective.check(self.student, info)
        return TeacherCache.build(teacher, by_length(self), self.args.teacher_outputs, device=self.args.device, **kept)

    # What `Trainer` asks of its subclasses

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As `Trainer.train`; True goes on from the last whole checkpoint, or begins where there is none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        if isinstance(resume_from_checkpoint, str):
            check_same_run(resume_from_checkpoint, self._identity())
        try:
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            self._losses.judge(self.state.global_step, last=True)
        finally:
            if self._mask is not None:
                self._mask.release()
            self._open.__exit__(*sys.exc_info())
        return result

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [batch_weight(batch, self._causal) for batch in batches]
        total = int(self._sum(torch.tensor(sum(counts), device=device))) if self.args.world_size > 1 else sum(counts)
        if batches and not total:
            raise UserError(
                f"labels: expected at least one in an optimizer step, got none after {self.state.global_step}"
            )
        self._window, self._batches = Window(counts, total), list(batches)
        return batches, total if batches else None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None  # `get_batch_samples` counts

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        count = self._window.counts[-len(self._batches)]
        if len(self._batches) == len(self._window.counts):
            self._begin_window()
        last = len(self._batches) == 1
        share = count / self._window.total
        with self._balance.part(share) if self._balance is not None and 0 < share < 1 else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._batches = self._batches[1:]
        if last:
            self._end_window()
        return loss

    def _begin_window(self) -> None:
        if self.objective is not None and self.objective.maps is not None:
            self.objective.maps.zero_grad()
        self._open = ExitStack()
        if self.args.shared_fold:
            self._open.enter_context(shared_fold(self.student))
        if self._balance is not None and (len(self._batches) > 1 or self.args.world_size > 1):
            self._count_routes()

    def _count_routes(self) -> None:
        """See how the gates share out the window's tokens, in a pass without gradients.

        Their balance loss is a product of two means over all tokens of the window. The pass draws what the one to come
        draws, if the teacher draws nothing.
        """
        self.model.train()
        sequences = sum(len(batch["input_ids"]) for batch in self._batches)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with (
            torch.no_grad(),
            self._balance.counting(self.args.device, sequences, self._sum),
            torch.random.fork_rng(devices),
        ):
            for batch in self._batches if self._balance.needs_pass else ():
                self.model(**self._inputs(self._prepare_inputs(batch)))

    def _end_window(self) -> None:
        self._open.close()  # gradients are complete now
        if self.objective is not None and self.objective.maps is not None and self.args.world_size > 1:
            for parameter in self.objective.maps.parameters():  # which no distributed wrapper knows
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the terms. In training it is the micro-batch's part of the window's loss."""
        if not model.training:
            loss, outputs = self._judged(model, inputs)
            return (loss, outputs) if return_outputs else loss
        terms, outputs = self._terms(model, inputs, with_task=self._losses.has_task(inputs))
        adversary = None if self.objective is None else self.objective.adversary
        done = self.state.global_step / max(self.state.max_steps, 1)
        total = self._losses.total(terms, None if adversary is None else {ADVERSARIAL: adversary.factor(done)})
        count = self._window.counts[-len(self._batches)]
        self._losses.add(terms, count)
        # gradients of several processes are averaged, hence their number
        loss = total * (count / self._window.total * self.args.world_size)
        return (loss, outputs) if return_outputs else loss

    def _judged(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss of a batch that is evaluated: of its labels, or where it has none the objective's."""
        if any(key in inputs for key in LABEL_KEYS):
            outputs = model(**self._inputs(inputs))
            return task_loss(outputs, dict(inputs), self._preset, self._causal), outputs
        terms, outputs = self._terms(model, inputs, with_task=False)
        return torch.stack([self._losses.weight(name) * term for name, term in sorted(terms.items())]).sum(), outputs

    def _terms(self, model: nn.Module, inputs: Mapping[str, Any], with_task: bool) -> tuple[dict[str, Tensor], Any]:
        """The named, unweighted terms of a batch, each (), and the student's outputs."""
        objective, batch = self.objective, dict(inputs)
        recording = nullcontext() if objective is None else objective.recording()
        states = {} if objective is None else {"output_hidden_states": True}
        with recording, balance_losses() as losses:
            outputs = model(**self._inputs(inputs), **states)
        terms = {}
        if with_task:
            smoothing = self.args.label_smoothing_factor
            terms[TASK] = task_loss(outputs, batch, self._preset, self._causal, smoothing)
        if self._losses.weights[BALANCE] and losses:
            terms[BALANCE] = summed_losses(losses)
        if objective is not None:
            with torch.no_grad():
                theirs = self.teacher(batch)
            terms |= objective(outputs, theirs, batch)
        return terms, outputs

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """As `Trainer.prediction_step`; the objective judges what has no labels, and embeddings are predictions."""
        if self.objective is None or any(key in inputs for key in LABEL_KEYS):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        embeds = isinstance(self.objective, EmbeddingObjective)
        predicted = self.objective.embed(outputs, dict(inputs)) if embeds else outputs.logits
        return loss.detach(), predicted.detach(), None

    def create_optimizer(self, model: Any = None) -> Any:
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not made:
            return optimizer
        if self.args.router_learning_rate is not None:
            routers = {
                id(p) for m in (model or self.model).modules() if type(m).__name__.endswith("Router")
                for p in m.parameters() if p.requires_grad
            }  # fmt: skip
            if not routers:
                raise UserError("router_learning_rate: expected a model with trained routers, got one without")
            moved = []
            for group in optimizer.param_groups:
                moved += [p for p in group["params"] if id(p) in routers]
                group["params"] = [p for p in group["params"] if id(p) not in routers]
            optimizer.add_param_group({"params": moved, "weight_decay": 0.0, "lr": self.args.router_learning_rate})
        if self.objective is not None and self.objective.maps is not None:
            maps = list(self.objective.maps.parameters())
            optimizer.add_param_group({"params": maps, "weight_decay": self.args.weight_decay})
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name.rpartition(".")[2] not in _UNDECAYED]

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.objective is None or self.objective.maps is None:
            return super()._clip_grad_norm(model)
        parameters = [*model.parameters(), *self.objective.maps.parameters()]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._losses.judge(self.state.global_step))
            self._losses.reset()
            if self.objective is not None and self.objective.adversary is not None:
                logs.update(self.objective.adversary.means(self.state.global_step, self._sum))
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        self._losses.judge(self.state.global_step)  # not the metrics of a broken run
        return super().evaluate(*args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._losses.judge(self.state.global_step)  # a broken run must not replace a good checkpoint
        super()._save_checkpoint(model, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_state(output_dir, self.objective, self._losses, self._identity(), self._sum, self.args)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_state(checkpoint, self.objective, self._losses, self.args)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*self._signature_columns, *_OUR_COLUMNS]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is LengthGroupedSampler:
            return SeededLengthGroups(self, sampler.lengths, sampler.batch_size)
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """In the data's order always: predictions belong to its rows."""
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "sequential"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    # Helpers

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values

    @property
    def _preset(self) -> Any:
        return "default" if self.objective is None else self.objective.preset

    def _inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch the model's forward takes."""
        return {key: inputs[key] for key in self._keys if key in inputs}

    def _identity(self) -> dict[str, Any]:
        """Facts that must agree for a run to go on; all other settings are compared by `Trainer`, which warns."""
        facts: dict[str, Any] = {} if self._moe is None else {"experts": self._moe.to_dict()}
        if self._mask is not None:
            facts["gradient_mask"] = self._mask.mask.identity()
        if self.objective is not None:
            facts |= {"objective": type(self.objective).__name__, "teacher weights": self.teacher.info.fingerprint}
            facts |= {f"objective.{name}": value for name, value in self.objective.identity().items()}
        return facts
