"""`fused_moe_ffn` in a module of your own: a learned router, two of eight experts per token, trained."""

import torch
from torch import nn

from moebert_kernels import fused_moe_ffn

H, I, E, TOP_K, TOKENS, STEPS = 32, 64, 8, 2, 512, 150


class MoEFeedForward(nn.Module):
    """x + sum_j p_j FFN_j(x) over the TOP_K experts that the router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E, bias=False)
        self.w1, self.b1 = nn.Parameter(torch.randn(E, I, H) / H**0.5), nn.Parameter(torch.zeros(E, I))
        self.w2, self.b2 = nn.Parameter(torch.randn(E, H, I) / I**0.5), nn.Parameter(torch.zeros(E, H))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routing_weights, expert_ids = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        return x + fused_moe_ffn(
            x, expert_ids, self.w1, self.b1, self.w2, self.b2, routing_weights=routing_weights, activation="gelu"
        )


torch.manual_seed(0)
# The task is made for experts: which of eight matrices a token is multiplied with depends on its first three signs.
matrices = torch.randn(E, H, H) / H**0.5
model = MoEFeedForward()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

losses = []
for _ in range(STEPS):
    x = torch.randn(TOKENS, H)
    kind = (x[:, :3] > 0).long() @ torch.tensor([1, 2, 4])
    target = torch.einsum("tij,tj->ti", matrices[kind], x)
    loss = nn.functional.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

print(f"mean squared error {losses[0]:.3f} before, {losses[-1]:.3f} after {STEPS} steps of {TOKENS} tokens")
