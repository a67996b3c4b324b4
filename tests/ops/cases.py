"""Inputs that the op tests share: routings, shapes that no tile divides, and how to run an op in a dtype."""

import torch

T, H, I, E = 37, 24, 20, 4

ROUTINGS = {
    "even": lambda: torch.arange(T) % E,
    "skewed": lambda: torch.where(torch.rand(T) < 0.8, 0, torch.randint(0, E, (T,))),
    "one_expert_empty": lambda: torch.randint(0, E - 1, (T,)),
    "all_to_one": lambda: torch.full((T,), 2),
    "single_token": lambda: torch.tensor([1]),
    "no_tokens": lambda: torch.empty(0, dtype=torch.int64),
    "some_skipped": lambda: torch.randint(-2, E + 2, (T,)),
    "all_skipped": lambda: torch.full((T,), -1),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def parameters(dtype, gated=False, bias=True, norm=False):
    """w1, b1, w2, b2 (and norm_weight, norm_bias) of O(1) outputs."""
    rows = 2 * I if gated else I
    made = [
        torch.randn(E, rows, H) / H**0.5,
        torch.randn(E, rows) if bias else None,
        torch.randn(E, H, I) / I**0.5,
        torch.randn(E, H) if bias else None,
    ]
    if norm:
        made += [1 + 0.1 * torch.randn(E, H), 0.1 * torch.randn(E, H)]
    return [None if t is None else t.to(dtype) for t in made]


def run(op, inputs, dy, dtype, **constants):
    """Values and all gradients of `op` on copies of `inputs` in `dtype`: [y, d(first input), ...]."""
    copies = [
        t.detach().to(dtype).requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in inputs
    ]
    y = op(*copies, **constants)
    wanted = [t for t in copies if isinstance(t, torch.Tensor) and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]
