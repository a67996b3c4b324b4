"""Forwards that are replayed, on a stand-in for CUDA's graphs; and that nothing in a routed forward waits for a GPU."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import GPT2Config, GPT2LMHeadModel

from moebert_kernels import graphs
from moebert_kernels.errors import UserError
from moebert_kernels.layers import moe_config, set_task
from moebert_kernels.serve import use_cuda_graphs
from tests.layers import kinds

BERT = "split-bert-hash"


@pytest.fixture
def models():
    """A model, and one with the same numbers whose forwards are replayed."""
    model = kinds.model(BERT)
    return model, use_cuda_graphs(copy.deepcopy(model))


@torch.no_grad()
def check(models, *batches):
    got = [models[1](**batch).logits for batch in batches]
    for batch, logits in zip(batches, got, strict=True):  # all at the end: no call may overwrite an earlier one's
        assert torch.equal(logits, models[0](**batch).logits)


def test_each_shape_has_a_graph_that_is_replayed_with_new_inputs(captures, models):
    check(models, *(kinds.batch(BERT, seed, length) for seed, length in ((0, 8), (1, 8), (2, 11), (3, 8))))
    assert captures == ["captured", "replayed", "replayed", "captured", "replayed", "replayed"]
    with torch.inference_mode():
        check(models, kinds.batch(BERT, 4, 8))
        assert torch.equal(models[1](kinds.batch(BERT)["input_ids"], return_dict=False)[0],
                           models[0](kinds.batch(BERT)["input_ids"]).logits)  # fmt: skip


def test_weights_may_change_in_place(captures, models):
    batch = kinds.batch(BERT)
    check(models, batch)
    for model in models:
        model.classifier.weight.data.mul_(2)
    check(models, batch)
    assert captures == ["captured", "replayed", "replayed"]


def test_each_task_has_a_graph(captures):
    plain = kinds.model("split-bert-task")
    model, batch = use_cuda_graphs(copy.deepcopy(plain)), kinds.batch("split-bert-task")
    batch.pop("task_ids", None)
    for task in list(moe_config(plain.config).tasks)[:2]:
        set_task(plain, task)
        set_task(model, task)
        check((plain, model), batch)
    assert captures.count("captured") == 2


def test_a_cache_in_the_outputs_is_not_shared_by_replays(captures):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model, ids = use_cuda_graphs(GPT2LMHeadModel(GPT2Config(**sizes)).eval()), torch.arange(5)[None]
    with torch.no_grad(), pytest.warns(UserWarning, match="pass use_cache=False"):
        first = model(input_ids=ids)
    with torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=first.past_key_values)
        assert model(input_ids=ids).past_key_values.get_seq_length() == 5
        batch = {"input_ids": ids, "use_cache": False}
        assert torch.equal(model(**batch).logits, model(**batch).logits) and captures[-1] == "replayed"


def test_gradients_and_training_run_as_before(captures, models):
    batch = kinds.batch(BERT, labels=True)
    models[1](**batch).loss.backward()
    assert models[1].classifier.weight.grad is not None
    with torch.no_grad():
        models[1].train()(**batch)
    assert captures == []


def test_what_cannot_be_captured_runs_after_one_warning(captures, models, monkeypatch):
    def refuse(run):
        raise RuntimeError("called a synchronizing operation\nand more")

    monkeypatch.setattr(graphs, "captured", refuse)
    wanted = "cuda graphs: expected a forward that can be replayed, got one that runs as before: called a synchronizing"
    with pytest.warns(UserWarning, match=f"^{wanted} operation$"):
        check(models, kinds.batch(BERT))
    with warnings.catch_warnings(action="error"):
        check(models, kinds.batch(BERT))


def test_shapes_beyond_the_most_run_as_before(captures):
    model = kinds.model(BERT)
    pair = model, use_cuda_graphs(copy.deepcopy(model), most=1)
    check(pair, kinds.batch(BERT))
    with pytest.warns(UserWarning, match="there are 1 graphs already; pad to fewer lengths"):
        check(pair, kinds.batch(BERT, length=9))
    with pytest.warns(UserWarning, match="an input is neither a tensor nor a plain value"), torch.no_grad():
        pair[1](**kinds.batch(BERT), unknown=[1])
    assert captures == ["captured", "replayed"]


def test_copies_have_no_graphs_yet(captures, models):
    check(models, kinds.batch(BERT))
    for other in (copy.deepcopy(models[1]), pickle.loads(pickle.dumps(models[1]))):
        check((models[0], other), kinds.batch(BERT))
    assert captures == ["captured", "replayed"] * 3
    assert use_cuda_graphs(models[1]).cuda_graphs._ready == {}


def test_refusals(monkeypatch):
    with pytest.raises(UserError, match="model: expected a model of transformers, got Linear"):
        use_cuda_graphs(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="model: expected all weights on one GPU, got them on cpu"):
        use_cuda_graphs(kinds.model(BERT))
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    for most in (0, True, 1.5):
        with pytest.raises(UserError, match=re.escape(f"most: expected an integer of at least 1, got {most!r}")):
            use_cuda_graphs(kinds.model(BERT), most)


@pytest.fixture
def poison_uninitialised_memory():
    """Off here: tensors without data have nothing to fill."""


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", [*kinds.SPLIT, "mpoe-bert-switch", "mpoe-gpt2-top2"])
def test_no_value_is_read_back_in_a_routed_forward(kind):
    """On tensors without data, which have no values to read, and no shapes that values decide."""
    model, mode = kinds.model(kind), FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        there = mode.from_tensor(tensor.detach())
                        is_parameter = tensors is module._parameters
                        tensors[name] = torch.nn.Parameter(there, requires_grad=False) if is_parameter else there
        batch = {name: mode.from_tensor(tensor) for name, tensor in kinds.batch(kind).items()}
        if "task_ids" in batch:
            batch["task_ids"] = 1  # a tensor is read back, to see whether all sequences are of one task
        logits = model(**batch).logits
        assert logits.shape[0] == 3
        with pytest.raises(DataDependentOutputException):
            logits.sum().item()


@pytest.mark.gpu
def test_on_a_gpu():
    pair = kinds.model(BERT).cuda(), use_cuda_graphs(kinds.model(BERT).cuda())
    batches = [{name: t.cuda() for name, t in kinds.batch(BERT, seed, 8).items()} for seed in range(3)]
    with warnings.catch_warnings(action="error"):
        check(pair, *batches)
    assert list(pair[1].cuda_graphs._ready.values()) != [None]
