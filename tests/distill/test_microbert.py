"""The terms of MicroBERT-style distillation on tiny random models, one by one."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moebert_kernels.distill import MoETrainingArguments
from moebert_kernels.distill.alignment import VIEWS, FeatureMaps, pool, vector_distance
from moebert_kernels.distill.discriminator import AdversaryConfig
from moebert_kernels.distill.microbert import TERMS, MicroBertObjective
from moebert_kernels.distill.objectives import soft_targets
from moebert_kernels.distill.relations import Recorder, relation_kl
from moebert_kernels.distill.teacher import LiveTeacher, teacher_info
from moebert_kernels.errors import UserError
from tests.convert.families import make
from tests.distill.tiny import TinyBatches, tiny_bert
from tests.distill.tiny_trainer import trainer

CPU = torch.device("cpu")


def terms_of(student, teacher, batch, objective):
    """The objective's terms as the loop would get them."""
    live = LiveTeacher(teacher, CPU)
    objective.check(student, live.info)
    objective.build(student, live.info, seed=0)
    if objective.relation_layer is not None:
        live.record(objective.relation_layer)
    with objective.recording():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
        outputs = student(**inputs, output_hidden_states=True)
    return objective(outputs, live(batch), batch)


def a_batch(kind="classification"):
    return TinyBatches(kind=kind).batch(torch.arange(6))


@pytest.mark.parametrize("options", [
    {}, {"project": False}, {"distance": "cosine"}, {"pool_first": True}, {"views": ("max",)},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_every_distance_is_zero_for_the_teacher_itself(kind, options):
    labels = 1 if kind == "regression" else 3
    student, teacher = (tiny_bert(1, num_labels=labels) for _ in range(2))
    terms = terms_of(student, teacher, a_batch(kind), MicroBertObjective(kind, TERMS, **options))
    assert set(terms) == set(TERMS)
    assert all(terms[name].item() == pytest.approx(0.0, abs=1e-6) for name in TERMS if name != "adversarial")
    different = terms_of(tiny_bert(2, num_labels=labels), teacher, a_batch(kind), MicroBertObjective(kind, TERMS))
    assert all(term.item() > 1e-6 and term.requires_grad for term in different.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_has_no_influence(attention):
    """The terms of a padded batch are the means of those of its sentences alone, whatever stands at padding."""
    batch = a_batch()
    student, teacher = (tiny_bert(s, attn_implementation=attention, hidden=h) for s, h in ((0, 16), (1, 32)))
    objective = MicroBertObjective("classification", TERMS)
    whole = terms_of(student, teacher, batch, objective)
    alone = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        one = {name: tensor[:, :length] if tensor.ndim == 2 else tensor for name, tensor in one.items()}
        alone.append(terms_of(student, teacher, one, objective))
    for name, term in whole.items():
        torch.testing.assert_close(term, torch.stack([terms[name] for terms in alone]).mean(), rtol=1e-5, atol=1e-6)
    filled = batch | {"input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 59)}
    for name, term in terms_of(student, teacher, filled, objective).items():
        torch.testing.assert_close(term, whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pool(dtype):
    hidden = torch.tensor([[[-1.0, 5.0], [-2.0, 2.0], [9.0, float("nan")]]], dtype=dtype)
    got = pool(hidden, torch.tensor([[1, 1, 0]]))
    assert pool(hidden, torch.tensor([[0, 1, 1]]), ("cls",)).equal(hidden[:, 1:2].float())
    torch.testing.assert_close(got, torch.tensor([[[-1.0, 5.0], [-1.0, 5.0], [-1.5, 3.5]]]))
    assert VIEWS == ("cls", "max", "mean")
    assert pool(hidden, torch.tensor([[1, 1, 0]]), ("mean",)).shape == (1, 1, 2)
    big = torch.full((1, 2, 1), -6e4, dtype=torch.float16)  # lower than -1e4, which others fill masks with
    assert pool(big, torch.tensor([[1, 0]]), ("max",)).item() == -6e4 // 32 * 32


def test_what_the_terms_are():
    """Against sums written out: MSE of mapped states by sequence, sentence vectors mapped before or after pooling."""
    batch, student, teacher = a_batch(), tiny_bert(0, layers=2, hidden=16), tiny_bert(1, layers=3, hidden=32)
    objective = MicroBertObjective("classification", ("embedding", "hidden", "alignment", "soft"), temperature=3.0)
    terms = terms_of(student, teacher, batch, objective)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours, theirs = (model.eval()(**inputs, output_hidden_states=True) for model in (student, teacher))
    pairs = {0: 0, 1: 2, 2: 3}  # round(j 3 / 2), halves up
    maps = {j: objective.maps.layers[str(j)].weight for j in pairs}
    expected = {"embedding": [], "hidden": [], "alignment": []}
    for j, g in pairs.items():
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            mapped, target = ours.hidden_states[j][row, :length] @ maps[j].T, theirs.hidden_states[g][row, :length]
            expected["hidden" if j else "embedding"].append((mapped - target).square().mean())
            if j:
                for view in (lambda x: x[0], lambda x: x.amax(0), lambda x: x.mean(0)):
                    expected["alignment"].append((view(mapped) - view(target)).square().mean())
    for name, values in expected.items():
        torch.testing.assert_close(terms[name], torch.stack(values).mean())
    p, log_q = (theirs.logits / 3).softmax(-1), (ours.logits / 3).log_softmax(-1)
    torch.testing.assert_close(terms["soft"], 9 * (p * (p.log() - log_q)).sum(-1).mean())

    first = MicroBertObjective("classification", ("alignment",), pool_first=True, views=("max",), layer_map={1: 1})
    got = terms_of(student, teacher, batch, first)["alignment"]
    vectors = (pool(o.hidden_states[1], batch["attention_mask"], ("max",))[:, 0] for o in (ours, theirs))
    mapped, target = next(vectors) @ first.maps.layers["1"].weight.T, next(vectors)
    torch.testing.assert_close(got, F.mse_loss(mapped, target))


def test_gradients():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    hidden, target, logits = (torch.randn(*s, dtype=torch.float64) for s in ((2, 4, 6), (2, 4, 6), (2, 3)))
    hidden.requires_grad_()
    for distance in ("mse", "cosine"):
        assert torch.autograd.gradcheck(
            lambda h, d=distance: vector_distance(pool(h, mask), pool(target, mask), d), (hidden,)
        )
    assert torch.autograd.gradcheck(lambda h: relation_kl((h,) * 3, (target,) * 3, mask, heads=2), (hidden,))
    assert torch.autograd.gradcheck(lambda z: soft_targets(z, logits, 2.0), (logits.flip(0).requires_grad_(),))
    hidden.grad = None
    relation_kl((hidden,) * 3, (target,) * 3, mask, heads=2).backward()
    assert not hidden.grad[mask == 0].any() and hidden.grad[mask == 1].any()


def test_relations_are_those_of_the_layer_whatever_its_attention():
    """Recorded vectors are the projections' outputs, hooks go, unequal hidden sizes and numbers of heads agree."""
    batch, seen = a_batch(), []
    for attention in ("sdpa", "eager"):
        model = tiny_bert(0, attn_implementation=attention).eval()
        with Recorder(model, 2) as recorder:
            outputs = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
        seen.append(recorder.take())
        own = model.bert.encoder.layer[1].attention.self
        torch.testing.assert_close(seen[-1][1], own.key(outputs.hidden_states[1]))
        assert not own.key._forward_hooks
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="relation: expected queries, keys and values of a forward pass, got none"):
        recorder.take()
    values = tuple(torch.randn(6, batch["input_ids"].shape[1], 24) for _ in range(3))
    assert relation_kl(seen[0], values, batch["attention_mask"], heads=8).item() > 0
    with pytest.raises(UserError, match="relation_layer: expected 1 to 2, the model's layers, got 3"):
        Recorder(model, 3)
    with pytest.raises(UserError, match="relation: expected a model with projections to queries, keys and values"):
        Recorder(make("deberta"), 1)  # which adds biases behind its projection


def test_maps_start_as_the_identity_or_orthonormal():
    state = torch.get_rng_state()
    same, wider = FeatureMaps([0, 2], 4, 4), FeatureMaps([1], 4, 6, seed=3)
    assert torch.equal(same.layers["2"].weight, torch.eye(4))
    weight = wider.layers["1"].weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(4))
    assert torch.equal(weight, FeatureMaps([1], 4, 6, seed=3).layers["1"].weight)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "qa"}, "kind: expected some of classification, regression, each once, got 'qa'"),
    ({"terms": ("fal",)}, "terms: expected some of embedding, hidden, .*, got 'fal'"),
    ({"terms": ()}, "terms: expected some of .*, got none"),
    ({"terms": ("soft", "soft")}, "terms: expected .* each once, got soft, soft"),
    ({"views": ("mean", "min")}, "views: expected some of cls, max, mean, each once, got 'min'"),
    ({"distance": "l1"}, "distance: expected some of mse, cosine"),
    ({"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
    ({"layer_map": {}}, "layer_map: expected at least one pair"),
    ({"kind": "regression", "adversary": AdversaryConfig(input="both")}, "discriminator_input: expected 'pooled'"),
])  # fmt: skip
def test_refuses_settings(options, message):
    with pytest.raises(UserError, match=message):
        MicroBertObjective(**({"kind": "classification"} | options))


@pytest.mark.parametrize(("options", "change", "message"), [
    ({}, {"vocab_size": 61}, "vocab_size: expected the teacher's 61, got 60"),
    ({}, {"num_labels": 2}, "num_labels: expected the teacher's 2, got 3"),
    ({}, {"label_names": ("a", "b", "c")}, "labels: expected the teacher's a, b, c, got x, y, z"),
    ({"project": False}, {"hidden_size": 32}, "project: expected True for a student of hidden_size 16 and .* of 32"),
    ({}, {"num_layers": 1}, "layer_map: expected 1 to 1 student layers, as many as the teacher has, got 2"),
    ({"layer_map": {1: 1, 2: 5}}, {}, "layer_map: expected teacher states between 0 and 2"),
    ({"layer_map": {2: 2}}, {}, "layer_map: expected the embeddings' output, 0, for the term 'embedding'"),
    ({"layer_map": {0: 0, 1: 2}}, {}, "layer_map: expected the student's last layer, 2, for the term 'adversarial'"),
    ({}, {"layers": (0, 2)}, r"teacher: expected hidden states \[0, 1, 2\], got only \[0, 2\]"),
    ({}, {"pooled": True}, "teacher: expected states by token for the term 'embedding', got pooled ones"),
    ({"terms": ("relation",)}, {"stored_as": "float32"}, "teacher: expected a model for the term 'relation'"),
])  # fmt: skip
def test_check_rejects(options, change, message):
    student = tiny_bert(id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2})
    info = replace(teacher_info(tiny_bert(1)), **change)
    with pytest.raises(UserError, match=message):
        MicroBertObjective("classification", **options).check(student, info)


def test_a_map_of_a_term_without_a_weight_is_left_out_between_processes(tmp_path, monkeypatch):
    """It has no gradient to share."""
    objective = MicroBertObjective("classification", ("embedding", "hidden"))
    run = trainer(tmp_path, teacher=tiny_bert(1), objective=objective, loss_weights={"embedding": 0.0}, max_steps=1)
    run.train()
    gradients = {name: p.grad for name, p in objective.maps.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == ["layers.0.weight"]
    monkeypatch.setattr(MoETrainingArguments, "world_size", 2)
    monkeypatch.setattr(run.accelerator, "reduce", lambda gradient, how: gradient / 2 if how == "mean" else gradient)
    run._end_window()
    unused, *used = objective.maps.named_parameters()
    assert unused[1].grad is None
    assert used and all(torch.equal(parameter.grad, gradients[name] / 2) for name, parameter in used)


def test_relation_heads_divide_both_sizes():
    info = teacher_info(tiny_bert(1))
    objective = MicroBertObjective("classification", ("relation",), relation_heads=3)
    with pytest.raises(UserError, match="relation_heads: expected a divisor of the hidden sizes 16 and 16, got 3"):
        objective.build(tiny_bert(), info, seed=0)


def test_what_is_trained_beside_the_student_lies_where_the_run_is():
    """A student may still be elsewhere, as under FSDP."""
    objective = MicroBertObjective("classification")
    objective.build(tiny_bert(), teacher_info(tiny_bert(1, hidden=32)), 0, torch.device("meta"))
    made = [*objective.maps.parameters(), *objective.adversary.network.parameters()]
    assert {parameter.device.type for parameter in made} == {"meta"}
