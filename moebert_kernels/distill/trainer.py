"""Fine-tuning and distillation on transformers' `Trainer`: its loop, checkpoints, trackers and processes, our losses.

An optimizer step looks at a window of micro-batches, in all processes. Every term is a mean over sequences (with causal
language models over labels), and a micro-batch counts by its share of the window's, so that a window equals one large
batch whatever the sizes in it.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from moebert_kernels.convert.sample_loss import LABEL_KEYS, is_causal
from moebert_kernels.cpu import aligned
from moebert_kernels.distill import argument_checks
from moebert_kernels.distill.arguments import MoETrainingArguments
from moebert_kernels.distill.callbacks import DiscriminatorCallback, GradientMaskCallback, Window
from moebert_kernels.distill.discriminator import TERM as ADVERSARIAL
from moebert_kernels.distill.judging_trainer import JudgingTrainer
from moebert_kernels.distill.kept_outputs import kept_outputs
from moebert_kernels.distill.named_objectives import make_objective
from moebert_kernels.distill.objectives import Objective, batch_weight, sequences_in
from moebert_kernels.distill.orders import SeededLengthGroups, padded
from moebert_kernels.distill.parameter_groups import add_groups, decayed
from moebert_kernels.distill.run_state import check_same_run, last_whole_checkpoint, load_state, save_state
from moebert_kernels.distill.step_graphs import StepGraphs, check_graphs
from moebert_kernels.distill.teacher import LiveTeacher, Teacher, forward_keys
from moebert_kernels.distill.teacher_cache import TeacherCache
from moebert_kernels.distill.terms import BALANCE, Terms, has_labels
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config
from moebert_kernels.nn import BalanceWindow, GradientMask, shared_fold

# columns that no model's forward names, but the losses and the teacher's kept outputs need
_OUR_COLUMNS = ("example_id", "labelled", "task_ids")


class MoETrainer(JudgingTrainer):
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
        argument_checks.check_given(model, args, options)
        assert model is not None
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
        if objective is not None:
            argument_checks.find_unused(args)
        super().__init__(aligned(model), args, callbacks=callbacks, **options)
        self.model_accepts_loss_kwargs = True  # `_step` scales: a micro-batch counts by its share of the window
        if self.args.n_gpu > 1:
            raise UserError("processes: expected one for each GPU, got one for several (start it by accelerate launch)")
        self.student: Any = model  # as it is without what distributes it
        self.objective, self._source = objective, teacher
        self._causal = is_causal(model)
        keys = forward_keys(model)
        self._keys = [key for key in keys if not (self._causal and key == "labels")]
        self._takes_labels = has_labels(dict.fromkeys(keys))
        self._moe = moe_config(getattr(model, "config", None))
        argument_checks.check_experts(model, self.args, self.is_fsdp_enabled)
        argument_checks.check_smoothing(model, self.args)
        argument_checks.warn_of_few_bits(model)
        self._losses = Terms(self.args.weights, self._moe, objective, self._sum)
        self._balance = BalanceWindow(model) if self._losses.weights[BALANCE] else None
        self._mask = None
        if self.args.gradient_mask is not None:
            mask = GradientMask(model, **{"seed": self.args.seed, **self.args.gradient_mask})
            self._mask = GradientMaskCallback(mask)
            self.add_callback(self._mask)
        self.teacher = None if objective is None else self._prepared_teacher()
        argument_checks.check_optimizer(self.optimizer, self._maps, self.args)
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self._window, self._open = Window([], 0), ExitStack()
        self._batches: list[Any] = []  # of the window, those to come
        self._share: float | Tensor = 1.0  # of the micro-batch in the window
        self._theirs: Any = None  # what the teacher's cache gives for it, where a graph cannot ask
        self._graphs = None
        if self.args.pad_to_multiple_of is not None:
            self.data_collator = padded(self.data_collator, self.args.pad_to_multiple_of)
        if self.args.cuda_graphs:
            check_graphs(self)
            self._graphs = StepGraphs([*model.parameters(), *(self._maps.parameters() if self._maps else ())])
        if objective is not None and objective.adversary is not None:
            self.add_callback(DiscriminatorCallback(objective.adversary, lambda: self._window, self._sum))

    def _prepared_teacher(self) -> Teacher:
        """What gives the teacher's outputs, when the objective has accepted it and made what it trains."""
        objective: Objective = self.objective
        source: Any = self._source
        kept = isinstance(source, TeacherCache) or self.args.teacher_outputs is not None
        if kept and self.args.teacher_dropout:
            raise UserError("teacher_dropout: expected False with kept outputs, which do not change, got True")
        live = None
        if isinstance(source, nn.Module):
            live = LiveTeacher(
                source, self.args.device, dropout=self.args.teacher_dropout, autocast=self.accelerator.autocast
            )
            source = live if self.args.teacher_outputs is None else kept_outputs(self, source)
        elif (folder := self.args.teacher_outputs) is not None:
            raise UserError(f"teacher_outputs: expected none with a teacher's kept outputs, got {folder}")
        self._judging_teacher = live or source
        objective.check(self.student, source.info)
        if isinstance(source, TeacherCache):
            source.check_rows(self.train_dataset)
        # `Trainer` moves some students only when it trains
        objective.build(self.student, source.info, self.args.seed, self.args.device)
        argument_checks.check_built(objective, self.args, self.is_fsdp_enabled)
        if objective.relation_layer is not None:
            source.record(objective.relation_layer)
        return source

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
            for held in (self._mask, *self.callback_handler.callbacks):  # some change a model until a training ends
                getattr(held, "release", lambda: None)()
            self._open.__exit__(*sys.exc_info())
        return result

    def _init_training_state(self, *args: Any, **options: Any) -> Any:
        """As `Trainer` has it; forgets what an earlier training noted, before a checkpoint says what to take up."""
        self._losses.load_state({"names": [], "sums": None, "contributed": []}, self.args.device, 0)
        if self.objective is not None and self.objective.adversary is not None:
            self.objective.adversary.forget()
        for stopping in self._early_stopping:
            stopping.early_stopping_patience_counter = 0
        return super()._init_training_state(*args, **options)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        for stopping in self._early_stopping if self.args.early_stopping_patience is not None else ():
            stopping.early_stopping_patience = self.args.early_stopping_patience  # now, whatever it was

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """As `Trainer` has it, but a run that goes on from where it stopped early stops before a step."""
        if any(stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in self._early_stopping):
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **options)  # type: ignore[no-untyped-call]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if len(batches) < num_batches:  # a stream has ended: `Trainer` would add them to the next epoch's first step
            batches = []
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
        share = count / self._window.total
        part = self._balance is not None and 0 < share < 1
        if self._graphs is None:
            loss, values = self._step(model, part, inputs, share)
        else:
            inputs = dict(self._prepare_inputs(inputs))
            theirs = self.teacher(inputs) if isinstance(self.teacher, TeacherCache) else None
            state = part, None if self._mask is None else self._mask.mask.masked
            loss, values = self._graphs(partial(self._step, model, part), state, inputs, share, theirs)
        self._losses.add(self._names, values, count)
        self._batches = self._batches[1:]
        if not self._batches:
            self._end_window()
        return loss

    def _step(
        self, model: nn.Module, part: bool, inputs: dict[str, Any], share: float | Tensor, theirs: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of a micro-batch, `part` of a balanced window; its loss, and the terms' values."""
        self._share, self._theirs = share, theirs
        with self._balance.part(share) if part else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch=1)  # any: `Trainer` must not scale too
        self._theirs = None
        return loss, self._values

    def _begin_window(self) -> None:
        if self._maps is not None:
            self._maps.zero_grad()
        if self.objective is not None and self.objective.adversary is not None:
            self.objective.adversary.drop_window()  # one that an error ended
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
        sequences = sum(map(sequences_in, self._batches))
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
        if self._maps is not None and self.args.world_size > 1:
            for parameter in self._maps.parameters():  # which no distributed wrapper knows
                if parameter.grad is not None:  # of a term without a weight
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the terms. In training it is the micro-batch's part of the window's loss."""
        if not model.training:
            loss, outputs = self._judged(model, inputs)
            return (loss, outputs) if return_outputs else loss
        terms, outputs = self._terms(
            model, inputs, with_task=self._losses.has_task(inputs if self._takes_labels else {})
        )
        adversary = None if self.objective is None else self.objective.adversary
        done = self.state.global_step / max(self.state.max_steps, 1)
        total = self._losses.total(terms, None if adversary is None else {ADVERSARIAL: adversary.factor(done)})
        self._names, self._values = list(terms), torch.stack([term.detach().float() for term in terms.values()])
        # gradients of several processes are averaged, hence their number
        loss = total * (self._share * self.args.world_size)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> Any:
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made:
            add_groups(optimizer, model or self.model, self._maps, self.args)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed(super().get_decay_parameter_names(model))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self._maps is None:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        parameters = [*model.parameters(), *self._maps.parameters()]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._losses.judge(self.state.global_step))
            self._losses.reset()
            if self.objective is not None and self.objective.adversary is not None:
                logs.update(self.objective.adversary.means(self.state.global_step, self._sum))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._losses.judge(self.state.global_step)  # a broken run must not replace a good checkpoint
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, and the whole model too where checkpoints hold shards. All processes call it."""
        is_checkpoint = _internal_call and output_dir is not None
        if self._saves_shards and not is_checkpoint:  # `Trainer` saves nothing then
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))  # gathered
        super().save_model(output_dir, _internal_call)

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
            keys = forward_keys(self._source) if isinstance(self._source, nn.Module) else ()
            theirs = [key for key in keys if key not in LABEL_KEYS]  # as token types that the student does without
            self._signature_columns = [*self._signature_columns, *theirs, *_OUR_COLUMNS]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if type(sampler) is LengthGroupedSampler:
            return SeededLengthGroups(self, sampler.lengths, sampler.batch_size)
        return sampler

    # Helpers

    @property
    def _saves_shards(self) -> bool:
        return self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    @property
    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]

    @property
    def _maps(self) -> Any:
        """What is trained together with the student."""
        return None if self.objective is None else self.objective.maps

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values

    def _identity(self) -> dict[str, Any]:
        """Facts that must agree for a run to go on. Of others `Trainer` compares a few, and warns."""
        args = self.args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        facts: dict[str, Any] = {"seed": args.seed, "sequences_per_step": size}
        facts |= {f"loss_weights.{name}": weight for name, weight in args.weights.items()}
        if self._moe is not None:
            facts["experts"] = self._moe.to_dict()
        if self._mask is not None:
            facts["gradient_mask"] = self._mask.mask.identity()
        if self.objective is not None:
            facts |= {"objective": type(self.objective).__name__, "teacher weights": self.teacher.info.fingerprint}
            facts |= {"teacher_dropout": True} if args.teacher_dropout else {}
            facts |= {f"objective.{name}": value for name, value in self.objective.identity().items()}
        return facts
