"""Conversion in place, family by family: equal to dense where it must be, saved and loaded, trained."""

import copy
import pickle

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    Trainer,
    TrainingArguments,
)

from moebert_kernels.convert import convert_to_moe, importance_scores
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, NormedExperts, moe_layers
from tests.convert.families import FAMILIES, IMAGES, ONE_OF_EACH_SHAPE, TWO_STACKS, make, make_inputs, one_layer, valid

SPLIT = {"expert_size": 18, "num_shared_neurons": 8}
KINDS = {
    "hash": MoEConfig(**SPLIT),
    "hash-layer-norm": MoEConfig(norm="layer", **SPLIT),
    "gate": MoEConfig(router="gate-token", **SPLIT),
    "sentence": MoEConfig(router="gate-sentence", **SPLIT),
    "switch": MoEConfig.switch(num_experts=3),
    "top2": MoEConfig(router="top2", experts="copy", num_experts=3),
    "mpoe": MoEConfig.mpoe(num_experts=3),
    "mpoe-hash": MoEConfig.mpoe(num_experts=3, router="hash-random", expert_bias="common"),
}


def slow_unless(families):
    return [f if f in families else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


def routers_of(family):
    """All of them for a model of each shape, and five for the others."""
    kinds = KINDS if family in ONE_OF_EACH_SHAPE else ("hash", "gate", "switch", "top2", "mpoe")
    return [name for name in kinds if family not in IMAGES or not KINDS[name].is_hash_routed]


def converted(family, kind="hash", auto=AutoModel, **changes):
    model = make(family, auto, **changes)
    return convert_to_moe(model, KINDS[kind], importance=scores_of(model))


def scores_of(model):
    return torch.arange(48.0).sin().expand(len(layers_of(model)), 48)


def layers_of(model):
    from moebert_kernels.convert.sites import find_sites

    return find_sites(model)


def hidden(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def assert_near(a, b, bound=2e-6):
    assert (a - b).abs().max() <= bound * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("family", slow_unless(ONE_OF_EACH_SHAPE))
def test_equal_to_dense_with_all_neurons(family):
    """One expert that is the layer, and four experts that all are: the dense model's numbers."""
    model, inputs = make(family), make_inputs(family)
    expected = valid(family, hidden(model, inputs), inputs)
    router = {"router": "switch"} if family in IMAGES else {}
    for E in (1, 4):
        config = MoEConfig(num_experts=E, expert_size=48, num_shared_neurons=48, **router)
        moe = convert_to_moe(copy.deepcopy(model), config, importance=scores_of(model))
        assert type(moe).__name__ == type(model).__name__
        assert moe.config.model_type == model.config.model_type
        assert_near(valid(family, hidden(moe, inputs), inputs), expected, 1e-5)


@pytest.mark.parametrize("family", slow_unless(ONE_OF_EACH_SHAPE))
def test_saves_loads_copies_and_trains(family, tmp_path):
    inputs = make_inputs(family)
    for kind in routers_of(family):
        model = converted(family, kind)
        expected = hidden(model, inputs)
        model.save_pretrained(tmp_path / kind)
        loaded = AutoModel.from_pretrained(tmp_path / kind).eval()
        state, again = model.state_dict(), loaded.state_dict()
        assert state.keys() == again.keys()
        assert all(torch.equal(state[name], again[name]) for name in state)
        assert loaded.config.quantization_config == model.config.quantization_config
        for copied in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert type(copied).__name__ == type(model).__name__
            assert_near(hidden(copied, inputs), expected)
        loaded.train()
        loaded(**inputs).last_hidden_state.square().mean().backward()
        for layer in moe_layers(loaded):
            assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.experts.parameters())


@pytest.mark.parametrize("family", ["bert", "megatron-bert", "modernbert", "gpt2"])
def test_norm_of_each_expert_only_behind_a_post_norm_feed_forward(family):
    experts = moe_layers(converted(family))[0].experts
    assert isinstance(experts, NormedExperts) == (family == "bert")
    if family != "bert":
        with pytest.raises(UserError, match=r"norm: 'expert' needs experts of their own weights"):
            convert_to_moe(make(family), MoEConfig(norm="expert", **SPLIT))


# gates know nothing of the family, so a model of each shape is enough, and those that have no token ids
COMPILED = [(f, "hash") for f in FAMILIES if f not in IMAGES] + [
    (f, "gate") for f in sorted({*ONE_OF_EACH_SHAPE, *IMAGES})
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), COMPILED)
def test_compiles_exports_and_recomputes(family, kind):
    torch._dynamo.reset()
    changes = {} if family in ONE_OF_EACH_SHAPE else one_layer(family)
    model, inputs = converted(family, kind, **changes), make_inputs(family)
    expected = hidden(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(hidden(compiled, inputs), expected)

    if family in (*ONE_OF_EACH_SHAPE, *IMAGES):
        check_export(model, family, inputs)
    if not model.supports_gradient_checkpointing:
        return
    plain, recomputed = (gradients_of_two_forwards(model, inputs, again) for again in (False, True))
    for name, gradient in plain.items():
        assert_near(recomputed[name], gradient, 1e-5)


def check_export(model, family, inputs):
    """The exported program gives the model's numbers for another number of sequences and another length."""
    kwargs = inputs | ({"use_cache": False} if family in TWO_STACKS else {})
    any_size = torch.export.Dim.AUTO
    sizes = {name: {0: any_size, 1: any_size} if t.ndim == 2 else {0: any_size} for name, t in inputs.items()}
    sizes |= {name: None for name in kwargs if name not in inputs}
    program = torch.export.export(model, (), kwargs, dynamic_shapes=sizes, strict=False)
    larger = {name: torch.cat([t, t, t])[:, : t.shape[1] - (t.ndim == 2)] for name, t in inputs.items()}
    with torch.no_grad():
        assert_near(program.module()(**kwargs | larger).last_hidden_state, hidden(model, larger))


def gradients_of_two_forwards(model, inputs, recompute):
    model = copy.deepcopy(model).train()
    for module in model.modules():
        for name in ("p", "dropout", "output_dropout", "hidden_dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        module.layerdrop = 0.0
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    other = {name: t if name == "attention_mask" else t.flip(1) for name, t in inputs.items()}
    (model(**inputs).last_hidden_state.sum() + model(**other).last_hidden_state.square().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and ".experts." in name}


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3", "t5"])
def test_generation_with_a_cache(family):
    """Left padding, as decoders want it."""
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    for kind in ("hash", "gate"):
        # weights so large that the tokens depend on those before
        wide = (
            {"decoder_start_token_id": 0, "initializer_factor": 5.0} if family == "t5" else {"initializer_range": 0.3}
        )
        model, inputs = converted(family, kind, auto, **wide), make_inputs(family)
        inputs.pop("decoder_input_ids", None)
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
        cached, plain = (model.generate(**inputs, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, plain) and len(set(cached[:, -6:].flatten().tolist())) > 4


@pytest.mark.parametrize("family", [f for f in ONE_OF_EACH_SHAPE if f not in IMAGES])
def test_padding_changes_nothing(family):
    model, inputs = converted(family), make_inputs(family)
    alone = {name: t[1:, :7] if name in ("input_ids", "attention_mask") else t[1:] for name, t in inputs.items()}
    got, expected = hidden(model, inputs)[1:], hidden(model, alone)
    assert_near(got[:, : expected.shape[1]], expected, 1e-5)


def test_importance_of_a_gate_is_of_both_its_rows():
    """|<w, dL/dw>| summed over the rows of a neuron, by autograd's own weight gradients."""
    model = make("qwen3", AutoModelForSequenceClassification)
    batch = make_inputs("qwen3") | {"labels": torch.tensor([0, 1])}
    scores = importance_scores(model, [batch])
    expected = torch.zeros(2, 48)
    for sample in range(2):
        model.zero_grad()
        model(**{name: t[sample : sample + 1] for name, t in batch.items()}).loss.backward()
        for n, layer in enumerate(model.model.layers):
            gate, up, down = layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
            products = [(w * w.grad).sum(dim) for w, dim in ((gate, 1), (up, 1), (down, 0))]
            expected[n] += torch.stack(products).sum(0).abs()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("family", ["modernbert", "opt", "gpt2", "distilbert", "phi3"])
def test_importance_does_not_depend_on_batches(family):
    model = make(family, AutoModelForSequenceClassification, pad_token_id=1)
    batch = make_inputs(family) | {"labels": torch.tensor([0, 1])}
    singles = [{name: t[i : i + 1] for name, t in batch.items()} for i in range(2)]
    torch.testing.assert_close(
        importance_scores(model, [batch]), importance_scores(model, singles), rtol=1e-4, atol=1e-7
    )


def test_the_balance_loss_is_in_the_loss_of_training(tmp_path):
    batch = make_inputs("bert") | {"labels": torch.tensor([0, 1])}
    model = make("bert", AutoModelForSequenceClassification)
    losses = [
        convert_to_moe(
            copy.deepcopy(model),
            MoEConfig(router="gate-token", load_balance=weight, **SPLIT),
            importance=scores_of(model),
        )(**batch).loss
        for weight in (0.0, 1.0, 3.0)
    ]
    assert losses[1] > losses[0] + 1.9  # two layers, each at least 1 for routing that is not perfectly even
    torch.testing.assert_close(losses[2] - losses[0], 3 * (losses[1] - losses[0]))
    losses[2].backward()


@pytest.mark.parametrize("kind", ["hash", "gate", "mpoe"])
def test_trainer_trains_and_evaluates_a_loaded_model(kind, tmp_path):
    converted("bert", kind, AutoModelForSequenceClassification).save_pretrained(tmp_path / "moe")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "moe")
    rows = [{"input_ids": torch.arange(3, 12), "labels": torch.tensor(n % 2)} for n in range(8)]
    arguments = TrainingArguments(tmp_path / "out", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )  # fmt: skip
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert any(not torch.equal(t, before[name]) for name, t in model.state_dict().items() if "experts" in name)


def test_resizing_the_vocabulary_resizes_the_tables(tmp_path):
    model = converted("bert", auto=AutoModelForSequenceClassification)
    model.resize_token_embeddings(110)
    assert [layer.router.vocab_size for layer in moe_layers(model)] == [110, 110]
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 109]])).logits).all()
    model.save_pretrained(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:no importance scores given")
def test_the_images_of_a_model_for_text_and_images_are_no_tokens():
    """Their layers know nothing of the text's ids and padding."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_act": "gelu",
    }
    text, vision = sizes | {"vocab_size": 100}, sizes | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with pytest.raises(UserError, match=r"and vision_model\.\S+ of CLIPModel gets none; take 'gate-token'"):
        convert_to_moe(copy.deepcopy(model), KINDS["hash"])
    inputs = make_inputs("bert") | make_inputs("vit")
    expected = model(**inputs).logits_per_image
    whole = MoEConfig(router="switch", expert_size=48, num_shared_neurons=48)
    moe = convert_to_moe(model, whole)
    assert [layer.is_told_tokens for layer in moe_layers(moe)] == [True, True, False, False]
    assert_near(moe(**inputs).logits_per_image, expected, 1e-5)


@pytest.mark.filterwarnings("ignore:no importance scores given")
@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("vit", {}, "router: hash-random routes by token ids, and .* of ViTModel gets none; take 'gate-token'"),
        ("bert", {"target_modules": ["mlp"]}, r"target_modules: expected names of feed-forwards \(output\), got 'mlp'"),
        ("bert", {"router": "switch", "router_options": {"warmth": 1}}, "router_options: expected options of router"),
    ],
)
def test_what_does_not_fit_a_model_is_refused(family, config, message):
    with pytest.raises(UserError, match=message):
        convert_to_moe(make(family), MoEConfig(**config))


@pytest.mark.parametrize("family", ["bart", "opt", "bert", "llama"])
def test_linear_layers_that_compute_more_are_refused(family):
    class Adapted(torch.nn.Module):
        """As adapters wrap a linear layer."""

        def __init__(self, base):
            super().__init__()
            self.base, self.weight, self.bias = base, base.weight, base.bias

        def forward(self, x):
            return self.base(x) + 2 * x[..., :1]

    model = make(family)
    site = find_sites(model)[0]
    owner, _, name = site.first[0].rpartition(".")
    setattr(site.owner.get_submodule(owner), name, Adapted(site.first_modules[0]))
    with pytest.raises(UserError, match="does not compute w2 act"):
        convert_to_moe(model, MoEConfig())


def test_a_head_of_two_linear_layers_is_no_feed_forward():
    model = make("big_bird", AutoModelForQuestionAnswering)
    assert hasattr(model.qa_classifier, "intermediate")
    assert [site.name for site in find_sites(model)] == [f"bert.encoder.layer.{n}.output" for n in range(2)]


def test_a_converted_model_and_a_model_without_token_ids_are_refused():
    model = converted("bert")
    with pytest.raises(UserError, match="model: expected a dense model, got BertModel with experts in it"):
        convert_to_moe(model)
    with pytest.raises(UserError, match="input_ids: expected token ids, which hash routing needs, got inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(UserError, match="model: albert cannot be converted: all of its layers share one feed-forward"):
        FAMILIES["albert"] = ("albert", FAMILIES["electra"][1])
        try:
            convert_to_moe(make("albert"))
        finally:
            del FAMILIES["albert"]
