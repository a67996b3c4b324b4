"""Training steps as replays of CUDA graphs: a micro-batch's forward, teacher, losses and backward are one launch.

Why not torch.compile's graphs: docs/design/0010-graphs-of-training-steps.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moebert_kernels import graphs
from moebert_kernels.errors import UserError

EAGER = 2  # micro-batches of a new shape that run as usual: kernels are compiled, libraries allocate
MOST = 16  # graphs that are kept; they share their memory, but for their inputs

Step = Callable[[dict[str, Any], Any, Any], tuple[Tensor, Tensor]]


class StepGraphs:
    """Graphs of a step that adds to the gradients of `parameters`, one for each shape of its inputs.

    The first micro-batches of a shape are the warm-up, so nothing is computed twice or left out. A graph adds to
    gradients where it found them, so each parameter has one gradient tensor, which is put back and zeroed after
    `zero_grad` took it away. A parameter that a step gives no gradient keeps None.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._seen: dict[Hashable, int] = {}
        self._ready: dict[Hashable, _Ready] = {}
        self._pool: Any = None

    def __call__(
        self, run: Step, state: Hashable, inputs: dict[str, Any], share: float, theirs: Any
    ) -> tuple[Tensor, Tensor]:
        """`run(inputs, share, theirs)`, whose outputs are tensors.

        Args:
            run: the step.
            state: what else decides what it computes.
            inputs: a micro-batch.
            share: of the window; a tensor () in a graph.
            theirs: what a teacher's cache gives for the micro-batch, or None.

        Raises:
            UserError: the step cannot be captured, or the micro-batch has more than tensors and plain values.
        """
        leaves = {str(number): leaf for number, leaf in enumerate(pytree.tree_leaves((inputs, theirs)))}
        shapes = graphs.input_key(leaves)
        if shapes is None:
            kinds = {type(leaf).__name__ for leaf in leaves.values() if not isinstance(leaf, (Tensor, *graphs.PLAIN))}
            got = ", ".join(sorted(kinds))
            raise UserError(f"cuda_graphs: expected batches of tensors and plain values, got {got}")
        key = (state, tuple(inputs), shapes)
        ready = self._ready.get(key)
        if ready is not None:
            return self._replayed(ready, inputs, share, theirs)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] > EAGER and len(self._ready) < MOST:
            return self._captured(key, run, inputs, share, theirs)
        if self._seen[key] == EAGER + 1:
            warnings.warn(f"cuda_graphs: {MOST} shapes of batches have graphs, others run as usual", stacklevel=3)
        return run(inputs, share, theirs)

    def _captured(
        self, key: Hashable, run: Step, inputs: dict[str, Any], share: float, theirs: Any
    ) -> tuple[Tensor, Tensor]:
        own = pytree.tree_map_only(Tensor, Tensor.clone, (inputs, theirs))
        device = self._parameters[0].device
        own_share = torch.tensor(share, dtype=torch.float32, device=device)
        try:
            results, written = self._rehearsed(lambda: run(own[0], own_share, own[1]))
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            replay, outputs = graphs.recorded(lambda: run(own[0], own_share, own[1]), self._pool)
        except UserError:
            raise
        except Exception as error:  # whatever a library raises when it may not wait for the device
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(
                f"cuda_graphs: expected a training step that can be captured, got one that cannot: {reason}"
            ) from error
        self._ready[key] = _Ready(replay, (*own, own_share), outputs, written)
        return results

    def _rehearsed(self, call: Callable[[], tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], list[nn.Parameter]]:
        """The step, and the parameters that it gives gradients, which lie where they stay from now on."""
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        results = graphs.rehearsed(call)
        written = [parameter for parameter in self._parameters if parameter.grad is not None]
        for parameter, old in zip(self._parameters, before, strict=True):
            if old is not None:
                parameter.grad = old if parameter.grad is None else old.add_(parameter.grad)
        for parameter in written:
            if parameter.grad is not None:
                self._gradients.setdefault(parameter, parameter.grad)
        self._put_back(written)
        return results, written

    def _put_back(self, parameters: list[nn.Parameter]) -> None:
        """Gradients are where graphs add to them, with the values that they have; None is zero."""
        taken = [self._gradients[parameter] for parameter in parameters if parameter.grad is None]
        if taken:
            torch._foreach_zero_(taken)
        for parameter in parameters:
            gradient = self._gradients[parameter]
            if parameter.grad is not None and parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def _replayed(self, ready: _Ready, inputs: Mapping[str, Any], share: float, theirs: Any) -> tuple[Tensor, Tensor]:
        *own, own_share = ready.inputs
        for mine, given in zip(pytree.tree_leaves(tuple(own)), pytree.tree_leaves((inputs, theirs)), strict=True):
            if isinstance(given, Tensor):
                mine.copy_(given)
        own_share.fill_(share)
        self._put_back(ready.written)
        ready.replay()
        loss, values = ready.outputs  # which the next replay overwrites
        return loss.clone(), values.clone()


class _Ready(NamedTuple):
    """A graph: its inputs, outputs, and the parameters whose gradients it adds to."""

    replay: Callable[[], None]
    inputs: tuple[Any, ...]
    outputs: tuple[Tensor, Tensor]
    written: list[nn.Parameter]


def check_graphs(trainer: Any) -> None:
    """Raise UserError unless a trainer's steps can be captured, as far as its settings say."""
    args, objective = trainer.args, trainer.objective
    if args.device.type != graphs.DEVICE:
        raise UserError(f"cuda_graphs: expected a GPU, got {args.device.type}")
    if args.world_size > 1:
        raise UserError(f"cuda_graphs: expected one process, got {args.world_size}")
    refused = {
        "torch_compile": args.torch_compile,
        "gradient_checkpointing": args.gradient_checkpointing or getattr(args, "activation_checkpointing", False),
        "shared_fold": args.shared_fold,
        "torch_empty_cache_steps": args.torch_empty_cache_steps,
        "fsdp": trainer.is_fsdp_enabled,
        "deepspeed": trainer.is_deepspeed_enabled,
        "optim": args.optim if "lomo" in str(args.optim).lower() else None,  # which steps in the backward
    }
    for name, value in refused.items():
        if value:
            raise UserError(f"{name}: expected it off with cuda_graphs, got {value}")
    if objective is not None and objective.adversary is not None:
        raise UserError(
            "objective: expected none with a discriminator, whose weight changes, with cuda_graphs, got one"
        )
    experts = trainer._moe
    if experts is not None and experts.is_task_routed:
        raise UserError(
            f"model: expected routers that read no values back with cuda_graphs, got router={experts.router!r}"
        )
    collator = trainer.data_collator
    if getattr(collator, "pad_to_multiple_of", 1) is None and getattr(collator, "padding", None) != "max_length":
        raise UserError(
            "pad_to_multiple_of: expected a number with cuda_graphs, so that batches have few lengths, got None"
        )
