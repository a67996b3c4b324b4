"""Importance of every FFN neuron: MoEBERT (2204.07675), eq. 4, in one backward pass per batch.

    I_j = sum over samples of | <w1_j, dL/dw1_j> + <w2_j, dL/dw2_j> |          L: the loss of one sample

The gradient of a weight is a sum over tokens, so both inner products are sums over tokens of quantities that one
backward pass of the *summed* loss already holds, sample by sample and for all layers at once:

    <w1_j, dL/dw1_j> = sum_t dL/dpre[t, j] (pre[t, j] - b1[j])          pre = w1 x + b1
    <w2_j, dL/dw2_j> = sum_t dL/dh[t, j] h[t, j]                        h = act(pre)

A gated feed-forward's neuron j is row j of the gate and row j of the other branch: both rows' products are summed.

No weight gradient is computed, and nothing below the first FFN is differentiated.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moebert_kernels.convert.batches import reading, tensors_of
from moebert_kernels.convert.sample_loss import is_causal, sample_loss, unread_labels
from moebert_kernels.convert.sites import Site, common_width, find_sites
from moebert_kernels.errors import UserError
from moebert_kernels.nn.context import drop_autocast


def importance_scores(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    start: Tensor | None = None,
    on_batch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Score every FFN neuron of a fine-tuned dense model; higher is more important.

    The model runs in eval mode, in its own dtype, without autocast; its weights, their `requires_grad` and the mode of
    its modules are as before when this returns. The scores are sums over samples: they do not depend on how the samples
    are batched or padded.

    Args:
        model: a transformers model with a task head, whose feed-forwards `find_sites` knows; they are layers 1 to L.
        batches: mappings of tensors (B, ...) with the labels: `labels`, or `start_positions` and `end_positions`.
            Entries that the model's forward does not take (an example id) are ignored.
        start: (L, D) float64, totals of batches scored before, to continue an interrupted run.
        on_batch: called after each batch with its number of samples and the running totals (L, D) float64.

    Returns:
        (L, D) float32 on the CPU, accumulated in float64.

    Raises:
        UserError: the model has no dense FFNs or FFNs of several widths, there is no batch, labels are missing or
            impossible, the shape of `start` does not fit, or scores are not finite.
    """
    sites = find_sites(model)
    shape = (len(sites), common_width(sites))
    device = sites[0].weights().w1.device
    totals = torch.zeros(shape, dtype=torch.float64)
    if start is not None:
        if start.shape != shape:
            raise UserError(f"start: expected shape (L={shape[0]}, D={shape[1]}), got {tuple(start.shape)}")
        totals = start.to(torch.float64, copy=True).cpu()
    accepted = set(inspect.signature(model.forward).parameters)

    seen = 0
    with frozen_eval(model), torch.autocast(device.type, enabled=False):
        for tensors in tensors_of(batches, device):
            scores = _batch_scores(model, sites, tensors, accepted)
            if not torch.isfinite(scores).all():
                raise UserError(f"model: expected finite gradients, got nan or inf in batch {seen}")
            totals += scores.cpu()
            seen += 1
            if on_batch is not None:
                samples = next(iter(tensors.values())).shape[0]
                on_batch(samples, totals)
    if seen == 0 and start is None:
        raise UserError("batches: expected at least one, got none; an iterator that was read before is empty")
    return totals.to(torch.float32)


def _batch_scores(model: nn.Module, sites: list[Site], batch: dict[str, Tensor], accepted: set[str]) -> Tensor:
    """Scores of one batch, (L, D) float64."""
    inputs = {name: value for name, value in batch.items() if name in accepted and name not in unread_labels(model)}
    samples = next(iter(batch.values())).shape[0]
    with _recording(sites, samples) as (products, roots):
        with reading(model, inputs):
            outputs = model(**inputs, return_dict=True)
        loss = sample_loss(outputs, batch, getattr(model, "config", None), is_causal(model)).sum()
        if not roots:
            raise UserError(f"model: expected its FFN layers to run in forward, got none from {type(model).__name__}")
        torch.autograd.grad(loss, roots, allow_unused=True)
    zero = torch.zeros(common_width(sites), dtype=torch.float64, device=loss.device)
    # a layer whose output cannot reach the loss has no product and matters nothing
    return torch.stack([products[n].abs().sum(0) if n in products else zero for n in range(len(sites))])


@contextmanager
def _recording(sites: list[Site], samples: int) -> Iterator[tuple[dict[int, Tensor], list[Tensor]]]:
    """Collect layer -> per-sample inner products (B, D) float64 in backward, and the tensors to differentiate by."""
    products: dict[int, Tensor] = {}
    roots: list[Tensor] = []

    def add(layer: int, width: int, grad: Tensor, value: Tensor, bias: Tensor | None = None) -> None:
        wide = torch.promote_types(value.dtype, torch.float32)  # a half-precision model's products stay exact
        value = value.to(wide) if bias is None else value.to(wide) - bias
        # (B, T, D) -> (B, D): the absolute value comes after the sum over tokens and over all rows of a neuron
        per_row = (grad.to(wide) * value).view(samples, -1, value.shape[-1]).sum(dim=1, dtype=torch.float64)
        per_sample = per_row.view(samples, -1, width).sum(dim=1)  # of a gate and its other branch in one weight
        products[layer] = products[layer] + per_sample if layer in products else per_sample

    def after_first(layer: int, width: int, bias: Tensor | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], pre: Tensor) -> None:
            if not pre.requires_grad:
                pre.requires_grad_()
                roots.append(pre)
            value = pre.detach()
            pre.register_hook(lambda grad: add(layer, width, grad, value, bias))

        return hook

    def before_second(layer: int, width: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            h = args[0]
            value = h.detach()
            h.register_hook(lambda grad: add(layer, width, grad, value))

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for layer, site in enumerate(sites):
            width = site.weights().w2.shape[1]
            for first in site.first_modules:
                stack.callback(first.register_forward_hook(after_first(layer, width, first.bias)).remove)
            stack.callback(site.second_module.register_forward_pre_hook(before_second(layer, width)).remove)
        yield products, roots


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Eval mode without weight gradients or accelerate's autocast; all is put back, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    dropped = drop_autocast(model)
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        vars(model).update(dropped)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
