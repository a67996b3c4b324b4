"""Attention by the kernel: against torch's in float64, what it leaves to torch, and which models get it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from moebert_kernels.serve import describe, prepare, tiles
from moebert_kernels.serve.tiles import attention as kernel
from moebert_kernels.serve.tiles import attention_kernel
from moebert_kernels.serve.tiles.attention import NAME, attend, attention
from tests.convert.families import make, make_inputs
from tests.helpers import assert_as_accurate
from tests.serve.emulated import run_by

DTYPES = (torch.float32, torch.bfloat16)
WAYS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]


@pytest.fixture(autouse=True)
def here(request, monkeypatch):
    """Where the kernel runs in the test's dtype, by AMX if the test says so."""
    asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    dtype = asked.get("dtype")
    wants_bfloat16 = dtype is torch.bfloat16 or "bfloat16" in str(dtype)
    if isinstance(reason := attention_kernel(torch.bfloat16 if wants_bfloat16 else torch.float32), str):
        pytest.skip(reason)
    if "amx" in asked and dtype is torch.bfloat16:
        run_by(asked["amx"], "bfloat16", monkeypatch)
        monkeypatch.setattr(kernel, "attention_kernel", attention_kernel.__wrapped__)


class Layer(nn.Module):
    """Of attention, as far as a function of attention asks."""

    is_causal = False


def heads(dtype, B=2, T=19, S=19, h=3, D=24, seed=0):
    """q, k, v as layers have them: (B, T, h D), seen as (B, h, T, D)."""
    torch.manual_seed(seed)
    shapes = ((B, T, h, D), (B, S, h, D), (B, S, h, D))
    return [torch.randn(shape).mul(1.5).to(dtype).transpose(1, 2) for shape in shapes]


def torchs(q, k, v, mask=None, scale=None):
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


SIZES = [(1, 1, 1, 1, 64), (2, 16, 16, 2, 64), (2, 33, 33, 2, 40), (1, 7, 50, 4, 96), (3, 130, 129, 1, 80)]
SIZES += [(1, 64, 31, 2, 7), (1, 300, 300, 2, 128)]


@pytest.mark.parametrize("dtype, amx", WAYS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("masked", [None, "keys", "heads", "one row", "of queries", "apart"])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_float64(dtype, amx, sizes, masked, biased):
    B, T, S, h, D = sizes
    q, k, v = heads(dtype, B, T, S, h, D)
    shapes = {"keys": (B, 1, 1, S), "heads": (B, h, T, S), "of queries": (B, 1, T, 1), "apart": (1, 1, T, 2 * S)}
    mask = None if masked is None else torch.rand(shapes.get(masked, (1, 1, T, S))) > 0.4
    if mask is not None:
        mask = mask[..., ::2] if masked == "apart" else mask
        mask[..., 0] = True  # some key counts
    bias = torch.randn(1, h, T, S).to(dtype) if biased else None

    def torchs(q, k, v):
        added = bias
        if mask is not None:
            zero = torch.zeros(1, dtype=q.dtype) if bias is None else bias.to(q.dtype)
            added = torch.where(mask, zero, float("-inf")).to(q.dtype)
        return scaled_dot_product_attention(q, k, v, attn_mask=None if added is None else added.to(q.dtype))

    got = attend(q, k, v, mask, bias, D**-0.5)
    assert got.is_contiguous() and got.dtype == dtype
    want, rounded = torchs(q.double(), k.double(), v.double()), torchs(q, k, v)
    assert_as_accurate(got, rounded.transpose(1, 2), want.transpose(1, 2), "y")
    if bias is None:
        torch.testing.assert_close(attention(Layer(), q, k, v, mask)[0], got, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_layouts(dtype):
    q, _, v = heads(dtype)
    apart = torch.randn(2, 3, 19, 48).to(dtype)[..., ::2]  # numbers that do not lie side by side
    got = attention(Layer(), q.contiguous(), apart, v, None, scaling=0.7)[0]
    want = torchs(*(x.double() for x in (q, apart, v)), scale=0.7)
    assert_as_accurate(got, torchs(q, apart, v, scale=0.7), want, "y")


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_keys_and_numbers_that_are_none(dtype):
    q, k, v = heads(dtype)
    mask = torch.ones(2, 1, 19, 19, dtype=torch.bool)
    mask[0, :, 3] = False
    q[1, 2, 5] = float("nan")
    got = attention(Layer(), q, k, v, mask)[0]
    assert not got[0, 3].any()
    assert got[1, 5, 2].isnan().all() and int(got.isnan().sum()) == 24
    # keys that do not count may be anything
    k[:, :, 17:], v[:, :, 17:], q[1, 2, 5] = float("inf"), 0, 1
    assert attention(Layer(), q, k, v, mask & (torch.arange(19) < 17))[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype):
    q, k, v = heads(dtype, B=4, T=70, S=70)
    torch.set_num_threads(1)
    want = attention(Layer(), q, k, v, None)[0]
    torch.set_num_threads(5)
    torch.testing.assert_close(attention(Layer(), q, k, v, None)[0], want, rtol=0, atol=0)


def causal():
    module = Layer()
    module.is_causal = True
    return module


OTHERS = {
    "causal": lambda q, k, v: attention(causal(), q, k, v, None),
    "dropout": lambda q, k, v: attention(Layer(), q, k, v, None, dropout=1e-30),
    "a float mask": lambda q, k, v: attention(Layer(), q, k, v, torch.zeros(2, 1, 19, 19)),
    "a bias": lambda q, k, v: attention(Layer(), q, k, v, None, position_bias=torch.zeros(2, 3, 19, 19)),
    "float64": lambda q, k, v: attention(Layer(), q.double(), k.double(), v.double(), None),
    "values of another size": lambda q, k, v: attention(Layer(), q, k, v[..., :8], None),
    "gradients": lambda q, k, v: attention(Layer(), q.requires_grad_(), k, v, None),
}


@pytest.mark.parametrize("other", OTHERS)
def test_leaves_to_torch(other, monkeypatch):
    def refused(*_):
        raise AssertionError("the kernel was called")

    monkeypatch.setattr(kernel, "attention_kernel", lambda _: (refused, False))
    q, k, v = heads(torch.float32)
    got = OTHERS[other](q, k, v)[0]
    if other == "causal":
        want = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    else:
        want = torchs(q, k, v[..., :8] if other == "values of another size" else v)
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)
    if other == "gradients":
        got.sum().backward()
        assert q.grad is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_and_fake_ones_are_torchs():
    q, k, v = heads(torch.float32)
    traced = torch.jit.trace(lambda *x: attention(Layer(), *x, None)[0], (q, k, v))
    assert "scaled_dot_product_attention" in str(traced.graph)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert attention(Layer(), *map(mode.from_tensor, (q, k, v)), None)[0].shape == (2, 19, 3, 24)
        mask = mode.from_tensor(torch.ones(2, 1, 19, 19, dtype=torch.bool))
        assert isinstance(attention(Layer(), q, k, v, mask)[0], FakeTensor)  # a mask without memory alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int8-bfloat16"])
def test_prepared_encoders_have_it(dtype, tmp_path):
    model = prepare(make("bert", AutoModelForSequenceClassification), dtype)
    assert model.config._attn_implementation == NAME
    assert "attention: tiles" in describe(model)
    inputs = make_inputs("bert")
    want = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    for other in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert other.config._attn_implementation == NAME
        torch.testing.assert_close(other(**inputs).logits, want, rtol=0.02, atol=1e-3)  # engines may be others


def test_models_of_one_configuration_and_compiled_ones():
    """Only the prepared one has the name in its configuration. A graph of a whole call has torch's attention."""
    before = make("bert")
    other = type(before)(before.config).eval()
    prepared = prepare(before, "float32")
    assert other.config._attn_implementation == "sdpa" and prepared.config._attn_implementation == NAME
    assert {id(m.config) for m in prepared.modules() if hasattr(m, "config")} == {id(prepared.config)}
    q, k, v = heads(torch.float32)
    whole = torch.compile(lambda *x: attention(Layer(), *x, None)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(q, k, v), torchs(q, k, v))


def test_models_that_keep_theirs(monkeypatch):
    for family in ("gpt2", "llama", "bart", "t5-v1_1"):  # with a decoder
        before = make(family).config._attn_implementation
        assert prepare(make(family), "float32").config._attn_implementation == before
    writes = make("bert", AutoModelForCausalLM)  # without a causal mask
    assert writes.can_generate() and prepare(writes, "float32").config._attn_implementation == "sdpa"
    own = make("bert")
    own.set_attn_implementation("eager")
    assert prepare(own, "float32").config._attn_implementation == "eager"
    monkeypatch.setenv(tiles.SWITCH, "0")
    switched_off = prepare(make("bert"), "float32")
    assert switched_off.config._attn_implementation == "sdpa"
    assert "attention" not in describe(switched_off)


def test_mpnets_weights_of_attention_are_its_own():
    inputs, model = make_inputs("mpnet"), make("mpnet")
    want = model(**inputs, output_attentions=True)
    prepared = prepare(model, "float32")
    assert "attention: tiles" in describe(prepared)
    got = prepared(**inputs, output_attentions=True)
    torch.testing.assert_close(got.attentions, want.attentions, rtol=1e-4, atol=1e-6)
    counted = inputs["attention_mask"] != 0
    torch.testing.assert_close(prepared(**inputs)[0][counted], want[0][counted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert", "mpnet", "vit"])
def test_families_call_it(family, monkeypatch):
    """Their outputs are those of `test_prepare`; here the kernel has to be what gives them."""
    run, amx = attention_kernel(torch.float32)
    calls = []
    monkeypatch.setattr(kernel, "attention_kernel", lambda _: (lambda call: (calls.append(1), run(call)), amx))
    model = prepare(make(family, AutoModel), "float32")
    model(**make_inputs(family))
    assert len(calls) == model.config.num_hidden_layers
