"""Names of the activations every backend offers."""

# gelu is the exact (erf) form; relu2 is relu(x)^2
UNGATED = ("gelu", "gelu_tanh", "relu", "relu2", "silu", "identity")
# act(gate) * up; gate rows come first in w1
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
ACTIVATIONS = (*UNGATED, *GATED)


def is_gated(name: str) -> bool:
    return name in GATED
