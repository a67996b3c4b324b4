"""Small shared-core experts for several tests, and a count of folds."""

from unittest import mock

from moebert_kernels.nn import MPOExperts, mpo_weight
from moebert_kernels.nn.context import Call, Groupings, Tokens, entered

H, I, E = 12, 24, 4
FACTORS = {"w1_factors": ([2, 3, 4], [2, 3, 2]), "w2_factors": ([2, 3, 2], [2, 3, 4])}


def small_experts(**options) -> MPOExperts:
    gated = options.get("activation", "relu") in ("swiglu", "geglu", "reglu", "geglu_tanh")
    factors = FACTORS | ({"w1_factors": ([4, 3, 4], [2, 3, 2])} if gated else {})
    experts = MPOExperts(H, I, E, **(factors | options))
    experts.reset_parameters(std=0.3)
    return experts


def counted_folds():
    """A context that gives a mock of the fold; `call_count` is twice the number of folds, one for each weight."""
    return mock.patch.object(mpo_weight, "mpo_expert_weights", wraps=mpo_weight.mpo_expert_weights)


def routed(layer, x, token_ids=None, token_mask=None):
    """y, and the balance loss or None, of a `MoEFeedForward` in a call with these tokens."""
    losses = []
    with entered(Call(Tokens(Groupings(), token_ids, token_mask), losses)):
        y = layer(x)
    return y, losses[0] if losses else None
