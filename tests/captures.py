"""CUDA graphs on the CPU: what torch computes while a call is captured is noted, and a replay computes that again.

As on a GPU, nothing is computed while a call is captured, no Python runs at a replay, tensors stay where they were, and
what another replay computes meanwhile is gone. Values may not be read back.
"""

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from moebert_kernels import graphs

_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_BY_MASK = "aten::index"  # which has a dynamic shape by a mask alone


class Tape(TorchDispatchMode):
    """Notes what torch computes; on a GPU, an op that reads values back cannot be captured."""

    tapes: "list[Tape]" = []  # noqa: RUF012  whose memory is shared

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.own = [], {}, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        by_mask = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in leaves[1:])
        if _READS.intersection(op.tags) and (op._schema.name != _BY_MASK or by_mask):
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        for tensor in self._written(op, args, kwargs or {}):
            key = tensor.untyped_storage().data_ptr()
            if key not in self.own:
                self.before.setdefault(key, (tensor, tensor.detach().clone()))
        outputs = op(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in leaves}
        new = [
            tensor for tensor in pytree.tree_leaves(outputs)
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known
        ]  # fmt: skip
        self.own.update(tensor.untyped_storage().data_ptr() for tensor in new)
        self.calls.append((op, args, kwargs or {}, outputs, new))
        return outputs

    @staticmethod
    def _written(op, args, kwargs):
        for number, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = kwargs.get(argument.name, args[number] if number < len(args) else None)
                yield from (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor))

    @torch.no_grad()
    def replay(self):
        for tape in self.tapes:
            if tape is not self:
                tape.forget()
        for op, args, kwargs, outputs, new in self.calls:
            again = op(*args, **kwargs)
            for old, other in zip(*map(pytree.tree_leaves, (outputs, again)), strict=True):
                if any(old is tensor for tensor in new):
                    old.detach().copy_(other)

    @torch.no_grad()
    def forget(self):
        for *_, new in self.calls:
            for tensor in new:
                if tensor.is_floating_point():
                    tensor.detach().fill_(float("nan"))


def recorded(run, pool=None):
    tape, drawn = Tape(), torch.get_rng_state()
    with graphs._as_if_capturing(), tape:
        outputs = run()
    torch.set_rng_state(drawn)
    with torch.no_grad():
        for tensor, value in tape.before.values():
            tensor.detach().copy_(value)
    tape.forget()
    Tape.tapes.append(tape)
    return tape.replay, outputs


def rehearsed(run):
    with graphs._as_if_capturing():
        return run()


@pytest.fixture
def captures(monkeypatch):
    """What was captured and replayed, in order."""
    notes = []

    def noted(run, pool=None):
        replay, outputs = recorded(run, pool)
        notes.append("captured")

        def again():
            notes.append("replayed")
            replay()

        return again, outputs

    monkeypatch.setattr(graphs, "recorded", noted)
    monkeypatch.setattr(graphs, "captured", lambda run: (rehearsed(run), noted(run))[1])
    monkeypatch.setattr(graphs, "rehearsed", rehearsed)
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    yield notes
    Tape.tapes.clear()
