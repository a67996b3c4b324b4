"""The ops inside a model of your own: a layer of four experts, its gradients, a grouping made once for two layers."""

import torch

from moebert_kernels import fused_moe_ffn, group_tokens_by_hash
from moebert_kernels.backend import explain

B, S, H, I, E, V = 2, 16, 64, 32, 4, 1000
torch.manual_seed(0)
token_ids = torch.randint(0, V, (B, S))
attention_mask = torch.ones(B, S, dtype=torch.long)
attention_mask[1, 10:] = 0  # padding: it is skipped, and its output is zero

x = torch.randn(B, S, H, requires_grad=True)
w1, b1 = torch.randn(E, I, H) / H**0.5, torch.zeros(E, I)
w2, b2 = torch.randn(E, H, I) / I**0.5, torch.zeros(E, H)

# Hash routing depends on the token ids alone, so the groupings of all layers are made before the first one runs.
tables = torch.randint(0, E, (2, V))  # one per layer
first, second = group_tokens_by_hash(token_ids, tables, E, attention_mask)
y = x + fused_moe_ffn(x, first, w1, b1, w2, b2)
y = y + fused_moe_ffn(y, second, w1, b1, w2, b2)
y.square().mean().backward()

# Or with expert ids and weights from a learned gate, two experts per token.
gate = torch.softmax(torch.randn(B, S, E), dim=-1)
routing_weights, expert_ids = gate.topk(2, dim=-1)
mixed = fused_moe_ffn(x, expert_ids, w1, b1, w2, b2, routing_weights=routing_weights, activation="silu")

print("output", tuple(y.shape), "gradient", f"{x.grad.norm():.4f}", "top-2 output", tuple(mixed.shape))
for choice in explain():
    print(f"{choice.op}: {choice.backend} ({choice.reason})")
