from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moebert_kernels.distill.objectives import (
    LayerwiseObjective,
    hidden_mse,
    sequence_weights,
    symmetric_kl,
    task_loss,
)
from moebert_kernels.distill.teacher import TeacherOutputs, teacher_info
from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig
from tests.distill.tiny import tiny_bert
from tests.golden_arrays import assert_golden, golden


@pytest.mark.parametrize(("case", "kind"), [("cls3", "classification"), ("cls1", "regression")])
def test_paper_preset_matches_the_original(case, kind):
    shared, arrays = golden("e_distill_loss"), golden("e_distill_loss", f"{case}.")
    hidden, logits = shared["hidden"].requires_grad_(), arrays["logits"].requires_grad_()
    student = SimpleNamespace(hidden_states=hidden.unbind(0), logits=logits)
    teacher = TeacherOutputs(shared["t_hidden"].unbind(0), logits=arrays["t_logits"])
    padded = {"attention_mask": torch.tensor([[1] * 7 + [0] * 3] * 3)}  # of no consequence in the published losses

    terms = LayerwiseObjective(kind, preset="paper")(student, teacher, padded)
    total = terms["hidden"] + terms["prediction"]
    total.backward()

    assert_golden(terms["hidden"].reshape(1), arrays["hidden_mse_sum"], name="hidden")
    assert_golden(total.reshape(1), arrays["loss"], name="loss")
    assert_golden(logits.grad, arrays["grad_logits"], name="grad_logits")
    assert_golden(hidden.grad, arrays["grad_hidden"], name="grad_hidden")


def test_paper_preset_matches_the_original_on_spans():
    shared, qa = golden("e_distill_loss"), golden("e_distill_loss", "qa.")
    student = SimpleNamespace(hidden_states=shared["hidden"].unbind(0), start_logits=qa["start"], end_logits=qa["end"])
    teacher = TeacherOutputs(shared["t_hidden"].unbind(0), start_logits=qa["t_start"], end_logits=qa["t_end"])
    terms = LayerwiseObjective("qa", preset="paper")(student, teacher, {})
    assert_golden((terms["hidden"] + terms["prediction"]).reshape(1), qa["loss"])


@pytest.mark.parametrize("kind", ["classification", "qa"])
def test_default_preset_ignores_padding(kind):
    """The terms of a padded batch are the mean of those of its sentences alone, whatever stands at padded positions."""
    torch.manual_seed(1)
    lengths, layers, hidden = [5, 2, 7], 3, 4

    def outputs():
        states = tuple(torch.randn(3, 7, hidden) for _ in range(layers))
        return SimpleNamespace(
            hidden_states=states, logits=torch.randn(3, 2), start_logits=torch.randn(3, 7), end_logits=torch.randn(3, 7)
        )

    def cut(whole, row, length):
        return SimpleNamespace(
            hidden_states=tuple(state[row : row + 1, :length] for state in whole.hidden_states),
            logits=whole.logits[row : row + 1],
            start_logits=whole.start_logits[row : row + 1, :length],
            end_logits=whole.end_logits[row : row + 1, :length],
        )

    student, teacher = outputs(), outputs()
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    objective = LayerwiseObjective(kind)
    got = objective(student, teacher, {"attention_mask": mask})
    alone = [objective(cut(student, i, n), cut(teacher, i, n), {}) for i, n in enumerate(lengths)]
    for name in ("hidden", "prediction"):
        torch.testing.assert_close(got[name], torch.stack([terms[name] for terms in alone]).mean())


def test_zero_when_student_is_teacher():
    states = tuple(torch.randn(2, 3, 4) for _ in range(3))
    outputs = SimpleNamespace(hidden_states=states, logits=torch.randn(2, 3))
    terms = LayerwiseObjective("classification")(outputs, outputs, {"attention_mask": torch.ones(2, 3)})
    assert {name: term.item() for name, term in terms.items()} == {"hidden": 0.0, "prediction": 0.0}


@pytest.mark.parametrize("masked", [False, True])
def test_symmetric_kl_stays_finite(masked):
    logits = torch.tensor([[0.0, 1e4, -1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1e4, 0.0, -1e4, 3.0]])
    loss = symmetric_kl(logits, teacher, torch.tensor([[1, 1, 1, 0]]) if masked else None)
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert torch.isfinite(logits.grad).all()


def test_symmetric_kl_is_that_of_torch():
    p, q = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    one, other = (
        torch.nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="batchmean", log_target=True)
        for a, b in ((p, q), (q, p))
    )
    torch.testing.assert_close(symmetric_kl(p, q), (one + other) / 2)
    assert symmetric_kl(p.half(), q.half()).dtype == torch.float32


def test_hidden_mse_of_half_precision_is_float32():
    hidden = torch.full((1, 2, 3), 300.0, dtype=torch.float16)  # its square is beyond float16
    assert hidden_mse(hidden, torch.zeros_like(hidden)).item() == pytest.approx(9e4)


def test_sequence_weights_sum_to_one_and_survive_an_empty_sequence():
    weights = sequence_weights(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.25, 0.0], [0.5, 0.0, 0.0]]))
    assert torch.isfinite(sequence_weights(torch.zeros(2, 3))).all()


def test_layer_map_chooses_states():
    assert LayerwiseObjective("qa").pairs(3, 12) == {0: 0, 1: 4, 2: 8, 3: 12}
    assert LayerwiseObjective("qa").pairs(3, 4) == {0: 0, 1: 1, 2: 3, 3: 4}
    student = SimpleNamespace(hidden_states=tuple(torch.zeros(1, 2, 3) for _ in range(3)), logits=torch.zeros(1, 2))
    states = tuple(None if layer % 2 else torch.full((1, 2, 3), float(layer)) for layer in range(5))
    teacher = TeacherOutputs(states, logits=torch.zeros(1, 2))
    assert LayerwiseObjective("classification")(student, teacher, {})["hidden"].item() == 0 + 2**2 + 4**2
    last_only = LayerwiseObjective("classification", layer_map={2: 4})
    assert last_only(student, teacher, {})["hidden"].item() == 4**2


def test_fits_models_and_routing():
    student, info = tiny_bert(), teacher_info(tiny_bert(1))
    LayerwiseObjective("classification").check(student, info)
    LayerwiseObjective("classification", preset="paper").check(student, info)
    for preset, routed in (("default", False), ("paper", True)):
        student.config.quantization_config = MoEConfig(route_padding=routed)
        LayerwiseObjective("classification", preset=preset).check(student, info)
        student.config.quantization_config = MoEConfig(route_padding=not routed)
        with pytest.raises(UserError, match=r"preset: expected padding to be (skipped|routed) .* got a model"):
            LayerwiseObjective("classification", preset=preset).check(student, info)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "hidden_size: expected the teacher's 32, got 16"),
        ({"vocab_size": 61}, "vocab_size: expected the teacher's 61, got 60"),
        ({"num_labels": 2}, "num_labels: expected the teacher's 2, got 3"),
        ({"label_names": ("a", "c", "b")}, "labels: expected the teacher's a, c, b, got a, b, c"),
        ({"num_layers": 1}, "layer_map: expected 1 to 1 student layers, as many as the teacher has, got 2"),
        ({"layers": (0, 2)}, r"teacher: expected hidden states \[0, 1, 2\], got only \[0, 2\]"),
    ],
)
def test_check_rejects(change, message):
    with pytest.raises(UserError, match=message):
        student = tiny_bert()
        student.config.id2label = dict(enumerate("abc"))
        LayerwiseObjective("classification").check(student, replace(teacher_info(tiny_bert(1)), **change))


def test_the_case_of_class_names_is_ignored():
    student = tiny_bert()
    student.config.id2label = dict(enumerate("abc"))
    info = replace(teacher_info(tiny_bert(1)), label_names=("A", "B", "C"))
    LayerwiseObjective("classification").check(student, info)
    with pytest.raises(UserError, match="labels: expected the teacher's A, C, B, got a, b, c"):
        LayerwiseObjective("classification").check(student, replace(info, label_names=("A", "C", "B")))


def test_rejects():
    with pytest.raises(UserError, match="kind: expected one of classification, regression, qa, got 'span'"):
        LayerwiseObjective("span")
    with pytest.raises(UserError, match="preset: expected one of default, paper, got 'papers'"):
        LayerwiseObjective("qa", preset="papers")
    with pytest.raises(UserError, match="layer_map: expected at least one pair"):
        LayerwiseObjective("qa", layer_map={})
    with pytest.raises(UserError, match=r"layer_map: expected teacher states between 0 and 2, got \[3\]"):
        LayerwiseObjective("qa", layer_map={1: 3}).pairs(2, 2)
    with pytest.raises(UserError, match="preset: expected 'default' with cached teacher outputs"):
        info = replace(teacher_info(tiny_bert(1)), stored_as="float16")
        LayerwiseObjective("classification", preset="paper").check(tiny_bert(), info)
    outputs = SimpleNamespace(hidden_states=(torch.zeros(1, 2, 3),) * 2, logits=torch.zeros(1, 2))
    other = SimpleNamespace(hidden_states=(torch.zeros(1, 2, 4),) * 2, logits=torch.zeros(1, 2))
    with pytest.raises(UserError, match=r"hidden_states\[0\]: expected the shape \(1, 2, 3\), got \(1, 2, 4\)"):
        LayerwiseObjective("classification")(outputs, other, {})
    with pytest.raises(UserError, match="start_logits: expected in the outputs"):
        LayerwiseObjective("qa")(outputs, outputs, {})
    outputs.hidden_states = None
    with pytest.raises(UserError, match="hidden_states: expected in the outputs"):
        LayerwiseObjective("classification")(outputs, outputs, {})


def test_task_loss_is_the_models_own():
    outputs = SimpleNamespace(loss=torch.tensor(2.0), logits=torch.zeros(1, 2))
    assert task_loss(outputs, {"labels": torch.zeros(1)}).item() == 2.0
    with pytest.raises(UserError, match="labels: expected in each batch"):
        task_loss(SimpleNamespace(loss=None, logits=None), {})


def test_task_loss_of_tokens_is_a_mean_over_sequences():
    logits, labels = torch.randn(2, 4, 5), torch.tensor([[1, 2, 3, 4], [0, -100, -100, -100]])
    got = task_loss(SimpleNamespace(logits=logits), {"labels": labels})
    alone = [torch.nn.functional.cross_entropy(logits[i], labels[i]) for i in range(2)]
    torch.testing.assert_close(got, torch.stack(alone).mean())


def test_task_loss_of_answers_ignores_padding():
    logits = {"start_logits": torch.randn(2, 4), "end_logits": torch.randn(2, 4)}
    batch = {
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "start_positions": torch.tensor([2, 0]),
        "end_positions": torch.tensor([3, 9]),  # 9 is cut off: nothing to learn from
    }
    outputs = SimpleNamespace(loss=torch.tensor(7.0), **logits)
    ce = torch.nn.functional.cross_entropy
    start = (ce(logits["start_logits"][0], torch.tensor(2)) + ce(logits["start_logits"][1, :2], torch.tensor(0))) / 2
    end = ce(logits["end_logits"][0], torch.tensor(3)) / 2
    torch.testing.assert_close(task_loss(outputs, batch), (start + end) / 2)
    assert task_loss(outputs, batch, preset="paper").item() == 7.0


@pytest.mark.parametrize("scores", [False, True])
def test_task_loss_of_sequences_without_a_label_is_zero(scores):
    logits = torch.randn(3, 1 if scores else 2, requires_grad=True)
    labels = torch.tensor([1, 0, 1]).float() if scores else torch.tensor([1, 0, 1])
    batch = {"labels": labels, "labelled": torch.tensor([True, False, True])}
    loss = task_loss(SimpleNamespace(logits=logits, loss=torch.tensor(7.0)), batch)
    loss.backward()
    function = torch.nn.functional.mse_loss if scores else torch.nn.functional.cross_entropy
    ours = logits.detach().squeeze(1) if scores else logits.detach()
    torch.testing.assert_close(loss, (function(ours[0], labels[0]) + function(ours[2], labels[2])) / 3)
    assert not logits.grad[1].any() and logits.grad[0].any()
