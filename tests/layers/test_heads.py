import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForMaskedLM

from tests.models import tiny


@pytest.mark.parametrize("style", tiny.STYLES)
@pytest.mark.parametrize("head", tiny.HEADS)
def test_loss_and_gradients(head, style):
    model = tiny.model(head, style=style, router="gate-token", load_balance=0.5)
    inputs, labels = tiny.inputs(), tiny.labels(head)
    output = model(**inputs, **labels)
    if head == "qa":
        task = (
            F.cross_entropy(output.start_logits, labels["start_positions"])
            + F.cross_entropy(output.end_logits, labels["end_positions"])
        ) / 2
    else:
        task = F.cross_entropy(output.logits.flatten(0, -2), labels["labels"].flatten())
    torch.testing.assert_close(output.loss, task + 0.5 * output.balance_loss[0])
    assert output.balance_loss.shape == (tiny.B,) and (output.balance_loss == output.balance_loss[0]).all()
    assert output.balance_loss[0] > 0
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("head", tiny.HEADS)
def test_without_labels_and_as_tuple(head):
    model = tiny.model(head)
    inputs, labels = tiny.inputs(), tiny.labels(head)
    output = model(**inputs)
    assert output.loss is None
    first = "start_logits" if head == "qa" else "logits"
    assert torch.equal(model(**inputs, return_dict=False)[0], output[first])
    loss, logits, *_ = model(**inputs, **labels, return_dict=False)
    assert loss.ndim == 0 and torch.equal(logits, output[first])
    model.config.return_dict = False
    assert isinstance(model(**inputs), tuple)


def test_problem_types():
    inputs = tiny.inputs()
    regression = tiny.model(num_labels=1)
    target = torch.randn(tiny.B)
    output = regression(**inputs, labels=target)
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], target))

    several = tiny.model(problem_type="multi_label_classification")
    target = torch.randint(0, 2, (tiny.B, 3)).float()
    output = several(**inputs, labels=target)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, target))


def test_ignored_labels():
    model = tiny.model("qa")
    inputs = tiny.inputs()
    starts, ends = torch.tensor([1, 2, tiny.T + 5]), torch.tensor([2, tiny.T + 5, 3])
    output = model(**inputs, start_positions=starts, end_positions=ends)
    wanted = (
        F.cross_entropy(output.start_logits[:2], starts[:2]) + F.cross_entropy(output.end_logits[[0, 2]], ends[[0, 2]])
    ) / 2
    torch.testing.assert_close(output.loss, wanted)

    model = tiny.model("mlm")
    labels = torch.full((tiny.B, tiny.T), -100)
    labels[1, 3] = 7
    output = model(**inputs, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[1, 3], torch.tensor(7)))


@pytest.mark.parametrize("style", tiny.STYLES)
def test_masked_lm_is_tied(style):
    model = tiny.model("mlm", style=style)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().bias.data_ptr() == model._head.bias.data_ptr()


def dense_fields(config):
    names = BertConfig().to_dict().keys() & config.to_dict().keys() - {"model_type", "architectures"}
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("style", tiny.STYLES)
def test_keys_and_logits_are_those_of_the_dense_model(style):
    """With every neuron in every expert and equal experts, a MoE model is its dense model, keys and logits."""
    head, dense_class, dense_config = {
        "bert": ("sequence", BertForSequenceClassification, BertConfig),
        "roberta": ("mlm", RobertaForMaskedLM, RobertaConfig),
    }[style]
    model = tiny.model(head, style=style, expert_size=48, pad_token_id=1, max_position_embeddings=30)
    dense = dense_class(dense_config(**dense_fields(model.config), num_labels=3)).eval()

    weights = {key.replace(f"{style}.", "moebert.", 1): value for key, value in dense.state_dict().items()}
    for layer in range(2):
        prefix = f"moebert.encoder.layer.{layer}."
        for theirs, ours in (
            ("intermediate.dense.weight", "w1"), ("intermediate.dense.bias", "b1"), ("output.dense.weight", "w2"),
            ("output.dense.bias", "b2"), ("output.LayerNorm.weight", "norm_weight"),
            ("output.LayerNorm.bias", "norm_bias"),
        ):  # fmt: skip
            weights[f"{prefix}experts.{ours}"] = torch.stack([weights.pop(prefix + theirs)] * 4)
        weights[f"{prefix}router.table"] = model.moebert.encoder.layer[layer].router.table
    model.load_state_dict(weights)

    inputs = tiny.inputs()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 1)
    got, wanted = model(**inputs).logits, dense(**inputs).logits
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(*((got, wanted) if head == "sequence" else (got[mask], wanted[mask])))
