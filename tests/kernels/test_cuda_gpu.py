"""What of the CUDA forms only a GPU can show: sizes past one block, layers at once, kernels that overlap, replays."""

import pytest
import torch

from moebert_kernels import backend, fused_moe_ffn_add_norm, group_tokens, group_tokens_by_hash, reference
from tests.backends import CUDA_FORMS, cuda_runs, why_not_built
from tests.helpers import assert_as_accurate
from tests.ops.cases import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and not cuda_runs("group_tokens"),
        reason=why_not_built("group_tokens") or "this GPU or its driver cannot run moebert_kernels._C: moebert doctor",
    ),
]


@pytest.fixture(autouse=True)
def on_the_gpu():
    torch.set_default_device("cuda")
    with backend.use_backend("cuda", strict=True):
        yield
    torch.set_default_device(None)


def same(got, wanted):
    for name in ("offsets", "row_to_assignment", "assignment_to_row"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name


def small_or_large(values, largest_small):
    return [pytest.param(value, id=f"{'small' if value <= largest_small else 'large'}-{value}") for value in values]


def test_every_form_that_this_gpu_can_run_is_tested():
    hopper = torch.cuda.get_device_capability()[0] == 9
    for op in CUDA_FORMS:
        assert cuda_runs(op) or (op == "expert_gemm" and not hopper), op


@pytest.mark.parametrize("experts", [1, 4, 33, 64, 65, 255, 1024])
@pytest.mark.parametrize("tokens", small_or_large([0, 1, 33, 1025, 4097, 16384, 16385, 24577, 100_003], 1025))
def test_group_tokens(tokens, experts):
    """One block up to 16,384 tokens, look-back beyond; counters in registers up to 64 experts, in memory beyond."""
    for ids in (
        torch.randint(-1, experts + 1, (tokens,)),
        torch.full((tokens,), experts - 1),
        torch.randint(0, experts, (tokens,)).square() // experts,
    ):
        same(group_tokens(ids, experts), reference.group_tokens(ids, experts))
    ids = torch.randint(-1, experts + 1, (2, tokens)).t()
    same(group_tokens(ids, experts), reference.group_tokens(ids, experts))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocabulary, dtype", [(30522, torch.uint8), (70_000, torch.int32), (1000, torch.int64)])
@pytest.mark.parametrize("tokens", small_or_large([0, 128, 1000, 16384, 40_000], 1000))
def test_twelve_layers_by_hash(tokens, vocabulary, dtype, masked):
    experts = 4
    tables = torch.randint(0, experts, (12, vocabulary)).to(dtype)
    token_ids = torch.randint(-3, vocabulary + 3, (tokens,))
    mask = torch.randint(0, 2, (tokens,)) if masked else None
    wanted = reference.group_tokens_by_hash(token_ids, tables, experts, mask)
    for got, layer in zip(group_tokens_by_hash(token_ids, tables, experts, mask), wanted, strict=True):
        same(got, layer)


def test_look_back_is_the_same_a_hundred_times_on_busy_streams():
    tables, token_ids = torch.randint(0, 64, (12, 30522)), torch.randint(0, 30522, (50_000,))
    wanted = reference.group_tokens_by_hash(token_ids, tables, 64)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    for _ in range(25):
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(group_tokens_by_hash(token_ids, tables, 64))
        torch.cuda.synchronize()
        for layers in found:
            for got, layer in zip(layers, wanted, strict=True):
                same(got, layer)


@pytest.mark.parametrize("tokens", [128, 16384, 40_000])
def test_a_captured_grouping_replays_with_new_ids(tokens):
    tables, token_ids = torch.randint(0, 4, (12, 30522)).to(torch.uint8), torch.randint(0, 30522, (tokens,))
    group_tokens_by_hash(token_ids, tables, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = group_tokens_by_hash(token_ids, tables, 4)
    for _ in range(3):
        token_ids.random_(-5, 30530)
        graph.replay()
        for got, wanted in zip(captured, reference.group_tokens_by_hash(token_ids, tables, 4), strict=True):
            same(got, wanted)


def expert_inputs(tokens, hidden, experts=5, width=24):
    shapes = [(tokens, hidden), (experts, width, hidden), (experts, width), (experts, hidden, width), (experts, hidden)]
    scales = [1, hidden**-0.5, 1, width**-0.5, 1]
    made = [torch.randn(shape) * scale for shape, scale in zip(shapes, scales, strict=True)]
    return [*made, 1 + 0.1 * torch.randn(experts, hidden), torch.randn(experts, hidden), torch.rand(tokens)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", small_or_large([8, 97, 264, 768], 264))
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_moebert_expert_of_more_tokens_than_tiny_ffn_takes(hidden, dtype, p):
    """On Hopper by its GEMMs, where sizes and dtype allow; elsewhere Triton's kernels run."""
    tokens = 700
    ids = torch.randint(-1, 5, (tokens,))
    ids[ids == 3] = 0  # an expert without rows
    inputs, dy = expert_inputs(tokens, hidden), torch.randn(tokens, hidden)
    constants = {"eps": 1e-5, "dropout_p": p, "dropout_seed": torch.tensor(2**40 + 3)}

    def call(op):
        return lambda x, *rest: op(x, ids, *rest[:-1], routing_weights=rest[-1], **constants)

    got = run(call(fused_moe_ffn_add_norm), inputs, dy, dtype)
    plain = run(call(reference.fused_moe_ffn_add_norm), inputs, dy, dtype)
    inputs = [t.to(dtype) for t in inputs]
    exact = run(call(reference.fused_moe_ffn_add_norm), inputs, dy.to(dtype), torch.float64)
    for i, tensors in enumerate(zip(got, plain, exact, strict=True)):
        assert_as_accurate(*tensors, name=str(i))


def test_the_moebert_expert_is_the_same_fifty_times():
    """The second GEMM starts while the first one runs."""
    ids, inputs, dy = torch.randint(-1, 5, (3000,)), expert_inputs(3000, 768), torch.randn(3000, 768)

    def once():
        call = lambda x, *rest: fused_moe_ffn_add_norm(x, ids, *rest[:-1], routing_weights=rest[-1])  # noqa: E731
        return run(call, inputs, dy, torch.bfloat16)

    first = once()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))
