"""One distillation step: student and teacher forward, layer-wise loss, backward, clipping, AdamW; tokens per second.

The MoE student against the dense model as its own student, and against a dense one of the same FLOPs. The step
is made of the pieces of `moebert_kernels.distill.MoETrainer`, without its log and its checkpoints. Dropout is on where
the step is timed; losses and gradients are checked without it, from the same weights.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import baselines, encoders, real_text
from benchmarks.measuring import Case, Outputs, Provider, Requirement, Target
from benchmarks.model import Cost
from moebert_kernels import reference
from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill.objectives import LayerwiseObjective, task_loss
from moebert_kernels.distill.teacher import LiveTeacher
from moebert_kernels.layers import MoEFeedForward, moe_layers

PROVIDERS = ("moebert_kernels", "dense", "ideal")
LEARNING_RATE, MAX_GRAD_NORM = 5e-5, 1.0


def cases(target: Target) -> list[Case]:
    if target.smoke:
        return [_case(target, "smoke", [16] * 2), _case(target, "smoke", real_text.typical_batch("mnli", 2))]
    if not target.on_gpu:
        return [_case(target, "minilm-l6", lengths) for lengths in ([128] * 8, real_text.typical_batch("mnli", 8))]
    return [
        _case(target, "bert-base", [128] * 32, Requirement("moebert_kernels", "dense", 1.25)),
        _case(target, "bert-base", real_text.typical_batch("mnli", 32)),
    ]


def _case(target: Target, model: str, lengths: list[int], *requires: Requirement) -> Case:
    B, T = len(lengths), max(lengths)
    return Case(
        name=f"distill-{model}-B{B}-" + (f"T{T}" if min(lengths) == T else "padded"),
        parameters={
            "model": model, "direction": "forward_backward", "dtype": target.dtype_name, "E": encoders.NUM_EXPERTS,
            "I": encoders.expert_size(model), "B": B, "T": T, "tokens": sum(lengths),
        },
        providers=PROVIDERS,
        build=lambda: _build(target, model, lengths),
        baseline="dense",
        requires=requires,
        cost=_costs(target, model, lengths)["moebert_kernels"],
        seconds=6.0,
    )  # fmt: skip


def _costs(target: Target, model: str, lengths: list[int]) -> dict[str, Cost]:
    """By student: its forward and backward, and the teacher's forward; clipping and AdamW are left out."""
    both, batches = "forward_backward", [lengths]
    students = {
        "moebert_kernels": encoders.moe_cost(target, model, batches, direction=both),
        "dense": encoders.dense_cost(target, model, batches, both),
        "ideal": encoders.dense_cost(target, model, batches, both, intermediate_size=encoders.expert_size(model)),
    }
    teacher = encoders.dense_cost(target, model, batches)
    return {name: cost + teacher for name, cost in students.items()}


def _build(target: Target, model: str, lengths: list[int]) -> dict[str, Provider]:
    batch, costs = encoders.padded_batch(target, model, lengths), _costs(target, model, lengths)

    def dense(seed: int, **changed: int) -> BertForSequenceClassification:
        torch.manual_seed(seed)
        built = BertForSequenceClassification(BertConfig(**(encoders.SIZES[model] | changed), num_labels=3))
        baselines.randomise_constants(built)
        return built.to(target.device)  # weights stay float32, as in training with mixed precision

    teacher = dense(0)
    students = {
        "moebert_kernels": convert_to_moe(dense(1), encoders.moe_config(model), importance=encoders.importance(model)),
        "dense": dense(2),
        "ideal": dense(3, intermediate_size=encoders.expert_size(model)),
    }
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": torch.ones_like(batch.ids) if batch.mask is None else batch.mask,
        "labels": torch.arange(len(batch.ids), device=target.device) % teacher.config.num_labels,
    }
    return {name: _provider(student, teacher, inputs, target, costs[name]) for name, student in students.items()}


class Step:
    """One step of training, to be repeated.

    Args:
        student, teacher: transformers models on the device, in float32 (float64 in a reference).
        batch: `input_ids`, `attention_mask` and `labels`.
        target: autocast has its dtype, unless it is the models' own.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], target: Target) -> None:
        self.student, self.batch, self.target = student, batch, target
        self.teacher = LiveTeacher(teacher, target.device, autocast=self.autocast)
        self.objective = LayerwiseObjective("classification")
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def autocast(self) -> AbstractContextManager[object]:
        half = self.target.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.target.device.type, self.target.dtype) if half else nullcontext()

    def run(self) -> Outputs:
        """The whole step in train mode; returns the loss terms."""
        self.student.train()
        terms = self.terms()
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return tuple(term.detach() for term in terms.values())

    def terms(self) -> dict[str, Tensor]:
        """The loss terms of the batch, with their graph."""
        with self.autocast():
            outputs = self.student(**self.batch, output_hidden_states=True)
        terms = {"task": task_loss(outputs, self.batch)}
        return terms | self.objective(outputs, self.teacher(self.batch), self.batch)

    def terms_and_gradients(self) -> Outputs:
        """The loss terms and the gradients of all parameters, without dropout; nothing is updated."""
        self.student.eval()
        terms = list(self.terms().values())
        gradients = torch.autograd.grad(torch.stack(terms).sum(), list(self.student.parameters()))
        return (*(term.detach() for term in terms), *gradients)


def _provider(student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], target: Target, cost: Cost) -> Provider:
    step = Step(student, teacher, batch, target)

    def reference(dtype: torch.dtype) -> Outputs:
        models = (_naive(student, batch).to(dtype), copy.deepcopy(teacher).to(dtype))
        exact = Target(target.device, dtype) if dtype == torch.float64 else target
        return Step(*models, batch, exact).terms_and_gradients()

    facts = {"saved_mib": round(saved_mib(step), 1)}
    return Provider(step.run, reference, checked=step.terms_and_gradients, capture=False, cost=cost, facts=facts)


def _naive(student: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
    """A copy of the student, with `reference.fused_moe_ffn_add_norm` in place of every MoE layer."""
    twin: Any = copy.deepcopy(student)
    ids, mask = batch["input_ids"].flatten(), batch["attention_mask"].flatten()
    for layer in moe_layers(twin):
        expert_ids = reference.hash_route(ids, layer.router.table, mask)
        layer.experts.forward = partial(_naive_experts, layer, expert_ids)
    return twin


def _naive_experts(layer: MoEFeedForward, expert_ids: Tensor, x: Tensor, grouping: object) -> Tensor:
    y = reference.fused_moe_ffn_add_norm(x.flatten(0, 1), expert_ids, *encoders.expert_weights(layer))
    return y.view_as(x)


def saved_mib(step: Step) -> float:
    """What the student's forward keeps for its backward, in MiB: every piece of memory once, parameters left out."""
    kept: dict[int, int] = {}
    ignored = {parameter.untyped_storage().data_ptr() for parameter in step.student.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    step.student.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = step.terms()  # alive until memory is counted: freed memory could be handed out twice
    del terms
    return sum(kept.values()) / 2**20
