"""MPOE models in the loop: the balance term, the gradient mask, folding once per step."""

import pytest
import torch

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.distill import FitConfig, fit
from moebert_kernels.distill.features import Batches
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from moebert_kernels.nn import GradientMask, MPOWeight
from tests.distill.test_language import Windows
from tests.distill.tiny import Interrupting, assert_same_weights, log, weights
from tests.distill.tiny_text import story, tiny_gpt2, tiny_mpoe, tiny_t5


def train(folder, model, probability=0.0, batches=None, **settings):
    mask = GradientMask(model, probability, seed=5) if probability else None
    config = FitConfig(**{"epochs": 3, "learning_rate": 1e-2, "log_steps": 1, "adam_eps": 1e-5, **settings})
    return fit(model, batches or Batches(story(), 4), config=config, output_dir=folder, gradient_mask=mask)


@pytest.mark.parametrize("experts", ["mpo", "copy"])
def test_the_balance_loss_is_a_term_of_the_loss(tmp_path, experts):
    train(tmp_path, tiny_mpoe(load_balance=0.5, experts=experts), epochs=1)
    for line in log(tmp_path, "balance"):
        assert line["balance"] > 0.5  # of each layer at least 1 where experts get as much as they are wanted
        assert line["loss"] == pytest.approx(line["task"] + 0.5 * line["balance"], rel=1e-5)


@pytest.mark.parametrize("router", ["switch", "top2"])
def test_accumulation_keeps_the_balance_loss_of_the_large_batch(tmp_path, router):
    """In micro-batches that differ in sequences, tokens and labels."""
    features, ends = story(8, 3), []
    for labels in features.token_targets["labels"][::3]:
        labels[:4] = -100
    for name, sizes, accumulation in (("large", [len(features)], 1), ("small", [1, 4, 2, len(features) - 7], 4)):
        model = tiny_mpoe(router=router, load_balance=0.5)
        train(tmp_path / name, model, batches=Windows(features, sizes), accumulation=accumulation, learning_rate=1e-3)
        ends.append((model, log(tmp_path / name, "balance")))
    assert_same_weights(ends[0][0], weights(ends[1][0]), tolerance=1e-6)
    for large, small in zip(ends[0][1], ends[1][1], strict=True):
        assert large == pytest.approx(small, rel=1e-5)


def test_text_to_text_has_a_balance_term_too(tmp_path):
    from moebert_kernels.data.tasks import get_task
    from moebert_kernels.distill.text_to_text import text_to_text_features
    from tests.distill.test_text_to_text import rows
    from tests.distill.tiny_text import word_tokenizer

    model = convert_to_moe(tiny_t5(), MoEConfig.mpoe(num_experts=2, load_balance=0.5), num_sites=3)
    features = text_to_text_features(rows(8), get_task("rte"), word_tokenizer())
    train(tmp_path, model, batches=Batches(features, 4), epochs=1)
    for line in log(tmp_path, "balance"):
        assert line["loss"] == pytest.approx(line["task"] + 0.5 * line["balance"], rel=1e-5)


def central(model):
    return {name for name, _ in model.named_parameters() if name.endswith(".central")}


def test_masked_steps_leave_the_central_tensors_as_they_are(tmp_path):
    model = tiny_mpoe()
    before = weights(model)
    train(tmp_path, model, 1.0, weight_decay=0.1)
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert len(central(model)) == 4 and not moved & central(model)
    assert {name for name in before if ".experts.w" in name} - central(model) <= moved

    masked, free = tiny_mpoe(), tiny_mpoe()
    train(tmp_path / "masked", masked, 0.5)
    train(tmp_path / "free", free)
    assert any(not torch.equal(weights(masked)[name], weights(free)[name]) for name in central(free))


@pytest.mark.parametrize("shared_fold", [False, True])
@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_accumulation_equals_the_large_batch(tmp_path, probability, shared_fold):
    ends = []
    for name, size, accumulation in (("large", 8, 1), ("small", 2, 4)):
        model = tiny_mpoe()
        batches = Batches(story(), size, bucket=False)
        train(tmp_path / name, model, probability, batches, accumulation=accumulation,
              shared_fold=shared_fold and accumulation > 1)  # fmt: skip
        ends.append(model)
    assert_same_weights(ends[0], weights(ends[1]), tolerance=2e-5)


def test_a_step_folds_once_with_a_balance_term_too(tmp_path, monkeypatch):
    """Also in the pass that counts for it."""
    folds, fold = [], MPOWeight._fold
    monkeypatch.setattr(MPOWeight, "_fold", lambda self, *args: folds.append(self) or fold(self, *args))
    model = tiny_mpoe(load_balance=0.5)
    train(tmp_path, model, batches=Batches(story(8), 2), epochs=1, max_steps=1, accumulation=3, shared_fold=True)
    assert sorted(map(id, folds)) == sorted(id(m) for m in model.modules() if isinstance(m, MPOWeight))


class InterruptedBatches(Interrupting, Batches):
    pass


def test_an_interrupted_masked_run_ends_with_the_same_bits(tmp_path):
    def model(seed):
        return tiny_mpoe(seed, dropout=0.2, load_balance=0.1)

    settings = {"accumulation": 2, "shared_fold": True}
    train(tmp_path / "whole", model(0), 0.5, Batches(story(), 3), **settings)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", model(0), 0.5, InterruptedBatches(story(), 3), **settings)
    with pytest.raises(UserError, match=r"gradient_mask.probability \(it was 0.5 and is 0.75 now\)"):
        train(tmp_path / "stopped", model(1), 0.75, Batches(story(), 3), **settings)
    train(tmp_path / "stopped", model(1), 0.5, Batches(story(), 3), **settings)
    for name in ("final/model.safetensors", "log.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_what_does_not_fit_the_model(tmp_path):
    for model in (tiny_gpt2(), tiny_mpoe(experts="copy")):
        message = f"shared_fold: expected False for a model that folds no weights, got a {type(model).__name__}"
        with pytest.raises(UserError, match=message):
            train(tmp_path, model, shared_fold=True)
    with pytest.raises(UserError, match="gradient_mask: expected one of the model that is trained, got one of another"):
        fit(tiny_mpoe(), Batches(story(), 4), config=FitConfig(), output_dir=tmp_path,
            gradient_mask=GradientMask(tiny_mpoe()))  # fmt: skip
