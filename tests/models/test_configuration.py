import pytest

from moebert_kernels.errors import UserError
from moebert_kernels.models import MoEBertConfig
from tests.models import tiny


@pytest.mark.parametrize(
    "field, message",
    [
        ({"num_experts": 0}, "num_experts: expected an integer of at least 1, got 0"),
        ({"num_experts": "4"}, "num_experts: expected an integer of at least 1, got '4'"),
        ({"expert_size": 0}, "expert_size: expected an integer of at least 1, got 0"),
        (
            {"router": "hash"},
            "router: expected one of hash-random, hash-balance, gate-token, gate-sentence, got 'hash'",
        ),
        ({"preset": "mine"}, "preset: expected one of default, paper, got 'mine'"),
        ({"style": "t5"}, "style: expected one of bert, roberta, got 't5'"),
        ({"expert_dropout": 1.0}, "expert_dropout: expected a probability in [0, 1), got 1.0"),
        ({"load_balance": -1.0}, "load_balance: expected a number of at least 0, got -1.0"),
        ({"format_version": 2}, "format_version: expected 1, got 2"),
        ({"is_decoder": True}, "is_decoder: expected False, MoEBERT is an encoder, got True"),
    ],
)
def test_rejects(field, message):
    with pytest.raises(UserError) as error:
        MoEBertConfig(**field)
    assert str(error.value) == message


def test_an_activation_without_an_op_is_an_error():
    with pytest.raises(UserError, match=r"hidden_act: expected one of gelu, .* got 'mish'"):
        MoEBertConfig(hidden_act="mish")


def test_a_model_checks_what_was_set_after_construction():
    config = tiny.config()
    config.router = "gate"
    with pytest.raises(UserError, match="router: expected one of"):
        tiny.HEADS["sequence"](config)


def test_preset_decides_about_padding():
    assert MoEBertConfig().route_padding is False
    assert MoEBertConfig(preset="paper").route_padding is True
    assert MoEBertConfig(preset="paper", route_padding=False).route_padding is False


def test_survives_json():
    config = tiny.config(router="gate-token", preset="paper", expert_dropout=0.2, num_labels=5)
    again = MoEBertConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.num_labels == 5 and again.route_padding
