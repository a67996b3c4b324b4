"""A converted model in any caller, and other ways of loading; see `tests/layers/test_calls.py` for more calls."""

import inspect
import os
import subprocess
import sys
import threading

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from moebert_kernels.convert import convert_to_moe
from moebert_kernels.layers import MoEConfig, balance_losses, moe_layers
from moebert_kernels.layers.routing import CHUNKS_ARE_TRACED
from tests.convert.families import make, make_inputs
from tests.convert.test_sites import KINDS, assert_near, converted, hidden
from tests.helpers import ROOT


@pytest.mark.parametrize("kind", ["hash", "gate"])
def test_every_way_to_call_it(kind):
    model = converted("bert", kind, AutoModelForSequenceClassification)
    inputs = make_inputs("bert")
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(model.forward(**inputs).logits, expected)  # sentence-transformers calls it so
        assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, expected)
        assert torch.equal(model(**inputs, return_dict=False)[0], expected)
        encoded = model.bert.forward(**inputs)
        assert torch.equal(model.classifier(encoded.pooler_output), expected)


@pytest.mark.slow
def test_the_second_forward_of_a_thread_runs_what_the_first_one_compiled():
    torch.compiler.reset()
    model, inputs, outputs = converted("bert"), make_inputs("bert"), []
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    run = threading.Thread(target=lambda: outputs.extend(hidden(compiled, inputs) for _ in range(2)))
    torch._dynamo.utils.counters.clear()
    run.start()
    run.join()
    assert len(outputs) == 2 and torch.equal(*outputs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(not CHUNKS_ARE_TRACED, reason="this torch cannot trace it, so models are without")
@pytest.mark.parametrize("family", ["bert", "megatron-bert"])
def test_a_feed_forward_in_chunks_is_the_model_s_own(family):
    """transformers inspects the function in each forward; ours tells its signature without being inspected."""
    model = converted(family)
    layer = model.encoder.layer[0]
    known, own = layer.feed_forward_chunk, type(layer).__mro__[1].feed_forward_chunk
    assert known.__signature__ == inspect.signature(own)
    assert inspect.signature(known) == inspect.signature(own.__get__(layer))
    expected = hidden(model, make_inputs(family))
    for layer in model.encoder.layer:
        layer.__class__ = type(layer).__mro__[1]
    assert torch.equal(hidden(model, make_inputs(family)), expected)


def test_a_call_inside_a_call():
    """A forward of another converted model from within a layer does not disturb the outer one."""
    outer, inner = converted("bert"), converted("gpt2")
    inputs = make_inputs("bert")
    other = {name: t.flip(1)[:, :-3] for name, t in inputs.items()}
    expected = hidden(outer, inputs)
    outer.encoder.layer[0].register_forward_hook(lambda *_: (hidden(inner, other), None)[1])
    assert torch.equal(hidden(outer, inputs), expected)


def test_balance_losses_are_collected_on_request():
    model = converted("bert", "gate", AutoModelForSequenceClassification)
    batch = make_inputs("bert") | {"labels": torch.tensor([0, 1])}
    with balance_losses() as losses:
        pure = model(**batch).loss
    assert [loss.shape for loss in losses] == [torch.Size([]), torch.Size([])]
    torch.testing.assert_close(model(**batch).loss, pure + 0.01 * sum(losses))


def test_loads_sharded_in_another_dtype_and_from_a_subfolder(tmp_path):
    model, inputs = converted("bert"), make_inputs("bert")
    model.save_pretrained(tmp_path / "sub", max_shard_size="20KB")
    assert len(list((tmp_path / "sub").glob("*.safetensors"))) > 1
    loaded = AutoModel.from_pretrained(tmp_path, subfolder="sub", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert moe_layers(loaded)[0].router.table.dtype == torch.uint8
    assert_near(hidden(loaded, inputs).float(), hidden(model, inputs), 0.05)


@pytest.mark.slow
def test_a_new_process_loads_it_by_the_auto_class(tmp_path):
    inputs, expected = make_inputs("bert"), {}
    for kind in KINDS:
        model = converted("bert", kind, AutoModelForSequenceClassification)
        model.save_pretrained(tmp_path / kind)
        with torch.no_grad():
            expected[kind] = model(**inputs).logits
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch, moebert_kernels.convert\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "inputs = torch.load('inputs.pt')\n"
        "logits = {kind: Auto.from_pretrained(kind)(**inputs).logits.detach() for kind in sys.argv[1:]}\n"
        "torch.save(logits, 'logits.pt')\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, *KINDS], cwd=tmp_path, env=env, check=True)
    logits = torch.load(tmp_path / "logits.pt")
    for kind in KINDS:
        assert_near(logits[kind], expected[kind])


@pytest.mark.filterwarnings("ignore:no importance scores given")
def test_what_is_not_a_feed_forward_stays_the_same_object():
    model = make("bert", AutoModelForSequenceClassification)
    embeddings, attention = model.bert.embeddings, model.bert.encoder.layer[0].attention
    norm = model.bert.encoder.layer[0].output.LayerNorm
    moe = convert_to_moe(model, MoEConfig(norm="layer", expert_size=18, num_shared_neurons=8, router="gate-token"))
    assert moe is model
    assert moe.bert.embeddings is embeddings and moe.bert.encoder.layer[0].attention is attention
    assert moe.bert.encoder.layer[0].output.norm is norm
