"""What the op tests share: routings, shapes over two tiles that no tile divides, and how to run an op in a dtype."""

import torch

from moebert_kernels import backend

T, H, I, E = 37, 40, 36, 4

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
HARDEST = "some_skipped"
# Every routing in float32, every dtype with the hardest routing: a fault that needs two special values of the two at
# once is left to the fuzz.
ROUTINGS_AND_DTYPES = [(routing, torch.float32) for routing in ROUTINGS] + [(HARDEST, dtype) for dtype in DTYPES[1:]]


def in_interpreter() -> bool:
    return backend.choose("fused_moe_ffn", torch.empty(0)).backend == "triton" and not torch.cuda.is_available()


def slack(dtype) -> float:
    """Over plain torch's own error; Triton's interpreter rounds bfloat16 where a GPU would not."""
    return 3.0 if dtype == torch.bfloat16 and in_interpreter() else 2.0


def widest() -> torch.dtype:
    """The most exact dtype of the backend under test."""
    return torch.float64 if backend.choose("fused_moe_ffn", torch.empty(0)).backend == "torch" else torch.float32


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


def names_of(names, inputs):
    """Of what `run` returns: y, and a gradient for each input that is there."""
    return [names[0], *(name for name, value in zip(names[1:], inputs, strict=True) if value is not None)]


def run(op, inputs, dy, dtype, **constants):
    """Values and all gradients of `op` on copies of `inputs` in `dtype`: [y, d(first input), ...]."""
    copies = [
        t.detach().to(dtype).requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in inputs
    ]
    y = op(*copies, **constants)
    wanted = [t for t in copies if isinstance(t, torch.Tensor) and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]
