"""What we compare with, in our own words: dense layers, and how the original MoEBERT code computes.

Source of the latter: SimiaoZuo/MoEBERT at cd21f57, described here by what it does, not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BertModel

ExpertFunction = Callable[[Tensor, Tensor], Tensor]  # x (T, H), expert ids (T,) -> y (T, H)


def dense_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The dense feed-forward layer: w1 (D, H), w2 (H, D)."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def dense_ffn_add_norm(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    """The dense layer with BERT's residual and LayerNorm."""
    return F.layer_norm(x + dense_ffn(x, w1, b1, w2, b2), x.shape[-1:], norm_weight, norm_bias, 1e-12)


def loop_of_linear(x: Tensor, expert_ids: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Sort by expert, call the dense layer of each expert that has rows, put the rows back: what most people write."""
    row_to_assignment = torch.argsort(expert_ids, stable=True)
    counts = torch.bincount(expert_ids, minlength=w1.shape[0]).tolist()
    return loop_over_experts(x, row_to_assignment, counts, w1, b1, w2, b2)


def loop_over_experts(x: Tensor, row_to_assignment: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
    """The loop alone: token of each sorted row, rows of each expert, w1 (E, I, H), b1, w2, b2 -> (T, H)."""
    rows = x[row_to_assignment].split(counts)
    experts = zip(*(w.unbind() for w in weights), strict=True)
    outputs = [dense_ffn(r, *of_expert) for r, of_expert in zip(rows, experts, strict=True) if len(r)]
    return torch.empty_like(x).index_copy_(0, row_to_assignment, torch.cat(outputs))


class OriginalExpert(nn.Module):
    """One expert of the original code: its residual and its LayerNorm are inside."""

    def __init__(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> None:
        super().__init__()
        intermediate_size, hidden_size = w1.shape
        self.fc1 = nn.utils.skip_init(nn.Linear, hidden_size, intermediate_size)
        self.fc2 = nn.utils.skip_init(nn.Linear, intermediate_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(0.1)
        for module, weight, bias in ((self.fc1, w1, b1), (self.fc2, w2, b2), (self.norm, norm_weight, norm_bias)):
            module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class OriginalExperts(nn.Module):
    """The original's layer: sort by expert, split on the host, one expert after the other, stack, sort back.

    Args:
        weights: w1 (E, I, H), b1 (E, I), w2 (E, H, I), b2, norm_weight, norm_bias (E, H); shared, not copied.
    """

    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.experts = nn.ModuleList(OriginalExpert(*of_expert) for of_expert in zip(*weights, strict=True))

    def forward(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """x (T, H), expert_ids (T,) int64 -> (T, H). Experts without tokens run too, on nothing."""
        order = expert_ids.argsort()
        counts = F.one_hot(expert_ids, len(self.experts)).gt(0).sum(0)
        parts = x[order].split(counts.tolist())  # waits for the device
        y = torch.vstack([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        return y[order.argsort()]


class ExpertsOfBert(nn.Module):
    """Stands where transformers' BERT has its output layer, and computes a whole feed-forward layer from token ids."""

    def __init__(self, route: Callable[[], Tensor], experts: ExpertFunction) -> None:
        super().__init__()
        self.route = route
        self.experts = experts

    def forward(self, intermediate: Tensor, x: Tensor) -> Tensor:
        return self.experts(x.flatten(0, -2), self.route()).view_as(x)


def bert_with_experts(
    config: object,
    attention_state: Mapping[str, Tensor],
    make_layer: Callable[[int], tuple[Tensor, ExpertFunction]],
    route: Callable[[Tensor, Tensor], Tensor],
) -> tuple[BertModel, Callable[[Tensor], None]]:
    """Transformers' BertModel with experts in place of every feed-forward layer.

    Args:
        config: of the dense model.
        attention_state: weights of all that is not a feed-forward layer, by BertModel's names.
        make_layer: layer number -> its hash table (V,) and its experts.
        route: token ids (T,) and a table -> expert ids (T,); called in every layer, as the original does.

    Returns:
        The model, and a function that tells it the token ids (B, T) of the batch to come.
    """
    from transformers import BertModel  # seconds, which suites of ops need not wait for

    model = BertModel(config)
    token_ids: list[Tensor] = []

    def set_token_ids(ids: Tensor) -> None:
        token_ids[:] = [ids.flatten()]

    for number, layer in enumerate(model.encoder.layer):
        table, experts = make_layer(number)
        layer.intermediate = nn.Identity()
        layer.output = ExpertsOfBert(lambda table=table: route(token_ids[0], table), experts)
    missing = model.load_state_dict(attention_state, strict=False).missing_keys
    if left := [key for key in missing if ".output.experts." not in key]:
        raise ValueError(f"attention_state: expected every weight outside the experts, got none for {left[0]}")
    return model.eval(), set_token_ids


def original_importance(w1s: list[Tensor], w2s: list[Tensor], losses: Tensor) -> Tensor:
    """Importance (L, D) of one batch as the original computes it: 2 L B backward passes over the whole batch's graph.

    Args:
        w1s, w2s: (D, H) and (H, D) of each layer.
        losses: (B,) loss of each sample, with the graph that leads to the weights.
    """
    scores = torch.zeros(len(w1s), w1s[0].shape[0], device=losses.device)
    for loss in losses:
        for layer, (w1, w2) in enumerate(zip(w1s, w2s, strict=True)):
            (dw1,) = torch.autograd.grad(loss, w1, retain_graph=True)
            (dw2,) = torch.autograd.grad(loss, w2, retain_graph=True)
            scores[layer] += ((w1 * dw1).sum(1) + (w2 * dw2).sum(0)).abs().detach()
    return scores


def importance_by_definition(w1s: list[Tensor], w2s: list[Tensor], sample_losses: Iterable[Tensor]) -> Tensor:
    """The same scores by MoEBERT (2204.07675), eq. 4: a forward and a backward pass for each sample.

    Args:
        w1s, w2s: (D, H) and (H, D) of each layer.
        sample_losses: scalar losses, each from a forward pass of one sample alone.
    """
    scores = torch.zeros(len(w1s), w1s[0].shape[0], dtype=w1s[0].dtype, device=w1s[0].device)
    for loss in sample_losses:
        grads = torch.autograd.grad(loss, [*w1s, *w2s])
        for layer, (w1, w2) in enumerate(zip(w1s, w2s, strict=True)):
            dw1, dw2 = grads[layer], grads[len(w1s) + layer]
            scores[layer] += ((w1 * dw1).sum(1) + (w2 * dw2).sum(0)).abs().detach()
    return scores


def randomise_constants(model: nn.Module) -> None:
    """Noise on new biases and norms, in place: zeros and ones would hide a mistake in them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
