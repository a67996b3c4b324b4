"""Costs against hand counts, against torch's own FLOP counter, and against the tensors that are really there."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model import (
    OPS,
    ROUTING,
    Cost,
    encoder_cost,
    experts_touched,
    op_cost,
)
from moebert_kernels import group_tokens, reference

T, H, I = 6, 5, 7
BIG = {"T": 4096, "E": 4, "H": 768, "I": 768, "dtype": "bfloat16"}


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def ffn_inputs(gated=False, add_norm=False):
    w = 2 * I if gated else I
    shapes = [(1, w, H), (1, w), (1, H, I), (1, H)] + [(1, H)] * 2 * add_norm
    return torch.randn(T, H).requires_grad_(), [torch.randn(shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize(
    "op,activation", [("fused_moe_ffn", "gelu"), ("fused_moe_ffn", "swiglu"), ("fused_moe_ffn_add_norm", "gelu")]
)
def test_flops_of_feed_forwards_are_what_torch_counts(op, activation, direction):
    gated = activation == "swiglu"
    x, parameters = ffn_inputs(gated, op == "fused_moe_ffn_add_norm")
    ids = torch.zeros(T, dtype=torch.int64)

    def run():
        y = getattr(reference, op)(x, ids, *parameters, activation=activation)
        if direction == "forward_backward":
            y.square().sum().backward()

    assert op_cost(op, direction, T=T, E=1, H=H, I=I, gated=gated).flops == counted(run)


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_flops_of_expert_gemm_are_what_torch_counts(direction):
    x, w = torch.randn(T, H).requires_grad_(), torch.randn(1, I, H).requires_grad_()
    grouping = group_tokens(torch.zeros(T, dtype=torch.int64), 1)

    def run():
        y = reference.expert_gemm(x, w, grouping)
        if direction == "forward_backward":
            y.square().sum().backward()

    assert op_cost("expert_gemm", direction, T=T, E=1, H=H, I=I).flops == counted(run)


def test_experts_touched():
    assert experts_touched(0, 4) == 0
    assert experts_touched(1, 4) == pytest.approx(1)
    assert experts_touched(2, 4) == pytest.approx(1.75)  # the second token meets a new expert in 3 of 4 cases
    assert experts_touched(1, 4, top_k=2) == pytest.approx(2)
    assert experts_touched(3, 4, top_k=4) == 4
    assert experts_touched(10**4, 4) == pytest.approx(4)


def test_expected_experts_touched_is_the_mean_of_random_routings():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 8, (20000, 5), generator=generator)
    mean = sum(len(set(row)) for row in ids.tolist()) / len(ids)
    assert experts_touched(5, 8) == pytest.approx(mean, rel=0.01)


def hand_counts():
    """(op, direction, sizes) -> bytes, one launch a line; every expert is touched or the count says otherwise."""
    up = 6 * 5 + 1 * (7 * 5 + 7) + 6 * 7  # x, w1 and b1, h
    down = 6 * 7 + 1 * (5 * 7 + 5) + 6 * 5  # h, w2 and b2, y
    one = {"T": 6, "E": 1, "H": 5, "I": 7}
    yield "fused_moe_ffn", "forward", one, 4 * (up + down)
    backward = (
        (6 * 5 + 5 * 7 + 6 * 7)  # dy, w2, h_pre
        + (6 * 7 + 6 * 7)  # dh_pre, h
        + (6 * 5 + 6 * 7 + 5 * 7 + 5)  # dy, h, dw2, db2
        + (6 * 7 + 6 * 5 + 7 * 5 + 7)  # dh_pre, x, dw1, db1
        + (6 * 7 + 7 * 5 + 6 * 5)  # dh_pre, w1, dx
    )
    yield "fused_moe_ffn", "forward_backward", one, 4 * (up + 6 * 7 + down + backward)
    norm = 6 * 5 + 6 * 5 + 2 * 5 + 6 * 5  # x, outputs, norm, y
    yield "fused_moe_ffn_add_norm", "forward", one, 4 * (up + down + norm)
    norm_backward = 6 * 5 + 6 * 5 + 6 * 5 + 5 + 6 * 5 + 2 * 5  # dy, x, outputs, weight, dz, two gradients
    yield (
        "fused_moe_ffn_add_norm", "forward_backward", one,
        4 * (up + 6 * 7 + down + norm + norm_backward + backward + 6 * 5),  # the residual's dz
    )  # fmt: skip
    summed = 12 * 5 + 6 * 5  # assignments read, y
    two = {"T": 6, "E": 2, "H": 5, "I": 7, "top_k": 2}
    yield (
        "fused_moe_ffn", "forward", two,
        4 * ((6 * 5 + 2 * 42 + 12 * 7) + (12 * 7 + 2 * 40 + 12 * 5) + summed),
    )  # fmt: skip
    yield (
        "fused_moe_ffn", "forward_backward", two,
        4 * ((6 * 5 + 2 * 42 + 12 * 7 + 12 * 7) + (12 * 7 + 2 * 40 + 12 * 5) + summed
             + (6 * 5 + 2 * 35 + 12 * 7 + 12 * 7 + 12 * 7) + (6 * 5 + 12 * 7 + 2 * 40) + (12 * 7 + 6 * 5 + 2 * 42)
             + (12 * 7 + 2 * 35 + 12 * 5) + summed),
    )  # fmt: skip
    gated_up = 6 * 5 + 14 * 5 + 14 + 6 * 7
    yield "fused_moe_ffn", "forward", one | {"gated": True}, 4 * (gated_up + down)
    gemm = 6 * 5 + 7 * 5 + 7 + 6 * 7
    yield "expert_gemm", "forward", one, 4 * gemm
    yield "expert_gemm", "forward_backward", one, 4 * (gemm + (6 * 7 + 35 + 6 * 5) + (6 * 7 + 6 * 5 + 35 + 7))
    yield "hash_route", "forward", {"T": 6, "E": 4, "V": 100}, 6 * 8 + 6 * 1 + 6 * 4
    yield "hash_route", "forward", {"T": 6, "E": 300, "V": 4, "masked": True}, 2 * 6 * 8 + 4 * 4 + 6 * 4
    yield "group_tokens", "forward", {"T": 6, "E": 4}, 6 * 4 + 2 * 6 * 4 + 5 * 4
    yield "group_tokens", "forward", {"T": 6, "E": 4, "top_k": 2}, 12 * 4 + 2 * 12 * 4 + 5 * 4
    yield "group_tokens_by_hash", "forward", {"T": 6, "E": 4, "L": 3}, 6 * 8 + 3 * (6 * 1 + 2 * 6 * 4 + 5 * 4)


@pytest.mark.parametrize("op,direction,sizes,wanted", list(hand_counts()))
def test_bytes_are_the_hand_count(op, direction, sizes, wanted):
    assert op_cost(op, direction, **sizes).bytes == pytest.approx(wanted, rel=1e-12)


def test_few_tokens_read_the_weights_of_few_experts():
    forward = op_cost("fused_moe_ffn", "forward", T=1, E=4, H=H, I=I)
    assert forward == op_cost("fused_moe_ffn", "forward", T=1, E=1, H=H, I=I)
    training = op_cost("fused_moe_ffn", "forward_backward", T=1, E=4, H=H, I=I)
    dense = op_cost("fused_moe_ffn", "forward_backward", T=1, E=1, H=H, I=I)
    assert training.bytes - dense.bytes == pytest.approx(3 * 4 * (2 * H * I + H + I))  # zeros for three experts


def test_bytes_of_half_precision_are_half():
    assert (
        2 * op_cost("fused_moe_ffn", "forward", **BIG).bytes
        == op_cost("fused_moe_ffn", "forward", **BIG | {"dtype": torch.float32}).bytes
    )


@pytest.mark.parametrize("tokens,microseconds", [(4096, 8.0), (16384, 25.6), (65536, 95.8)])
def test_memory_time_of_bert_base_on_an_h200(tokens, microseconds):
    """Counted apart from this file: x, h twice and y in bfloat16, four experts' weights, at 4.3 TB/s."""
    cost = op_cost("fused_moe_ffn", "forward", **BIG | {"T": tokens})
    assert cost.memory_ms(4300) * 1e3 == pytest.approx(microseconds, rel=0.01)


def test_roof_is_the_longer_of_both_times():
    cost = Cost(flops=2e12, bytes=3e9)
    assert cost.roof_ms(tflops=1, gbytes_per_s=1000) == 2000 and cost.bound_by(1, 1000) == "compute"
    assert cost.roof_ms(tflops=1000, gbytes_per_s=1000) == 3 and cost.bound_by(1000, 1000) == "memory"
    assert cost + cost == cost * 2


@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_flops_of_an_encoder_are_what_torch_counts(direction):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        attn_implementation="eager",
    )  # fmt: skip
    layers = BertModel(config, add_pooling_layer=False).encoder
    x = torch.randn(3, 5, 8).requires_grad_()

    def run():
        y = layers(x).last_hidden_state
        if direction == "forward_backward":
            y.square().sum().backward()

    assert encoder_cost(direction, L=2, H=8, B=3, S=5, E=1, I=12, dtype="float32").flops == counted(run)


def test_bytes_of_an_encoder_are_the_hand_count():
    size = 2
    tokens = 2 * 5 * 4  # elements of one (B, S, H)
    attention = (tokens + 3 * (16 + 4) + 3 * tokens) + (tokens + 16 + 4 + tokens)  # two projections
    attention += 4 * tokens  # q, k, v, o
    attention += 3 * tokens + 2 * 4  # residual and norm
    experts = op_cost("fused_moe_ffn_add_norm", "forward", T=7, E=2, H=4, I=3, dtype="bfloat16").bytes
    got = encoder_cost("forward", L=3, H=4, B=2, S=5, E=2, I=3, dtype="bfloat16", routed_tokens=7)
    assert got.bytes == pytest.approx(3 * (size * attention + experts))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"op": "softmax"}, "op: expected one of hash_route, .*, got softmax"),
        ({"direction": "backward"}, "direction: expected forward or forward_backward, got backward"),
        ({"op": "hash_route", "direction": "forward_backward"}, "direction: expected forward, got forward_backward"),
        ({"T": -1}, "T: expected at least 0, got -1"),
        ({"E": 0}, "E: expected at least 1, got 0"),
        ({"top_k": 5}, "top_k: expected 1 to E = 4, got 5"),
        ({"dtype": "bf16"}, "dtype: expected a torch dtype or its name, got bf16"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        op_cost(**{"op": "fused_moe_ffn", "direction": "forward", **BIG} | change)


def test_encoder_rejects():
    sizes = {"L": 6, "H": 384, "B": 2, "S": 5, "E": 1, "I": 8, "dtype": "float32"}
    with pytest.raises(ValueError, match="routed_tokens: expected 0 to B S = 10, got 11"):
        encoder_cost("forward", **sizes, routed_tokens=11)
    with pytest.raises(ValueError, match="direction"):
        encoder_cost("backward", **sizes)


def test_every_op_has_a_cost():
    import moebert_kernels

    by_sites = {"mpo_expert_weights"}  # sized by a plan of factors, not by T, H and I
    assert set(OPS) == set(moebert_kernels.__all__) - {"Grouping", "warmup"} - by_sites
    for op in OPS:
        for direction in ("forward",) if op in ROUTING else ("forward", "forward_backward"):
            assert op_cost(op, direction, **BIG).bytes > 0
            op_cost(op, direction, **BIG | {"T": 0})
