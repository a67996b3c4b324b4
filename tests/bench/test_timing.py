"""Two models in turns: what is timed is what they compute, and they are left as they were."""

import pytest
import torch
from transformers import BertConfig, BertModel

from moebert_kernels.bench import timing
from moebert_kernels.bench.benchmark import sizes_of
from moebert_kernels.bench.clocks import WallTimer, quartiles
from moebert_kernels.bench.timing import (
    WARM_UP,
    compare_models,
    decoder_inputs,
    feed_forwards,
    interleaved,
    random_inputs,
)
from moebert_kernels.convert import convert_to_moe, parameter_counts
from moebert_kernels.layers import MoEConfig, moe_layers, routing
from tests.convert.families import IMAGES, ONE_OF_EACH_SHAPE, TWO_STACKS, make, make_inputs

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.5,
}  # fmt: skip


def dense():
    torch.manual_seed(0)
    return BertModel(BertConfig(intermediate_size=32, **SIZES), add_pooling_layer=False)


def moe(router="hash-random"):
    return convert_to_moe(dense(), MoEConfig.moebert(router=router, expert_size=8), importance=torch.rand(2, 32))


def batch_of(B=3, T=8):
    ids, mask = random_inputs(60, B, T)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def in_place():
    return convert_to_moe(dense(), MoEConfig.mpoe(num_experts=3, router="hash-random"), noise=1.0)


@pytest.mark.parametrize(
    "build", [dense, moe, lambda: moe("gate-token"), in_place], ids=["dense", "hash", "gate", "mpo"]
)
@torch.inference_mode()
def test_feed_forwards_compute_what_the_model_computes(build):
    model, batch = build().eval(), batch_of()
    wanted = model(**batch).last_hidden_state
    got = feed_forwards(model, batch)()
    torch.testing.assert_close(got.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("family", [family for family in ONE_OF_EACH_SHAPE if family not in IMAGES])
def test_feed_forwards_of_any_family(family):
    """All of them, those of a decoder too, dense or converted in place."""
    batch = make_inputs(family)
    mask = batch["attention_mask"]
    model = convert_to_moe(make(family), MoEConfig.switch(num_experts=2))
    result = compare_models({"moe": model, "dense": make(family)}, batch["input_ids"], mask, rounds=1)
    assert all(entry["ffn_ms"]["median"] > 0 for entry in result.values())
    seen = []
    run = feed_forwards(model, batch | decoder_inputs(model, batch))
    for layer in moe_layers(model):
        layer.experts.register_forward_hook(lambda module, *_: seen.append(module))
    run()
    assert seen == [layer.experts for layer in moe_layers(model)] and len(seen) == (4 if family in TWO_STACKS else 2)


def test_feed_forwards_run_every_layer(monkeypatch):
    model = moe("gate-token").eval()
    run = feed_forwards(model, batch_of())
    seen = []
    for layer in moe_layers(model):
        for part in (layer.router, layer.experts):
            part.register_forward_hook(lambda module, *_: seen.append(module))
    run()
    assert seen == [part for layer in moe_layers(model) for part in (layer.router, layer.experts)]


def test_hash_routing_groups_in_the_time(monkeypatch):
    model, groups = moe().eval(), []
    run = feed_forwards(model, batch_of())
    grouped = routing.group_by_hash
    monkeypatch.setattr(routing, "group_by_hash", lambda *args: groups.append(args[1].shape) or grouped(*args))
    run()
    assert groups == [(3, 8)]


def test_models_are_left_as_they_were():
    models = {"a": moe().train(), "b": dense().eval()}
    batch = batch_of()
    result = compare_models(models, batch["input_ids"], batch["attention_mask"], rounds=3)
    assert models["a"].training and not models["b"].training
    assert not any(part._forward_pre_hooks for model in models.values() for part in model.modules())
    for entry in result.values():
        assert entry["ffn_ms"]["median"] > 0
        assert entry["tokens_per_s"] == pytest.approx(1e3 * 21 / entry["model_ms"]["median"])
        assert entry["peak_mib"] is None and entry["how"] is None


def test_ratios_are_of_the_same_round(monkeypatch):
    """A machine that is twice as slow in every other round changes no ratio."""
    rounds = iter(range(10**6))

    class Clock:
        how = None

        def __init__(self, run, device):
            self.ms = 10.0 * (1 + len(made))
            made.append(self)

        def warm_ms(self):
            return [self.ms * (1 + next(rounds) // len(made) % 2)]

    made: list[Clock] = []
    monkeypatch.setattr(timing, "timer", Clock)
    batch = batch_of()
    result = compare_models({"a": dense(), "b": dense()}, batch["input_ids"], batch["attention_mask"], rounds=4)
    assert result["a"]["model_speed"] == {"q1": 3.0, "median": 3.0, "q3": 3.0}  # clocks 10, 20; 30, 40
    assert result["a"]["ffn_speed"] == {"q1": 2.0, "median": 2.0, "q3": 2.0}
    assert result["b"]["ffn_speed"]["median"] == 1 and result["a"]["model_ms"] == {"q1": 10, "median": 15, "q3": 20}


def test_calls_take_turns():
    calls = []
    runs = {name: WallTimer(lambda name=name: calls.append(name)).warm_ms for name in "ab"}
    times, rounds = interleaved(runs, 3), WARM_UP + 3
    assert all(sorted(calls[n : n + 2]) == ["a", "b"] for n in range(0, 2 * rounds, 2)) and len(set(calls[::2])) == 2
    assert len(calls) == 2 * rounds and [len(ms) for ms in times.values()] == [3, 3]


def test_quartiles():
    assert quartiles([3.0]) == {"q1": 3.0, "median": 3.0, "q3": 3.0}
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0}


def test_sizes():
    dense_counts, moe_counts = parameter_counts(dense()), parameter_counts(moe())
    assert dense_counts["active_parameters"] == dense_counts["total_parameters"]
    expert = 2 * 16 * 8 + 8 + 3 * 16  # w1, w2, b1, b2 and the norm
    assert moe_counts["total_parameters"] - moe_counts["active_parameters"] == 2 * 3 * expert
    bytes_ = 4 * dense_counts["total_parameters"]
    assert sizes_of(dense())["weights_mib"] * 2**20 >= bytes_
