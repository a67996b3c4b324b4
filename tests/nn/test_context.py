"""The call that a thread runs: entered and left, handed to what is checkpointed, and never on a module."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moebert_kernels.nn.context import (
    Call,
    Groupings,
    RecomputedLayer,
    Tokens,
    checkpointed,
    current,
    derived_class,
    entered,
    hold,
    recomputed_class,
    routed,
)


def call_of(number):
    return Call(Tokens(Groupings(), torch.full((1, 1), number)))


def test_calls_nest_belong_to_their_thread_and_end_with_an_error():
    outer, inner, seen = call_of(1), call_of(2), []
    with entered(outer):
        with entered(inner):
            assert current() is inner
        thread = threading.Thread(target=lambda: seen.append(current()))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError), entered(inner):
            raise RuntimeError
        assert current() is outer
    assert current() == Call() == seen[0]


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input_ids, attention_mask=None, **_):
        """Its own ids."""
        return current().tokens.token_ids * self.scale


def routed_stack(base):
    tokens_of = lambda stack, inputs: Tokens(Groupings(), inputs["input_ids"], inputs.get("attention_mask"))  # noqa: E731
    return derived_class(routed_stack, base, (base,), {"forward": routed(base.forward, tokens_of)})


def test_a_derived_class_goes_by_its_bases_name_and_can_be_copied_and_pickled():
    stack = Stack()
    stack.__class__ = routed_stack(Stack)
    assert str(type(stack)) == str(Stack) and type(stack) is not Stack and isinstance(stack, Stack)
    assert type(stack).forward.__doc__ == "Its own ids."
    ids = torch.tensor([[3, 4]])
    for one in (stack, copy.deepcopy(stack), copy.copy(stack), pickle.loads(pickle.dumps(stack))):
        assert isinstance(one, Stack) and type(one) is not Stack
        for output in (one(ids), one(input_ids=ids), one.forward(ids, torch.ones(1, 2))):
            assert torch.equal(output, ids.float())
    assert current() == Call()


class Layer(nn.Module):
    """y = w x times the number that the call says; its balance loss is the mean of y, squared."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.setting = 1.0

    def forward(self, x):
        tokens, losses = current()[:2]
        y = self.w * x * tokens.token_ids.sum() * hold(self, self.setting)
        if losses is not None:
            losses.append(y.mean() ** 2)
        return y


@pytest.mark.parametrize("in_a_tuple", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_recomputation_sees_what_its_first_run_saw(reentrant, in_a_tuple):
    layer, x = Layer(), torch.tensor([1.0, 3.0], requires_grad=True)

    def run(x):
        return (layer(x), None) if in_a_tuple else layer(x)

    total = 0.0
    for number, setting in ((3, 1.0), (5, 0.5)):
        losses = []
        layer.setting = setting
        with entered(call_of(number)._replace(losses=losses)):
            if reentrant is None:
                y = run(x)
            else:
                y = checkpointed(lambda *args: checkpoint(*args, use_reentrant=reentrant), run, x)
        assert isinstance(y, tuple) == in_a_tuple and len(losses) == 1
        total = total + (y[0] if in_a_tuple else y).sum() + losses[0]
    layer.setting = 100.0
    total.backward()
    # y = 2 k x, with k = 3 and 2.5: d/dw of sum(y) + mean(y)^2 is k sum(x) + 2 mean(y) k mean(x)
    assert layer.w.grad.item() == pytest.approx(sum(k * 4 + 2 * (2 * k * 2) * k * 2 for k in (3.0, 2.5)))


def test_what_is_checkpointed_and_never_run_backward_is_freed():
    """A call that kept its losses would keep their graph, which keeps the call."""
    layer, x, losses = Layer(), torch.ones(2, requires_grad=True), []
    with entered(call_of(1)._replace(losses=losses)):
        y = checkpointed(lambda *args: checkpoint(*args, use_reentrant=False), layer, x)
    gone = [weakref.ref(y), weakref.ref(losses[0])]
    gc.collect()
    gc.disable()
    try:
        del y, losses
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


class Block(nn.Module):
    _gradient_checkpointing_func = None

    def forward(self, x):
        return self._gradient_checkpointing_func(self.inner, x)

    def inner(self, x):
        return x * current().tokens.token_ids.sum()


def test_layers_hand_their_call_on_whoever_sets_the_checkpoint():
    block, later = Block(), []
    block.__class__ = recomputed_class(Block)
    assert isinstance(block, RecomputedLayer) and recomputed_class(Block) is type(block)
    block._gradient_checkpointing_func = lambda run, x: later.append((run, x)) or run(x)
    for one in (block, copy.deepcopy(block)):
        with entered(call_of(3)):
            assert one(torch.tensor(2.0)).item() == 6.0
        run, x = later.pop()
        assert run(x)[0].item() == 6.0 and current() == Call()
