"""`MoEConfig`: every field has a kind and a range, and a file says all of it."""

import json

import pytest

from moebert_kernels.errors import UserError
from moebert_kernels.layers import MoEConfig, moe_config
from tests.layers import kinds

TASKS = {"router": "task", "tasks": ["a", "b"]}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"router": "hash"}, "router: expected one of hash-random, hash-balance, .*task.*, got 'hash'"),
        ({"router": ["switch"]}, r"router: expected one of .* got \['switch'\]"),
        ({"experts": "sparse"}, "experts: expected one of split, clustered, copy, mpo, got 'sparse'"),
        ({"norm": "none"}, "norm: expected one of expert, layer, got 'none'"),
        ({"expert_bias": "none"}, "expert_bias: expected one of expert, common, got 'none'"),
        ({"num_experts": 0}, "num_experts: expected an integer of at least 1, got 0"),
        ({"num_experts": "4"}, "num_experts: expected an integer of at least 1, got '4'"),
        ({"num_experts": True}, "num_experts: expected an integer of at least 1, got True"),
        ({"num_experts": 10**9}, "num_experts: expected an integer of at most 1048576, got 1000000000"),
        ({"expert_size": 0}, "expert_size: expected an integer of at least 1, got 0"),
        ({"expert_size": 2.5}, "expert_size: expected an integer of at least 1, got 2.5"),
        ({"num_shared_neurons": -1}, "num_shared_neurons: expected an integer of at least 0, got -1"),
        ({"experts": "copy", "expert_size": 8}, "expert_size: expected none with experts='copy', got 8"),
        ({"experts": "mpo", "num_shared_neurons": 8}, "num_shared_neurons: expected none with experts='mpo', got 8"),
        ({"max_bond": 4}, "max_bond: expected none with experts='split', got 4"),
        ({"w2_factors": [[1], [1]]}, r"w2_factors: expected none with experts='split', got \[\[1\], \[1\]\]"),
        ({"load_balance": 0.1}, "load_balance: expected none with router='hash-random', got 0.1"),
        ({"router": "switch", "load_balance": float("nan")}, "load_balance: expected a number of at least 0, got nan"),
        ({"router": "switch", "load_balance": -1.0}, "load_balance: expected a number of at least 0, got -1.0"),
        ({"router": "switch", "load_balance": [1]}, r"load_balance: expected a number of at least 0, got \[1\]"),
        ({"router_options": [1]}, r"router_options: expected names and values, got \[1\]"),
        ({"router_options": {"jitter": 1}}, "router_options: expected none with router='hash-random', got {'jitter'"),
        ({"expert_dropout": 1.0}, "expert_dropout: expected a number of at least 0 and below 1, got 1.0"),
        ({"expert_dropout": "x"}, "expert_dropout: expected a number of at least 0 and below 1, got 'x'"),
        ({"route_padding": 1}, "route_padding: expected true or false, got 1"),
        ({"target_modules": "mlp"}, "target_modules: expected a list of names, got 'mlp'"),
        ({"format_version": 7}, "format_version: expected 1, got 7"),
        ({"tasks": ["a"]}, r"tasks: expected none with router='hash-random', got \['a'\]"),
        ({"router": "gate-token", "top_k": 2}, "top_k: expected none with router='gate-token', got 2"),
        ({"router": "task"}, "tasks: expected different names with router='task', got None"),
        ({**TASKS, "tasks": "ab"}, "tasks: expected different names with router='task', got 'ab'"),
        ({**TASKS, "tasks": ["a", "a"]}, r"tasks: expected different names with router='task', got \['a', 'a'\]"),
        ({**TASKS, "tasks": [1, 2]}, r"tasks: expected different names with router='task', got \[1, 2\]"),
        ({**TASKS, "top_k": 0}, "top_k: expected an integer of at least 1, got 0"),
        ({**TASKS, "top_k": 5}, "top_k: expected an integer of at most 4, got 5"),
        ({**TASKS, "norm": "expert", "top_k": 2}, "top_k: expected an integer of at most 1, got 2"),
        ({**TASKS, "task_labels": {"a": []}}, "task_labels: expected lists of names for a, b, got {'a': "),
        ({**TASKS, "task_labels": {"a": ["x"], "b": "yz"}}, "task_labels: expected lists of names for a, b, got"),
        ({**TASKS, "task_labels": 0}, "task_labels: expected lists of names for a, b, got 0"),
    ],
)
def test_a_configuration_without_meaning_is_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        MoEConfig(**fields)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        MoEConfig.from_dict({"quant_method": "moebert", **fields})


def test_an_unknown_field_of_a_file_is_named():
    with pytest.raises(UserError, match=r"tail: expected a field of MoEConfig \(.*router.*\)"):
        MoEConfig.from_dict({"router": "switch", "tail": 1})


@pytest.mark.parametrize(
    "config",
    [
        MoEConfig.moebert(expert_dropout=0.2, route_padding=True),
        MoEConfig.mpoe(w1_factors=[[2, 2], [3, 2]], w2_factors=[[3, 2], [2, 2]], max_bond=[2]),
        MoEConfig.switch(router_options={"capacity_factor": 1.25}, load_balance=0.1),
        MoEConfig.task({"b": ["no", "yes"], "a": []}, top_k=1, norm="expert"),
        MoEConfig.task(["a", "b"]),
    ],
    ids=["moebert", "mpoe", "switch", "heads", "tasks"],
)
def test_survives_json(config):
    again = MoEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_what_a_model_says_of_its_mixtures():
    assert moe_config(None) is None
    for kind in kinds.KINDS:
        net = kinds.model(kind)
        config = moe_config(net.config)
        assert config is net.config.quantization_config
        assert config.is_learned == (kind in kinds.LEARNED) and config.is_hash_routed == (kind in kinds.HASHED)
        assert config.is_task_routed == kind.endswith("task")
        assert config.balance_weight == (0.01 if kind in kinds.LEARNED else 0.0)
        assert config.experts_per_token == (2 if kind.endswith(("top2", "task")) else 1)


def test_a_task_has_a_number_and_outputs():
    config = MoEConfig.task({"b": ["no", "yes"], "a": []})
    assert (config.task_id("a"), config.outputs_per_task) == (1, [2, 1])
    with pytest.raises(UserError, match="task: expected one of the model's tasks, b, a, got 'c'"):
        config.task_id("c")
    with pytest.raises(UserError, match=r"task: expected one of the model's tasks, none \(router='hash-random'\), got"):
        MoEConfig().task_id("c")
