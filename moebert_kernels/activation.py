"""Names of the activations every backend offers."""

UNGATED = ("gelu", "gelu_tanh", "relu", "silu", "identity")  # gelu is the exact (erf) form
GATED = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}  # act(gate) * up; gate rows come first in w1
ACTIVATIONS = (*UNGATED, *GATED)


def is_gated(name: str) -> bool:
    return name in GATED
