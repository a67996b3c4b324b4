"""What a hasty or a hostile caller gives the routers: a ValueError that names the argument, or the right numbers."""

import math

import pytest
import torch

from moebert_kernels.layers import MoEFeedForward
from moebert_kernels.nn import (
    DenseExperts,
    GateRouter,
    HashRouter,
    SwitchRouter,
    TaskRouter,
    Top2Router,
)
from tests.nn.mpo import routed

B, T, H, E = 2, 5, 6, 4
SIZES = {"hidden_size": H, "num_experts": E}
MADE_WITH = {
    GateRouter: SIZES,
    SwitchRouter: SIZES | {"jitter": 0.0, "noise": 0.0, "capacity_factor": 1.0},
    Top2Router: SIZES | {"jitter": 0.0, "noise": 0.0, "threshold": 0.2, "capacity_factor": 1.0,
                         "eval_capacity_factor": 1.0},
    TaskRouter: {"num_tasks": 3, "num_experts": E, "top_k": 2},
    HashRouter: {"table": torch.arange(9) % E, "num_experts": E},
}  # fmt: skip
CAN_BE_ZERO = ("jitter", "noise")
CAN_BE_NONE = ("capacity_factor", "eval_capacity_factor")
CAN_BE_A_FRACTION = ("noise", "threshold", *CAN_BE_NONE)
ROUTERS = list(MADE_WITH)


def complaint(function, *arguments, **options) -> str | None:
    """The text of the ValueError, None without one, or what else was raised."""
    try:
        function(*arguments, **options)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"({type(error).__name__}) {error}"
    return None


@pytest.mark.parametrize("router", ROUTERS, ids=lambda cls: cls.__name__)
def test_constructors_refuse_by_name(router):
    offenders = []
    for argument in MADE_WITH[router]:
        for bad in (0, -1, 2.5, "4", None, True, math.nan, math.inf, [1], torch.tensor(4)):
            good = (bad == 0 and argument in CAN_BE_ZERO) or (bad is None and argument in CAN_BE_NONE)
            if good or (bad == 2.5 and argument in CAN_BE_A_FRACTION):
                continue
            text = complaint(router, **MADE_WITH[router] | {argument: bad})
            named = (f"{argument}: expected", "top_k: expected 1 to num_experts" if argument == "num_experts" else "-")
            if text is None or not text.startswith(named):
                offenders.append(f"{argument}={bad!r}: {text}")
    assert not offenders, "\n".join(offenders)


def caller(router):
    """A call by name, and its good arguments."""
    module, x, mask = router(**MADE_WITH[router]), torch.randn(B, T, H), torch.ones(B, T)
    if router is HashRouter:
        return module, {"token_ids": torch.arange(B * T).view(B, T), "attention_mask": mask}
    if router is TaskRouter:
        return module, {"task_ids": torch.tensor([0, 2]), "x": x, "attention_mask": mask}
    return module, {"x": x, "attention_mask": mask} | ({"draws": torch.rand(B, T)} if router is Top2Router else {})


@pytest.mark.parametrize("router", ROUTERS, ids=lambda cls: cls.__name__)
def test_calls_refuse_by_name(router):
    module, good = caller(router)
    offenders = []
    for argument, tensor in good.items():
        bad = {
            "list": tensor.tolist(), "array": tensor.numpy(), "string": "x", "fraction": 1.5,
            "sparse": tensor.to_sparse(), "complex": tensor + 0j, "meta": tensor.to("meta"),
            "one more dimension": tensor[None],
            "another size": torch.cat([tensor, tensor], -1), "one row": tensor[:1] if argument != "x" else tensor[0],
        }  # fmt: skip
        if argument in ("x", "token_ids"):
            bad["None"] = None
        if argument == "x":
            bad |= {"integers": tensor.long(), "bool": tensor > 0, "float8": tensor.to(torch.float8_e4m3fn)}
        if argument == "x" and router is TaskRouter:  # gives shape, dtype and device alone
            bad = {name: bad[name] for name in ("list", "array", "string", "fraction", "sparse", "one row", "None")}
        for description, value in bad.items():
            text = complaint(module, **good | {argument: value})
            names = good if description in ("meta", "one more dimension", "another size", "one row") else (argument,)
            if text is None or not text.startswith(tuple(f"{name}: expected" for name in names)):
                offenders.append(f"{argument}: {description}: {text}")
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (3, 1)], ids=str)
@pytest.mark.parametrize("capacity_factor", [None, 0.01, 1.0, 100.0])
def test_few_or_no_tokens_with_any_capacity(shape, capacity_factor):
    capacity = {} if capacity_factor is None else {"capacity_factor": capacity_factor}
    routers = [
        SwitchRouter(H, E, **capacity),
        Top2Router(H, E, **capacity),
        GateRouter(H, E),
        GateRouter(H, E, "sentence"),
    ]
    for router in routers:
        for mask in (None, torch.zeros(shape), torch.ones(shape)):
            layer = MoEFeedForward(router, DenseExperts(H, 3, E))
            x = torch.randn(*shape, H, requires_grad=True)
            y, loss = routed(layer, x, None, mask)
            (y.square().sum() + loss).backward()
            found = [y, loss, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
            assert y.shape == x.shape and all(bool(torch.isfinite(t).all()) for t in found), type(router).__name__
            if 0 in shape:
                assert float(loss) == 0 or isinstance(router, GateRouter)
