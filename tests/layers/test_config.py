import pytest

from moebert_kernels.errors import UserError
from moebert_kernels.models import MoEBertConfig
from tests.models import tiny

TASKS = {"router": "task", "tasks": ["a", "b"]}


@pytest.mark.parametrize(
    "field, message",
    [
        ({"num_experts": 0}, "num_experts: expected an integer of at least 1, got 0"),
        ({"num_experts": "4"}, "num_experts: expected an integer of at least 1, got '4'"),
        ({"expert_size": 0}, "expert_size: expected an integer of at least 1, got 0"),
        (
            {"router": "hash"},
            "router: expected one of hash-random, hash-balance, gate-token, gate-sentence, task, got 'hash'",
        ),
        ({"preset": "mine"}, "preset: expected one of default, paper, got 'mine'"),
        ({"style": "t5"}, "style: expected one of bert, roberta, got 't5'"),
        ({"expert_dropout": 1.0}, "expert_dropout: expected a probability in [0, 1), got 1.0"),
        ({"load_balance": -1.0}, "load_balance: expected a number of at least 0, got -1.0"),
        ({"format_version": 2}, "format_version: expected 1, got 2"),
        ({"is_decoder": True}, "is_decoder: expected False, MoEBERT is an encoder, got True"),
        ({"norm": "none"}, "norm: expected one of expert, layer, got 'none'"),
        ({"norm": "layer"}, "norm: expected 'expert' with router='hash-random', got 'layer'"),
        ({"tasks": ["a"]}, "tasks: expected None with router='hash-random', got ['a']"),
        ({"router": "gate-token", "top_k": 2}, "top_k: expected 1 with router='gate-token', got 2"),
        ({"router": "task"}, "tasks: expected different names with router='task', got None"),
        ({**TASKS, "tasks": ["a", "a"]}, "tasks: expected different names with router='task', got ['a', 'a']"),
        ({**TASKS, "top_k": 0}, "top_k: expected an integer of at least 1, got 0"),
        ({**TASKS, "top_k": 5}, "top_k: expected at most 4 with num_experts=4 and norm='layer', got 5"),
        (
            {**TASKS, "norm": "expert", "top_k": 2},
            "top_k: expected at most 1 with num_experts=4 and norm='expert', got 2",
        ),
        ({**TASKS, "w2_factors": [[1], [1]]}, "w2_factors: expected some as w1_factors=None, got [[1], [1]]"),
        ({"max_bond": 3}, "max_bond: expected None with router='hash-random', got 3"),
        ({**TASKS, "task_labels": {"a": []}}, "task_labels: expected labels of a, b, got {'a': []}"),
    ],
)
def test_rejects(field, message):
    with pytest.raises(UserError) as error:
        MoEBertConfig(**field)
    assert str(error.value) == message


INTEGERS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    "type_vocab_size", "num_experts", "expert_size", "top_k", "num_labels",
)  # fmt: skip
WRONG = {
    "an integer of at least 1": (INTEGERS, (0, -1, "x", [1], {"a": 1}, 2.5, float("nan"), True)),
    "an integer of at most": (INTEGERS, (10**20,)),
    "an integer of at least 0": (("shared", "pad_token_id"), (-1, "x", [1], 2.5, float("nan"))),
    "one below vocab_size=30522": (("pad_token_id",), (30522,)),
    "a number of at least 0": (
        ("layer_norm_eps", "initializer_range", "load_balance"),
        (-1, "x", None, [1], float("nan"), float("inf"), 10**400),
    ),
    "a probability in [0, 1)": (
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "expert_dropout", "classifier_dropout"),
        (-1, 1, "x", [0.1], float("nan")),
    ),
    "one of": (("router", "preset", "style", "hidden_act", "norm"), (5, "x", [1], {"a": 1}, True)),
    "True or False": (("original_batch1", "route_padding"), (0, "x", [True], 2.5)),
    "a list of names": (("tasks",), (0, "ab", [1, 2], {"a": 1}, [""])),
    "a mapping": (("task_labels",), (0, [1], "x")),
    "a mapping of numbers to names": (("id2label",), (0, "x", [1], {"a": "b"})),
}


@pytest.mark.parametrize("wanted", WRONG)
def test_every_field_has_a_kind_and_a_range(wanted):
    fields, values = WRONG[wanted]
    for field in fields:
        for value in values:
            with pytest.raises(UserError) as error:
                MoEBertConfig(**{field: value})
            message = str(error.value)
            assert message.startswith(f"{field}: expected {wanted}") and len(message) < 250 and "\n" not in message


def test_labels_of_tasks_are_names():
    with pytest.raises(UserError, match="task_labels: expected a list of names for b, got 'yz'"):
        MoEBertConfig(**TASKS, task_labels={"a": ["x"], "b": "yz"})


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


def test_task_routing_survives_json():
    config = tiny.config(**TASKS, task_labels={"b": ["no", "yes"], "a": []})
    assert (config.norm, config.top_k, config.num_labels, config.outputs_per_task) == ("layer", 2, 3, [1, 2])
    assert config.id2label == {0: "a", 1: "b: no", 2: "b: yes"}
    again = MoEBertConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert tiny.config(**TASKS, norm="expert").top_k == 1


def test_a_task_has_a_number():
    assert tiny.config(**TASKS).task_id("b") == 1
    with pytest.raises(UserError, match="task: expected one of the model's tasks, a, b, got 'c'"):
        tiny.config(**TASKS).task_id("c")
    with pytest.raises(
        UserError, match=r"task: expected one of the model's tasks, none \(router='hash-random'\), got 'c'"
    ):
        tiny.config().task_id("c")
