import pytest
import torch

from moebert_kernels import mpo_expert_weights, reference
from tests.helpers import assert_as_accurate
from tests.ops.cases import DTYPES, slack, widest

EXPERTS = 3
# name: row factors, column factors, bonds, position of the central tensor
SHAPES = {
    "five": ((2, 2, 1, 3, 2), (3, 2, 2, 1, 3), (1, 6, 20, 17, 5, 1), None),  # two tiles each way
    "tiles": ((5, 2, 2, 3, 4), (2, 2, 1, 3, 1), (1, 7, 40, 36, 9, 1), None),  # three
    "two": ((1, 4), (2, 5), (1, 7, 1), None),
    "three_at_the_left_end": ((2, 3, 2), (1, 2, 2), (1, 5, 6, 1), 0),
    "three_at_the_right_end": ((2, 3, 2), (2, 2, 1), (1, 5, 6, 1), 2),
    "four_off_centre": ((2, 2, 3, 1), (1, 3, 1, 2), (1, 2, 5, 3, 1), 1),
    "ones": ((1, 1, 1), (1, 1, 1), (1, 1, 1, 1), None),
}


def sites(shape, dtype=torch.float32):
    """Position of the central tensor, it and the auxiliary ones: products of O(1), offset so that no site is lost."""
    rows, columns, bonds, position = SHAPES[shape]
    position = (len(rows) - 1) // 2 if position is None else position
    tensors = [
        torch.randn(*(() if k == position else (EXPERTS,)), bonds[k], rows[k], columns[k], bonds[k + 1]).to(dtype)
        / bonds[k] ** 0.5
        for k in range(len(rows))
    ]
    return position, [tensors.pop(position), *tensors]


def run(function, tensors, dw, dtype, wanted=None, **constants):
    """[w, gradients of the wanted tensors (all)] of copies in `dtype`."""
    wanted = range(len(tensors)) if wanted is None else wanted
    copies = [t.detach().to(dtype).requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    w = function(copies[0], copies[1:], **constants)
    return [w, *torch.autograd.grad(w, [copies[k] for k in wanted], dw.to(dtype))]


def output_gradient(shape):
    rows, columns, *_ = SHAPES[shape]
    return torch.randn(EXPERTS, torch.tensor(rows).prod(), torch.tensor(columns).prod())


@pytest.mark.parametrize("counts", [None, (3, 0, 2), (0, 0, 0)], ids=["all", "one_empty", "nobody"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(counts, dtype):
    compare("five", counts, dtype)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "five"])
def test_shapes(shape):
    compare(shape, (3, 0, 2), torch.float32)


def compare(shape, counts, dtype):
    position, tensors = sites(shape, dtype)
    dw = output_gradient(shape).to(dtype)
    offsets = None if counts is None else torch.tensor([0, *counts]).cumsum(0).int()
    constants = {"offsets": offsets, "central_site": position}
    got = run(mpo_expert_weights, tensors, dw, dtype, **constants)
    same = run(reference.mpo_expert_weights, tensors, dw, dtype, **constants)
    exact = run(reference.mpo_expert_weights, tensors, dw, torch.float64, **constants)
    names = ("w", "dcentral", *(f"daux{k}" for k in range(len(tensors) - 1)))
    for name, *three in zip(names, got, same, exact, strict=True):
        if dtype == torch.float64:  # the reference is exact by definition; sums of another order differ by some eps
            torch.testing.assert_close(three[0], three[2], rtol=0, atol=1e-14 * float(three[2].detach().abs().max()))
        else:
            assert_as_accurate(*three, name=name, factor=slack(dtype))
    if counts is not None:
        assert not got[0][1].any() and not got[2][1].any()  # the second expert has nobody


def test_the_middle_is_the_default_and_inference_equals_training():
    position, tensors = sites("five")
    with torch.no_grad():
        inference = mpo_expert_weights(tensors[0], tensors[1:])
    trained = mpo_expert_weights(tensors[0].requires_grad_(), tensors[1:], central_site=position)
    assert torch.equal(inference, trained)


def test_gradcheck():
    position, tensors = sites("four_off_centre", torch.float64)
    offsets = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda c, *aux: mpo_expert_weights(c, aux, offsets=offsets, central_site=position),
        [t.requires_grad_() for t in tensors],
    )


@pytest.mark.parametrize("wanted", [(0,), (1,), (4,), (1, 2, 3, 4), (0, 3, 4), (0, 1, 2)], ids=str)
def test_tensors_without_gradient_leave_the_others_alone(wanted):
    position, tensors = sites("five")
    dw = output_gradient("five")
    got = run(mpo_expert_weights, tensors, dw, widest(), wanted, central_site=position)
    exact = run(reference.mpo_expert_weights, tensors, dw, torch.float64, wanted, central_site=position)
    for tensor, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(tensor.double(), truth, rtol=1e-5, atol=1e-4)


def gemm_flops(tensors, wanted):
    from torch.utils.flop_counter import FlopCounterMode

    copies = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(tensors)]
    w = mpo_expert_weights(copies[0], copies[1:])
    with FlopCounterMode(display=False) as counter:
        w.sum().backward()
    return counter.get_total_flops()


def test_a_masked_central_tensor_saves_its_gemm():
    """And skipped auxiliary tensors save theirs: arithmetic of the shapes, not a measured time."""
    _, tensors = sites("tiles")
    left, right, bond, next_bond, middle = 5 * 2 * 2 * 2, 3 * 3 * 4, 40, 36, 2
    everything = gemm_flops(tensors, range(5))
    dc = 2 * EXPERTS * left * bond * middle * next_bond
    assert everything - gemm_flops(tensors, range(1, 5)) == dc
    assert gemm_flops(tensors, (0,)) < everything - 2 * EXPERTS * left * middle * next_bond * right


def saved_bytes(function):
    """Bytes that autograd keeps while `function` runs, each memory once, and the result."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return storages, result


def test_backward_keeps_the_arguments_alone():
    _, tensors = sites("five")
    tensors = [t.requires_grad_() for t in tensors]
    storages, w = saved_bytes(lambda: mpo_expert_weights(tensors[0], tensors[1:]))
    assert set(storages) == {t.untyped_storage().data_ptr() for t in tensors} and w.requires_grad


def test_bitwise_repeatable_and_saved_tensors_stay():
    _, tensors = sites("two")
    tensors = [t.requires_grad_() for t in tensors]
    w = mpo_expert_weights(tensors[0], tensors[1:])
    assert torch.equal(w, mpo_expert_weights(tensors[0], tensors[1:]))
    first = torch.autograd.grad(w.sum(), tensors, retain_graph=True)
    second = torch.autograd.grad(w.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_any_strides_of_inputs_and_gradient():
    position, tensors = sites("four_off_centre")
    dw = output_gradient("four_off_centre")
    plain = run(mpo_expert_weights, tensors, dw, torch.float32, central_site=position)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    one = torch.randn(1).expand_as(dw)
    got = run(mpo_expert_weights, strided, dw.mT.contiguous().mT, torch.float32, central_site=position)
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b)
    expanded = [tensors[0], *(t[:1].expand_as(t) for t in tensors[1:])]
    got = run(mpo_expert_weights, expanded, one, torch.float32, central_site=position)
    exact = run(reference.mpo_expert_weights, expanded, one, torch.float64, central_site=position)
    for tensor, truth in zip(got, exact, strict=True):
        torch.testing.assert_close(tensor.double(), truth, rtol=1e-4, atol=1e-4)


def test_offsets_with_strides():
    position, tensors = sites("five")
    dw, stacked = output_gradient("five"), torch.tensor([[0, 0], [3, 0], [3, 0], [5, 0]], dtype=torch.int32)
    options = {"central_site": position}
    got = run(mpo_expert_weights, tensors, dw, torch.float32, offsets=stacked[:, 0], **options)
    wanted = run(mpo_expert_weights, tensors, dw, torch.float32, offsets=stacked[:, 0].contiguous(), **options)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True)) and not got[0][1].any()


def test_opcheck_compile_and_export():
    position, tensors = sites("five")
    tensors = [t.requires_grad_() for t in tensors]
    offsets = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    torch.library.opcheck(torch.ops.moebert_kernels.mpo_expert_weights.default, (tensors, offsets, position))

    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = torch.nn.ParameterList(tensors)

        def forward(self, offsets):
            return mpo_expert_weights(self.tensors[0], list(self.tensors)[1:], offsets=offsets)

    module = Weights()
    compiled = torch.compile(module, fullgraph=True)
    wanted = torch.autograd.grad(module(offsets).sin().sum(), list(module.parameters()))
    got = torch.autograd.grad(compiled(offsets).sin().sum(), list(module.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    program = torch.export.export(module, (offsets,))
    assert torch.equal(program.module()(offsets), module(offsets))
    with torch.device("meta"):
        assert mpo_expert_weights(tensors[0].to("meta"), [t.to("meta") for t in tensors[1:]]).shape == (3, 24, 36)


def test_rejects():
    _, (central, *aux) = sites("five")
    for message, arguments, options in (
        (r"central: expected a tensor, got list", ([1.0], aux), {}),
        (r"central: expected shape \(D, i, j, D'\) of sizes >= 1, got \(1, 2, 17\)", (central[0], aux), {}),
        (r"aux: expected a sequence of at least one tensor .*, got none", (central, []), {}),
        (r"aux: expected a sequence of at least one tensor .*, got a tensor", (central, aux[0]), {}),
        (r"aux\[1\]: expected shape \(E, D, i, j, D'\) of sizes >= 1, got \(3, 6, 2, 2\)",
         (central, [aux[0], aux[1][..., 0], *aux[2:]]), {}),
        (r"aux\[0\]: expected a left bond of 1 \(the outer bond\), got 6", (central, aux[1:]), {"central_site": 1}),
        (r"central: expected a left bond of 20 \(as aux\[1\]\), got 19", (central[1:], aux), {}),
        (r"aux\[2\]: expected a right bond of 1 \(the outer bond\), got 5", (central, aux[:-1]), {"central_site": 2}),
        (r"aux\[3\]: expected E=3 experts \(as aux\[0\]\), got 2", (central, [*aux[:3], aux[3][1:]]), {}),
        (r"aux\[3\]: expected dtype torch.float32 \(as central\), got torch.float16",
         (central, [*aux[:3], aux[3].half()]), {}),
        (r"central_site: expected a position from 0 to 4, got 5", (central, aux), {"central_site": 5}),
        (r"offsets: expected shape \(E \+ 1=4\), got \(3,\)", (central, aux), {"offsets": torch.zeros(3).int()}),
        (r"offsets: expected int32 on \S+, got torch.int64 on \S+", (central, aux), {"offsets": torch.zeros(4).long()}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            mpo_expert_weights(*arguments, **options)
