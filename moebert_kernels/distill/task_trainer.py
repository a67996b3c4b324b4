"""`MoETrainer` as the commands use it: on tokenised splits, judged by a function of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, ProgressCallback

from moebert_kernels.data.metrics import Metrics
from moebert_kernels.distill.arguments import MoETrainingArguments
from moebert_kernels.distill.callbacks import BarCallback
from moebert_kernels.distill.trainer import MoETrainer
from moebert_kernels.errors import UserError


class TaskTrainer(MoETrainer):
    """`MoETrainer` on tokenised splits, judged by a function of the model; of equal checkpoints the later is kept.

    Args:
        train: the training data.
        judge: gives metrics by name; None: nothing is evaluated.
        model, args, options: as for `MoETrainer`.
    """

    def __init__(self, model: nn.Module, args: MoETrainingArguments, *, train: Any, judge: Any = None, **options: Any):
        self.train_split, self.judge = train, judge
        super().__init__(
            model, args, train_dataset=train.columns, data_collator=train.collator, processing_class=train.tokenizer,
            eval_dataset=None if judge is None else train.columns,  # which Trainer wants, and the judge has its own
            **options,
        )  # fmt: skip
        if self.is_fsdp_enabled:  # each process judges the whole model, and one writes it
            raise UserError("fsdp: expected one process or DDP for a recipe, got FSDP, with which MoETrainer trains")
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(BarCallback())

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Metrics:
        if self.judge is None or (eval_dataset is not None and eval_dataset is not self.eval_dataset):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._losses.judge(self.state.global_step)  # not the metrics of a broken run
        self.model.eval()
        with torch.no_grad():
            found = {f"{metric_key_prefix}_{name}": float(value) for name, value in self.judge(self.model).items()}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    @staticmethod
    def metrics_in(entry: Mapping[str, Any]) -> Metrics:
        """The metrics of an evaluation in the log."""
        return {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As `Trainer` has it, but that of equals the later is the best: it was trained for longer, at a lower rate."""
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if self.args.metric_for_best_model is not None and name not in metrics:
            names = ", ".join(self.metrics_in(metrics))
            raise UserError(f"metric_for_best_model: expected one of {names}, got {name.removeprefix('eval_')!r}")
        equal = self.args.metric_for_best_model is not None and metrics[name] == self.state.best_metric
        if equal:
            self.state.best_global_step = self.state.global_step
        return super()._determine_best_metric(metrics, trial) or equal

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = getattr(self.train_split, "sampler", None)
        if sampler is None:
            return super()._get_train_sampler(train_dataset)
        return sampler(self)
