"""What a hasty or a hostile caller passes: a ValueError that names the argument, or the right numbers."""

import copy
import dataclasses
import math
import pickle
from contextlib import suppress

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from moebert_kernels import (
    Grouping,
    dropout,
    expert_gemm,
    fused_moe_ffn,
    fused_moe_ffn_add_norm,
    group_tokens,
    group_tokens_by_hash,
    hash_route,
    mpo_expert_weights,
    reference,
)

T, H, I, E = 8, 6, 5, 3
OPTIONAL = ("attention_mask", "bias", "b1", "b2", "routing_weights", "dropout_seed", "offsets")


def ids():
    return torch.arange(T) % E


def ffn():
    return {
        "x": torch.randn(T, H), "routing": ids(), "w1": torch.randn(E, I, H), "b1": torch.randn(E, I),
        "w2": torch.randn(E, H, I), "b2": torch.randn(E, H), "routing_weights": torch.rand(T),
        "dropout_seed": torch.tensor(3), "hidden_dropout_p": 0.0, "activation": "gelu",
    }  # fmt: skip


def add_norm():
    return ffn() | {"norm_weight": torch.ones(E, H), "norm_bias": torch.zeros(E, H), "eps": 1e-12, "dropout_p": 0.0}


def hashes():
    return {"token_ids": torch.arange(T), "attention_mask": torch.ones(T)}


ARGUMENTS = {
    hash_route: lambda: hashes() | {"table": ids()},
    group_tokens: lambda: {"expert_ids": ids(), "num_experts": E},
    group_tokens_by_hash: lambda: hashes() | {"tables": ids()[None], "num_experts": E},
    expert_gemm: lambda: {"x": torch.randn(T, H), "w": torch.randn(E, I, H), "grouping": group_tokens(ids(), E),
                          "bias": torch.randn(E, I)},
    fused_moe_ffn: ffn,
    fused_moe_ffn_add_norm: add_norm,
    mpo_expert_weights: lambda: {
        "central": torch.randn(2, 2, 3, 2), "aux": [torch.randn(E, 1, 2, 2, 2), torch.randn(E, 2, 3, 1, 1)],
        "offsets": torch.arange(E + 1, dtype=torch.int32), "central_site": 1,
    },
}  # fmt: skip
OTHERS_AS_GOOD = [("another size", name) for name in ("table", "tables", "expert_ids")] + [("meta", "expert_ids")]
NUMBERS = {
    "hidden_dropout_p": (-0.1, 1.0, 1.5, 0.999999, math.nan, math.inf, "x", None, [0.1], torch.tensor(0.1), True),
    "dropout_p": (-0.1, 1.0, 0.999999, math.nan, "x", None),
    "eps": (-1.0, math.nan, math.inf, "x", None),
    "activation": ("GELU", None, ["gelu"], torch.relu, 3),
    "num_experts": (0, -1, 2.5, "4", None, True, torch.tensor(4), [3]),
    "central_site": (-1, 3, "1", 1.0, True, [1]),
}


def no_dense_tensors(tensor: torch.Tensor) -> dict[str, object]:
    """What is no tensor, or one that no op reads: each refusal names the argument itself."""
    return {
        "list": tensor.tolist(), "array": tensor.cpu().numpy(), "string": "x", "number": 1.5, "None": None, "set": {1},
        "sparse": tensor.to_sparse(), "complex": tensor + 0j, "float8": tensor.to(torch.float8_e4m3fn),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "wrapper": TwoTensor(tensor, tensor),  # as DTensor is one
    }  # fmt: skip


def misfits(tensor: torch.Tensor) -> dict[str, object]:
    """Dense tensors that do not fit the others: the refusal names this argument or one that it does not fit."""
    return {
        "one more dimension": tensor[None, None], "no dimension": tensor.flatten()[0].view(1, 1, 1, 1, 1, 1),
        "meta": tensor.to("meta"), "another size": tensor.repeat(*[2] * max(tensor.ndim, 1)),
    }  # fmt: skip


def complaint(op, arguments) -> str | None:
    """The text of the ValueError, None without one, or what else was raised."""
    try:
        op(**arguments)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"({type(error).__name__}) {error}"
    return None


@pytest.mark.parametrize("op", ARGUMENTS, ids=lambda op: op.__name__)
def test_rejects_by_name(op):
    offenders = []

    def expect(argument, value, description, names):
        text = complaint(op, ARGUMENTS[op]() | {argument: value})
        if text is None or not any(text.startswith((f"{name}: expected", f"{name}[", f"{name}.")) for name in names):
            offenders.append(f"{argument} = {description}: {text}")

    for argument, good in ARGUMENTS[op]().items():
        for bad in NUMBERS.get(argument, ()):
            if argument != "central_site" or bad is not None:
                expect(argument, bad, repr(bad), (argument,))
        if argument == "aux":
            for bad in (
                None,
                good[0],
                (t for t in good),
                [],
                "ab",
                {1: 2},
                3,
                [None, None],
                [good[0].tolist(), good[1]],
            ):
                expect(argument, bad, type(bad).__name__, (argument,))
        if argument == "grouping":
            for bad in (None, good.offsets, ids(), [good], "x"):
                expect(argument, bad, type(bad).__name__, (argument,))
        if not isinstance(good, torch.Tensor):
            continue
        for description, bad in no_dense_tensors(good).items():
            if bad is not None or argument not in OPTIONAL:
                expect(argument, bad, description, (argument,))
        for description, bad in misfits(good).items():
            if (description, argument) not in OTHERS_AS_GOOD:
                expect(argument, bad, description, ARGUMENTS[op]())
    assert not offenders, "\n".join(offenders)


def test_rejects_negative_views_and_seeds_elsewhere():
    arguments = ffn()
    for argument in ("x", "w1", "b1", "w2", "b2", "routing_weights"):
        negative = torch._neg_view(-arguments[argument])
        assert complaint(fused_moe_ffn, arguments | {argument: negative}).startswith(f"{argument}: expected the result")
    seed = torch.tensor(3, device="meta")
    text = complaint(fused_moe_ffn, arguments | {"hidden_dropout_p": 0.1, "dropout_seed": seed})
    assert text == f"dropout_seed: expected device {arguments['x'].device} (as x), got meta"


def malformed(grouping: Grouping) -> dict[str, Grouping]:
    offsets, to_token, to_row = grouping.offsets, grouping.row_to_assignment, grouping.assignment_to_row
    return {
        "offsets: expected ascending": Grouping(offsets.flip(0), to_token, to_row),
        "offsets: expected ascending values from 0 to at most 8": Grouping(offsets * 100, to_token, to_row),
        "offsets: expected ascending values from 0": Grouping(offsets + 1, to_token, to_row),
        "offsets: expected one dimension of int32": Grouping(offsets.long(), to_token, to_row),
        "offsets: expected a tensor, got list": Grouping(offsets.tolist(), to_token, to_row),
        "row_to_assignment: expected a permutation": Grouping(offsets, to_token + 10**6, to_row),
        "row_to_assignment: expected a permutation of 0 to 7": Grouping(offsets, to_token * 0, to_row),
        "row_to_assignment: expected one dimension of int32": Grouping(offsets, to_token[None], to_row),
        "row_to_assignment: expected one dimension of int32 on cpu": Grouping(offsets, to_token.to("meta"), to_row),
        "assignment_to_row: expected the inverse of row_to_assignment": Grouping(offsets, to_token, to_row.flip(0)),
        "assignment_to_row: expected a contiguous tensor": Grouping(
            offsets, to_token, to_row.repeat_interleave(2)[::2]
        ),
        " expected maps of T * top_k rows with an integer top_k >= 1, got 8 and 7": Grouping(
            offsets, to_token, to_row[1:]
        ),
        " expected maps of T * top_k rows": Grouping(offsets, to_token, to_row, 3),
        " expected maps of T * top_k rows with": Grouping(offsets, to_token, to_row, 0),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="the values of a grouping on a GPU are not read back")
@pytest.mark.parametrize("op, argument", [(fused_moe_ffn, "routing"), (fused_moe_ffn_add_norm, "routing"),
                                          (expert_gemm, "grouping")])  # fmt: skip
def test_rejects_groupings_whose_maps_do_not_fit_together(op, argument):
    for wanted, grouping in malformed(group_tokens(ids(), E)).items():
        text = complaint(op, ARGUMENTS[op]() | {argument: grouping})
        assert text is not None and text.startswith(argument) and wanted in text, (wanted, text)
    meta = group_tokens(ids().to("meta"), E)
    assert "(as x), got one on meta" in complaint(op, ARGUMENTS[op]() | {argument: meta})


def test_groupings_made_by_hand_copied_or_pickled_are_as_good():
    made = group_tokens(torch.tensor([2, 0, -1, 1, 0, 3, 2, 2]), E)
    others = [
        Grouping(made.offsets, made.row_to_assignment, made.assignment_to_row), copy.deepcopy(made), copy.copy(made),
        pickle.loads(pickle.dumps(made)), made.to(made.offsets.device), dataclasses.replace(made),
    ]  # fmt: skip
    arguments = ffn()
    wanted = fused_moe_ffn(**arguments | {"routing": made})
    for grouping in others:
        assert torch.equal(fused_moe_ffn(**arguments | {"routing": grouping}), wanted)
    broken = dataclasses.replace(made, offsets=made.offsets.flip(0))
    if not torch.cuda.is_available():
        assert complaint(fused_moe_ffn, arguments | {"routing": broken}).startswith("routing.offsets: expected asc")


def test_odd_but_good_arguments():
    class Subclass(torch.Tensor):
        pass

    arguments = add_norm() | {"eps": 1e-5}
    x = arguments["x"]
    wanted = fused_moe_ffn_add_norm(**arguments)
    with torch.no_grad():
        for odd in (x.as_subclass(Subclass), torch.nn.Parameter(x), x.T.contiguous().T):
            torch.testing.assert_close(
                fused_moe_ffn_add_norm(**arguments | {"x": odd}).as_subclass(torch.Tensor), wanted
            )
        one = {"x": x[0], "routing": ids()[0], "routing_weights": arguments["routing_weights"][0]}
        torch.testing.assert_close(fused_moe_ffn_add_norm(**arguments | one), wanted[0])
    for value in (math.nan, math.inf):  # in one token: no other one sees it
        spoilt = x.clone()
        spoilt[1] = value
        y = fused_moe_ffn_add_norm(**arguments | {"x": spoilt})
        torch.testing.assert_close(y[2:], wanted[2:])
        torch.testing.assert_close(y[0], wanted[0])


def test_a_skipped_tokens_routing_weight_counts_for_nothing():
    arguments = ffn() | {"routing": torch.tensor([-1, *range(1, T)]) % E}
    arguments["routing"][0] = -1
    wanted = fused_moe_ffn(**arguments)
    arguments["routing_weights"][0] = math.nan
    assert torch.equal(fused_moe_ffn(**arguments), wanted)


def test_the_largest_probability_of_dropping_keeps_some_and_scales_them():
    p, rows = 1 - 2**-16, torch.arange(30_000)
    kept = dropout.keep_mask(torch.tensor(3), rows, I, p, dropout.HIDDEN_STREAM)
    row = int(rows.where(kept.any(1), 2**30).min())  # the first that keeps anything
    assert row < 2**30 and dropout.scale(p) == 2**16
    arguments = ffn() | {"hidden_dropout_p": p, "b1": None}
    y = fused_moe_ffn(**arguments)
    ids, others = arguments.pop("routing"), arguments
    torch.testing.assert_close(y, reference.fused_moe_ffn(others.pop("x"), ids, **others))


def test_a_dispatch_mode_lets_nothing_pass_afterwards():
    """Inside of one a wrapper is what the op must see as one node."""
    x, ids = TwoTensor(torch.randn(3, 4), torch.randn(3, 4)), torch.zeros(3, dtype=torch.int64)
    w1, w2 = torch.randn(2, 6, 4), torch.randn(2, 4, 6)
    for _ in range(2):
        with pytest.raises(ValueError, match="x: expected a plain tensor"):
            fused_moe_ffn(x, ids, w1, None, w2, None)
        with suppress(Exception), FlopCounterMode(display=False):
            fused_moe_ffn(x, ids, w1, None, w2, None)
