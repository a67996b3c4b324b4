"""Importance on disk: ours and the original code's files, whole and damaged."""

import pickle

import numpy as np
import pytest
import torch

from moebert_kernels import files
from moebert_kernels.convert import importance_scores, load_importance, model_fingerprint, save_importance
from moebert_kernels.errors import UserError
from tests.convert.models import D, L, dense_model


@pytest.fixture
def model():
    return dense_model("bert-cls")


FACTS = {"data": "reviews.csv", "split": "train", "task": "sst2"}


def test_round_trip(tmp_path, model):
    scores, path = torch.rand(L, D), tmp_path / "new" / "importance.safetensors"
    save_importance(path, scores, model=model, **FACTS, samples=1200)
    got, metadata = load_importance(path, model)
    assert torch.equal(got, scores)
    assert metadata.items() >= (FACTS | {"samples": "1200", "fingerprint": model_fingerprint(model)}).items()
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_fingerprint_sees_one_weight(model):
    before = model_fingerprint(model)
    assert model_fingerprint(dense_model("bert-cls")) == before
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    assert model_fingerprint(model) != before


def test_warns_of_another_model(tmp_path, model):
    save_importance(tmp_path / "i.safetensors", torch.rand(L, D), model=model, **FACTS)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    with pytest.warns(UserWarning, match="was scored with another model"):
        load_importance(tmp_path / "i.safetensors", model)


def original_scores():
    """Scores with ties, and the ranks of an unstable sort, as the original's files hold them."""
    ordered = np.array([[5.0, 2.0, 2.0, 2.0, 0.5]], dtype=np.float32)
    return ordered, np.array([[3, 4, 0, 2, 1]])


def test_reads_the_authors_arrays_in_their_order(tmp_path):
    ordered, rank = original_scores()
    np.savez(tmp_path / "i.npz", importance_sorted=ordered, rank=rank.astype(np.uint16))
    scores = load_importance(tmp_path / "i.npz").scores
    assert scores.argsort(descending=True, stable=True).tolist() == rank.tolist()
    assert torch.allclose(scores.sort(descending=True).values, torch.from_numpy(ordered), rtol=1e-6)


def test_reads_the_originals_pickles(tmp_path):
    ordered, rank = original_scores()
    (tmp_path / "importance.pkl").write_bytes(pickle.dumps({"importance": ordered.tolist(), "idx": rank.tolist()}))
    scores = load_importance(tmp_path / "importance.pkl").scores
    assert scores.argsort(descending=True, stable=True).tolist() == rank.tolist()
    (tmp_path / "importance_0.pkl").write_bytes(pickle.dumps([[0.5, 1.0], [2.0, 0.0]]))
    assert load_importance(tmp_path / "importance_0.pkl").scores.tolist() == [[0.5, 1.0], [2.0, 0.0]]


def test_a_pickle_runs_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return (print, ("run",))

    (tmp_path / "importance.pkl").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(UserError, match=r"expected a pickle of plain lists and numbers, .*builtins.print"):
        load_importance(tmp_path / "importance.pkl")


def test_rejects(tmp_path, model):
    good = tmp_path / "i.safetensors"
    with pytest.raises(UserError, match=r"importance: expected a file, got .*, which does not exist"):
        load_importance(good)
    with pytest.raises(UserError, match="importance: expected scores of the model's 2 layers x 48 neurons, got 2 x 47"):
        save_importance(good, torch.rand(L, D - 1), model=model, **FACTS)
    save_importance(good, torch.rand(L, D), model=model, **FACTS)
    whole = good.read_bytes()
    good.write_bytes(whole[:-8])
    with pytest.raises(UserError, match="importance: expected a whole safetensors file"):
        load_importance(good)
    good.write_bytes(whole)
    with pytest.raises(UserError, match="importance: expected scores of the model's 2 layers x 40 neurons, got 2 x 48"):
        load_importance(good, dense_model("bert-cls", intermediate_size=40))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"importance: expected a file of `save_importance`"):
        load_importance(tmp_path / "model.safetensors")
    np.savez(tmp_path / "i.npz", importance_sorted=np.ones((1, 3)), rank=np.zeros((1, 3)))
    with pytest.raises(UserError, match="the ranks are not permutations"):
        load_importance(tmp_path / "i.npz")
    (tmp_path / "i.npz").write_bytes((tmp_path / "i.npz").read_bytes()[:100])
    with pytest.raises(UserError, match="importance: expected arrays importance_sorted and rank"):
        load_importance(tmp_path / "i.npz")


def test_a_failed_write_keeps_the_file_before(tmp_path, model, monkeypatch):
    path = tmp_path / "i.safetensors"
    save_importance(path, torch.zeros(L, D), model=model, **FACTS)
    (tmp_path / "taken").mkdir()
    monkeypatch.setattr(files, "_temporary", lambda path: tmp_path / "taken")
    with pytest.raises(UserError, match="path: expected a file that can be written"):
        save_importance(path, torch.ones(L, D), model=model, **FACTS)
    assert load_importance(path).scores.sum() == 0


def test_what_is_saved_is_what_was_scored(tmp_path, model):
    batch = {"input_ids": torch.randint(2, 60, (2, 9)), "labels": torch.tensor([0, 2])}
    scores = importance_scores(model, [batch])
    save_importance(tmp_path / "i.safetensors", scores, model=model, **FACTS)
    assert torch.equal(load_importance(tmp_path / "i.safetensors", model).scores, scores)
