"""Every op in plain torch, naive and in the papers' notation. It defines what is right.

Works in any floating dtype including float64, differentiates through autograd, and computes each expert for every
token: nothing is grouped, nothing is skipped early. Routing is expert ids
here, and a `Grouping` only where an op is about its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moebert_kernels import dropout
from moebert_kernels.activation import GATED, is_gated
from moebert_kernels.grouping import Grouping


def hash_route(token_ids: Tensor, table: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Expert of each token: table[token_id], or -1 where masked or outside the table (MoEBERT, section 3.2)."""
    token_ids, table = token_ids.long(), table.long()
    inside = (token_ids >= 0) & (token_ids < table.shape[0])
    if attention_mask is not None:
        inside = inside & (attention_mask != 0)
    expert_ids = torch.full_like(token_ids, -1)
    expert_ids[inside] = table[token_ids[inside]]
    return torch.where(expert_ids == expert_ids.int(), expert_ids, -1).int()


def group_tokens(expert_ids: Tensor, num_experts: int) -> Grouping:
    """Sort the assignments by expert, one expert after the other, in token order; the skipped ones come last."""
    top_k = 1 if expert_ids.ndim == 1 else expert_ids.shape[1]
    flat = expert_ids.reshape(-1).long()
    rows = [torch.nonzero(flat == e)[:, 0] for e in range(num_experts)]
    counts = [len(group) for group in rows]
    rows.append(torch.nonzero((flat < 0) | (flat >= num_experts))[:, 0])
    row_to_assignment = torch.cat(rows)
    assignment_to_row = torch.empty_like(row_to_assignment)
    assignment_to_row[row_to_assignment] = torch.arange(len(flat), device=flat.device)
    offsets = torch.tensor([0, *counts], device=flat.device).cumsum(0)
    return Grouping(offsets.int(), row_to_assignment.int(), assignment_to_row.int(), top_k)


def group_tokens_by_hash(
    token_ids: Tensor, tables: Tensor, num_experts: int, attention_mask: Tensor | None = None
) -> list[Grouping]:
    """`group_tokens` of `hash_route`, for each layer's table."""
    return [group_tokens(hash_route(token_ids, table, attention_mask).reshape(-1), num_experts) for table in tables]


def expert_gemm(
    x: Tensor, w: Tensor, grouping: Grouping, bias: Tensor | None = None, *, gather: bool = False
) -> Tensor:
    """y[r] = w[e] @ x[r] + bias[e] for the rows r of expert e; zero past the routed rows."""
    if gather:
        x = x[grouping.row_to_assignment.long() // grouping.top_k]
    row = torch.arange(x.shape[0], device=x.device)
    y = x.new_zeros(x.shape[0], w.shape[1])
    for e in range(w.shape[0]):
        of_expert = (row >= grouping.offsets[e]) & (row < grouping.offsets[e + 1])
        y = torch.where(of_expert[:, None], F.linear(x, w[e], None if bias is None else bias[e]), y)
    return y


def activate(h_pre: Tensor, activation: str) -> Tensor:
    """The activation on the pre-activation; gated ones take (..., 2I), gate first, and return (..., I)."""
    if is_gated(activation):
        gate, up = h_pre.chunk(2, dim=-1)
        return activate(gate, GATED[activation]) * up
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "gelu": F.gelu,
        "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda h: F.relu(h).square(),
        "silu": F.silu,
        "identity": lambda h: h,
    }
    return functions[activation](h_pre)


def _drop(x: Tensor, seed: Tensor | None, rows: Tensor, p: float, stream: int) -> Tensor:
    if p == 0 or seed is None:
        return x
    keep = dropout.keep_mask(seed, rows, x.shape[-1], p, stream)
    return torch.where(keep, x * dropout.scale(p), torch.zeros_like(x))


def fused_moe_ffn(
    x: Tensor, expert_ids: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *,
    routing_weights: Tensor | None = None, activation: str = "gelu",
    hidden_dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y[t] = sum_j p[t, j] * (w2[e] dropout(act(w1[e] x[t] + b1[e])) + b2[e]) with e = expert_ids[t, j].

    Shapes: x (T, H), expert_ids (T,) or (T, top_k), w1 (E, I, H) or (E, 2I, H) if gated, w2 (E, H, I).
    """
    top_k = 1 if expert_ids.ndim == 1 else expert_ids.shape[1]
    ids = expert_ids.reshape(-1, top_k).long()
    weights = None if routing_weights is None else routing_weights.reshape(-1, top_k)
    y = torch.zeros_like(x)
    for j in range(top_k):
        assignments = torch.arange(x.shape[0], device=x.device) * top_k + j
        for e in range(w1.shape[0]):
            h = activate(F.linear(x, w1[e], None if b1 is None else b1[e]), activation)
            h = _drop(h, dropout_seed, assignments, hidden_dropout_p, dropout.HIDDEN_STREAM)
            out = F.linear(h, w2[e], None if b2 is None else b2[e])
            if weights is not None:
                out = out * weights[:, j, None]
            y = y + torch.where((ids[:, j] == e)[:, None], out, torch.zeros_like(out))
    return y


def fused_moe_ffn_add_norm(
    x: Tensor, expert_ids: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None,
    norm_weight: Tensor, norm_bias: Tensor, *,
    routing_weights: Tensor | None = None, eps: float = 1e-12, activation: str = "gelu",
    dropout_p: float = 0.0, hidden_dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The MoEBERT expert: y[t] = p[t] * LayerNorm_e(x[t] + dropout(FFN_e(x[t]))); y[t] = x[t] where no expert is."""
    ids = expert_ids.reshape(-1).long()
    tokens = torch.arange(x.shape[0], device=x.device)
    everyone = torch.zeros_like(ids)
    y = x
    for e in range(w1.shape[0]):
        own = slice(e, e + 1)
        ffn = fused_moe_ffn(
            x, everyone, w1[own], None if b1 is None else b1[own], w2[own], None if b2 is None else b2[own],
            activation=activation, hidden_dropout_p=hidden_dropout_p, dropout_seed=dropout_seed,
        )  # fmt: skip
        ffn = _drop(ffn, dropout_seed, tokens, dropout_p, dropout.OUTPUT_STREAM)
        out = F.layer_norm(x + ffn, x.shape[-1:], norm_weight[e], norm_bias[e], eps)
        if routing_weights is not None:
            out = out * routing_weights.reshape(-1, 1)
        y = torch.where((ids == e)[:, None], out, y)
    return y


def add_norm_in_order(
    residual: Tensor, added: Tensor, norm_weight: Tensor, norm_bias: Tensor, grouping: Grouping, *,
    eps: float = 1e-12, dropout_p: float = 0.0, dropout_seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x[r] = LayerNorm(residual[t] + dropout(added[t])) with t = row_to_assignment[r]; all (T, H)."""
    tokens = torch.arange(residual.shape[0], device=residual.device)
    z = residual + _drop(added, dropout_seed, tokens, dropout_p, dropout.OUTPUT_STREAM)
    return F.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, eps)[grouping.row_to_assignment.long()]


def mpo_expert_weights(
    central: Tensor, aux: Sequence[Tensor], *, offsets: Tensor | None = None, central_site: int | None = None
) -> Tensor:
    """W_e[i_1..i_n, j_1..j_n] = A_e1[i_1, j_1] ... C[i_c, j_c] ... A_en[i_n, j_n], products of matrices.

    MPOE (2203.01104). Shapes: central (D_c, i_c, j_c, D_c+1), aux[k] (E, D_k, i_k, j_k, D_k+1) ->
    (E, prod i, prod j); with `offsets` (E + 1,), zeros for experts without rows.
    """
    c = len(aux) // 2 if central_site is None else central_site
    sites = [*aux[:c], central.expand(aux[0].shape[0], *central.shape), *aux[c:]]
    w = sites[0][:, 0]
    for site in sites[1:]:  # (E, I, J, D) and (E, D, i, j, D') -> (E, Ii, Jj, D')
        w = torch.einsum("eIJd,edijf->eIiJjf", w, site).flatten(1, 2).flatten(2, 3)
    w = w[..., 0]
    if offsets is not None:
        w = torch.where((offsets[1:] > offsets[:-1])[:, None, None], w, torch.zeros_like(w))
    return w
