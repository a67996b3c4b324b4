"""The suites of whole models refuse a model with a defect, and their numbers are about what they say."""

import dataclasses
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from benchmarks import bench_distill, bench_encoder, bench_importance, bench_loading, real_text
from benchmarks.gate import check
from benchmarks.measuring import Target
from benchmarks.results import run_case
from moebert_kernels.convert import importance as importance_module
from moebert_kernels.convert import state as conversion
from moebert_kernels.layers import MoEFeedForward, moe_layers
from moebert_kernels.torch_backend import fused_moe_ffn_add_norm as layer_backend

SMOKE = Target.of("cpu", smoke=True)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> None:
    """Not here: the gate must find unwritten memory by itself."""


def refused_for_values(case):
    """The providers whose values the gate found wrong or missing, and none for another reason."""
    refused = check(case.build()).refused
    for name, reason in refused.items():
        assert "expected an error of at most" in reason or "never written" in reason, (name, reason)
    return set(refused)


def sign_flipped(y):
    return -y


def one_row_unwritten(y):
    written = torch.empty_like(y)
    written.view(-1, y.shape[-1])[1:] = y.view(-1, y.shape[-1])[1:]
    return written


def two_rows_swapped(y):
    rows = y.view(-1, y.shape[-1]).clone()
    rows[[0, 1]] = rows[[1, 0]]
    return rows.view(y.shape)


@pytest.mark.parametrize("sabotage", [sign_flipped, one_row_unwritten, two_rows_swapped])
def test_encoder_with_a_defect_is_refused(sabotage, monkeypatch):
    sound = MoEFeedForward.forward
    monkeypatch.setattr(MoEFeedForward, "forward", lambda *args: sabotage(sound(*args)))
    for case in bench_encoder.cases(SMOKE)[:-1]:  # the last one's order of the experts is refused before
        ours = {"moebert_kernels", "padding_routed"} & set(case.providers)
        assert refused_for_values(case) == ours


def test_encoder_that_routes_padding_is_no_encoder_that_skips_it(monkeypatch):
    monkeypatch.setattr(bench_encoder.encoders, "moe_model", with_padding_routed(bench_encoder.encoders.moe_model))
    padded = next(case for case in bench_encoder.cases(SMOKE) if "padding_routed" in case.providers)
    assert refused_for_values(padded) == {"moebert_kernels"}


def with_padding_routed(make):
    def made(*args):
        model = make(*args)
        model.config.quantization_config.route_padding = True
        return model

    return made


@pytest.mark.slow
def test_every_case_may_compile_as_many_shapes_as_the_compiler_allows(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=1):  # 8 unpatched; each shape costs seconds
        for T in (8, 16):
            made = bench_encoder._build(SMOKE, "smoke", [[T]], ("moebert_kernels_compiled",))
            assert check(made).refused == {}


@pytest.mark.parametrize("output", [0, 1, 3, 5])
def test_student_with_a_wrong_gradient_is_refused(output, monkeypatch):
    sound = layer_backend.backward

    def sabotaged(*args):
        grads = sound(*args)
        grads[output] = 1.01 * grads[output]
        return grads

    monkeypatch.setattr(layer_backend, "backward", sabotaged)
    for case in bench_distill.cases(SMOKE):
        assert refused_for_values(case) == {"moebert_kernels"}


def test_student_trains_with_dropout_after_its_gate():
    case = bench_distill.cases(SMOKE)[0]
    providers = case.build()
    checked = check(providers)
    for name, provider in checked.passed.items():
        losses = [provider.run() for _ in range(3)]
        assert all(len(terms) == 3 and all(torch.isfinite(term) for term in terms) for terms in losses), name
        assert losses[0] != losses[1]
        assert provider.facts["saved_mib"] > 0
    assert checked.passed["moebert_kernels"].facts["saved_mib"] < checked.passed["dense"].facts["saved_mib"]


def test_result_says_tokens_per_second_and_memory():
    case = bench_distill.cases(SMOKE)[0]
    roof = {"tflops": 0.1, "gbytes_per_s": 10.0}
    entries = run_case(case, SMOKE, roof, seconds=0.0, min_rounds=1, judge=False)["providers"]
    for entry in entries.values():
        assert entry["tokens_per_s"] == pytest.approx(1e3 * case.parameters["tokens"] / entry["median_ms"], rel=1e-3)
        assert entry["saved_mib"] > 0
    work = {name: entry["tflops"] * entry["median_ms"] for name, entry in entries.items()}
    assert work["dense"] > 1.1 * work["ideal"] and work["moebert_kernels"] == pytest.approx(work["ideal"], rel=0.01)
    dense = bench_distill.encoders.dense_cost(SMOKE, "smoke", [[16] * 2]).flops
    assert work["dense"] == pytest.approx(4 * dense / 1e9, rel=0.01)  # a backward is two forwards, the teacher's one


def test_memory_for_backward_is_counted_once_and_without_parameters():
    class Step:
        student = torch.nn.Linear(256, 512, bias=False)

        def terms(self):
            x = torch.zeros(1024, 256)
            h = self.student(x)  # keeps x: 1 MiB, and its weight
            return {"loss": (h.sigmoid() * self.student(x)).sum()}  # sigmoid's output, both factors: 2 of 2 MiB

    assert bench_distill.saved_mib(Step()) == 1 + 2 + 2


def test_conversion_that_mixes_neurons_up_is_refused(monkeypatch):
    sound = conversion.expert_indices
    monkeypatch.setattr(conversion, "expert_indices", lambda *args: sound(*args).flip(1))
    convert, load = bench_loading.cases(SMOKE)
    assert refused_for_values(convert) == {"moebert_kernels"}
    assert check(load.build()).refused == {}


def test_checkpoint_that_lost_a_change_is_refused(monkeypatch):
    sound = bench_loading.BertModel.save_pretrained

    def sabotaged(self, *args):
        sound(self, *args)
        with torch.no_grad():
            for layer in moe_layers(self):
                layer.experts.b2 += 1.0

    monkeypatch.setattr(bench_loading.BertModel, "save_pretrained", sabotaged)
    assert refused_for_values(bench_loading.cases(SMOKE)[1]) == {"moebert_kernels"}


def test_importance_of_the_batch_instead_of_samples_is_refused(monkeypatch):
    sound = importance_module._recording

    @contextmanager
    def sabotaged(*arguments):
        with sound(*arguments) as (products, roots):
            yield products, roots
        for layer, product in products.items():
            products[layer] = product.sum(0, keepdim=True)

    monkeypatch.setattr(importance_module, "_recording", sabotaged)
    assert refused_for_values(bench_importance.cases(SMOKE)[0]) == {"moebert_kernels"}


def test_batches_have_the_lengths_of_texts():
    full, padded, by_length, _ = bench_encoder.cases(SMOKE)
    assert full.parameters["tokens"] == full.parameters["B"] * full.parameters["T"]
    assert padded.parameters["tokens"] == sum(real_text.typical_batch("mnli", padded.parameters["B"]))
    texts = real_text.lengths("mnli", by_length.parameters["B"] * by_length.parameters["batches"])
    assert by_length.parameters["tokens"] == sum(texts)
    assert by_length.parameters["T"] == max(texts)


def test_bfloat16_is_measured_against_bfloat16():
    target = dataclasses.replace(SMOKE, dtype=torch.bfloat16)
    for module in (bench_encoder, bench_distill, bench_loading):
        for case in module.cases(target):
            assert case.parameters["dtype"] == "bfloat16"
            assert check(case.build()).refused == {}
