"""Checkpoints of the original code: every form on disk, and what is refused. What they compute: test_golden_models."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, BertForQuestionAnswering, BertForSequenceClassification

from moebert_kernels.convert import from_original
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_layers
from tests.convert.models import dense_model
from tests.golden_arrays import golden
from tests.helpers import assert_same_model

# what the original's config.json holds beside BERT's fields
CONFIG = {
    "model_type": "bert", "architectures": ["MoEBertForSequenceClassification"], "vocab_size": 60, "hidden_size": 16,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 20,
    "id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2},
    "transformers_version": "4.4.2", "moebert": "moe", "moebert_distill": 5.0, "moebert_expert_dim": 12,
    "moebert_expert_dropout": 0.1, "moebert_expert_num": 4, "moebert_load_balance": 0.0, "moebert_load_experts": False,
    "moebert_load_importance": "importance.pkl", "moebert_route_hash_list": None,
    "moebert_route_method": "hash-random", "moebert_share_importance": 6,
}  # fmt: skip


@pytest.fixture
def state():
    """As the original saves it: with the teacher inside, and the position ids."""
    arrays = golden("f_model_cls_hash")
    student = {key.removeprefix("student."): array for key, array in arrays.items() if key.startswith("student.")}
    teacher = {key: array for key, array in arrays.items() if key.startswith("teacher.")}
    return student | teacher | {"bert.embeddings.position_ids": torch.arange(20)[None]}


@pytest.fixture
def tables():
    return golden("f_model_cls_hash")["hash_lists"]


def write_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def write_shards(folder, state, suffix, save):
    names = sorted(state)
    files = [f"{suffix.split('.')[0]}-0000{n}-of-00002.{suffix.split('.')[1]}" for n in (1, 2)]
    weight_map = {name: files[n % 2] for n, name in enumerate(names)}
    for file in files:
        save({name: state[name].clone() for name in names if weight_map[name] == file}, folder / file)
    (folder / f"{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


FORMS = {
    "bin": lambda folder, state: torch.save(state, folder / "pytorch_model.bin"),
    "safetensors": lambda folder, state: save_file(state, folder / "model.safetensors"),
    "bin shards": lambda folder, state: write_shards(folder, state, "pytorch_model.bin", torch.save),
    "safetensors shards": lambda folder, state: write_shards(folder, state, "model.safetensors", save_file),
}


@pytest.mark.parametrize("form", FORMS)
def test_reads_every_form(form, state, tables, tmp_path):
    write_config(tmp_path)
    FORMS[form](tmp_path, state)
    model = from_original(tmp_path, hash_tables=tables)
    wanted = from_original(state, CONFIG, hash_tables=tables)
    assert all(torch.equal(tensor, wanted.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_configuration_is_carried_over(state, tables):
    model = from_original(state, CONFIG, hash_tables=tables)
    assert isinstance(model, BertForSequenceClassification) and not model.training
    moe = model.config.quantization_config
    assert (moe.num_experts, moe.expert_size, moe.num_shared_neurons, moe.router) == (4, 12, 6, "hash-random")
    assert (moe.expert_dropout, model.config.id2label) == (0.1, {0: "no", 1: "maybe", 2: "yes"})
    assert model.config.model_type == "bert" and moe_layers(model)[0].experts.output_dropout == 0.1
    assert not any(name.startswith("moebert") for name in model.config.to_dict())
    routing = from_original(state, CONFIG, hash_tables=tables, route_padding=True)
    assert routing.config.quantization_config.route_padding


def test_an_imported_model_saves_and_loads(state, tables, tmp_path):
    model = from_original(state, CONFIG, hash_tables=tables)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.randint(0, 60, (2, 9))
    assert_same_model(again, model, lambda model: model(ids).logits)


def test_question_answering(state, tables):
    qa = {key: tensor for key, tensor in state.items() if "classifier" not in key and "pooler" not in key}
    qa |= {"qa_outputs.weight": torch.randn(2, 16), "qa_outputs.bias": torch.randn(2)}
    config = {key: value for key, value in CONFIG.items() if key not in ("id2label", "label2id")}
    model = from_original(qa, config, hash_tables=tables)
    assert isinstance(model, BertForQuestionAnswering)
    assert model(torch.randint(0, 60, (2, 9))).start_logits.shape == (2, 9)


def test_missing_random_tables_are_drawn_by_seed_with_a_warning(state):
    with pytest.warns(UserWarning, match="does not save its random hash tables: new ones are drawn"):
        first = from_original(state, CONFIG, seed=5)
    with pytest.warns(UserWarning):
        again = from_original(state, CONFIG, seed=5)
    for a, b in zip(moe_layers(first), moe_layers(again), strict=True):
        assert torch.equal(a.router.table, b.router.table)


def test_a_pickled_balance_table(state, tmp_path):
    """The original's list mixes numpy integers (its argmin) with plain ones (its random draws)."""
    path = tmp_path / "balance_hash_bucket_4_rte.pkl"
    table = [np.argmin(np.array([3, 1, 2])) if token % 2 else token % 4 for token in range(60)]
    path.write_bytes(pickle.dumps(table))
    model = from_original(state, CONFIG, hash_tables=path, router="hash-balance")
    assert [layer.router.table.tolist() for layer in moe_layers(model)] == [[int(e) for e in table]] * 2
    with pytest.raises(UserError, match="hash_tables: expected the table"):
        from_original(state, CONFIG, router="hash-balance")


def test_rejects_checkpoints(state, tables, tmp_path):
    with pytest.raises(UserError, match=r"checkpoint: expected a folder with one of model.safetensors"):
        from_original(tmp_path, CONFIG)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"config: expected the original's config.json, got"):
        from_original(tmp_path)
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="checkpoint: expected a whole weights file"):
        from_original(tmp_path, CONFIG)
    with pytest.raises(UserError, match="config: expected the original's configuration with a state dict"):
        from_original(state)
    with pytest.raises(UserError, match="checkpoint: expected experts of the original MoEBERT, got none"):
        from_original(dense_model("bert-cls").state_dict(), CONFIG)
    with pytest.raises(UserError, match=r"tables: expected shape .* for a vocabulary of 60"):
        from_original(state, CONFIG, hash_tables=tables[:, :-1])
    with pytest.raises(UserError, match="router: expected one that fits a checkpoint with no gates, got 'gate-token'"):
        from_original(state, CONFIG, router="gate-token")
    with pytest.raises(UserError, match="config: expected 3 labels as in the checkpoint, got 2"):
        from_original(state, CONFIG | {"id2label": {"0": "a", "1": "b"}}, hash_tables=tables)


@pytest.mark.parametrize("missing", ["experts.experts.2.fc2.bias", "attention.self.query.weight"])
def test_rejects_missing_tensors(missing, state, tables):
    key = f"bert.encoder.layer.1.{missing}"
    del state[key]
    with pytest.raises(UserError, match=r"expected whole, equal experts in layer 1, got 2|attention.self.query.weight"):
        from_original(state, CONFIG, hash_tables=tables)


def test_runs_no_pickled_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (print, ("run",))

    write_config(tmp_path)
    torch.save({"bert.x": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="checkpoint: expected a whole weights file"):
        from_original(tmp_path)
