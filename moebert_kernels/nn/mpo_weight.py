"""One weight of all experts as a matrix-product operator: a shared central tensor, auxiliary tensors per expert.

MPOE (2203.01104), section 3. Site k of the operator is a tensor (D_k, i_k, j_k, D_k+1); the i multiply to the rows
(out) of the weight, the j to its columns (in), and D_0 = D_n = 1. The middle site is the central tensor (of an even
number of sites, the one before the middle).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from moebert_kernels.errors import UserError
from moebert_kernels.nn.called_parameters import CalledParameters
from moebert_kernels.nn.context import hold
from moebert_kernels.ops._checks import autocast_dtype, opaque
from moebert_kernels.ops.mpo_expert_weights import mpo_expert_weights

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# fused optimizers change parameters without their version counters
register_optimizer_step_post_hook(_count_step)


class MPOWeight(nn.Module):
    """The (E, out, in) weights of E experts, folded from one central tensor and their own auxiliary tensors.

    Args:
        num_experts: E.
        row_factors: i_1..i_n, which multiply to out; n is at least 2.
        col_factors: j_1..j_n, which multiply to in.
        max_bond: caps of the bonds, see `mpo_bonds`; None: full bonds, with which an expert can be any matrix.

    Parameters: `central` (D, i, j, D') and `aux`, the other sites in order, each (E, D_k, i_k, j_k, D_k+1).

    Calling it folds inside autograd, once per call. In eval mode and where no gradient is wanted, all experts are
    folded once and kept in the compute dtype until a parameter changes (its version counter, any optimizer's step,
    `.to()`, `load_state_dict`) or the module goes back to training; a change through `.data` is not seen: call
    `unfold`. While torch compiles, only what `fold` made is kept.

    Raises:
        UserError: factors or a bond from which no operator can be built.
    """

    def __init__(
        self, num_experts: int, row_factors: Sequence[int], col_factors: Sequence[int],
        max_bond: int | Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        shapes = site_shapes(row_factors, col_factors, max_bond)
        if len(shapes) < 2:
            raise UserError(f"row_factors: expected at least 2, got {list(row_factors)}")
        middle = (len(shapes) - 1) // 2
        self.num_experts = num_experts
        self.shape = torch.Size((num_experts, math.prod(row_factors), math.prod(col_factors)))
        self.central = nn.Parameter(torch.empty(shapes[middle]))
        self.aux = CalledParameters(torch.empty(num_experts, *shape) for k, shape in enumerate(shapes) if k != middle)
        # Per expert, whether the central tensor takes no part in its gradient; set by `GradientMask`.
        self.masked: tuple[bool, ...] = (False,) * num_experts
        # key, weights, and the sites, which live as long: else new ones might get their addresses, and equal keys
        self._folded: tuple[Any, Tensor, list[Tensor]] | None = None
        self._leaf: tuple[Tensor, Tensor] | None = None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all sites so that the entries of the folded weights have this standard deviation."""
        for site in self.parameters():
            nn.init.normal_(site, std=self.initial_std(std))

    def initial_std(self, std: float) -> float:
        """The standard deviation of site entries that gives folded ones `std`: those are sums over paths of bonds."""
        paths = math.prod(site.shape[-1] for site in self.sites)
        return float((std * std / paths) ** (0.5 / len(self.sites)))

    @property
    def sites(self) -> list[Tensor]:
        """All parameters in the order of the sites."""
        middle = len(self.aux) // 2
        aux = list(self.aux)
        return [*aux[:middle], self.central, *aux[middle:]]

    def forward(self, offsets: Tensor | None = None) -> Tensor:
        """The weights (E, out, in); with the `offsets` (E + 1,) of a Grouping, experts without rows may be zeros."""
        leaf = self._leaf
        if leaf is not None and (torch.is_grad_enabled() or self.training):
            return leaf[1].to(self.central.device)  # of a replica another one
        if self.training or self._wants_gradient():
            return self._fold(offsets)
        kept = self._folded
        if kept is not None and (torch.compiler.is_compiling() or kept[0] == self.cache_key()):
            return kept[1]
        if opaque(self.central) or self.aux.are_offloaded:
            return self._fold(offsets)
        return self.fold()

    def fold(self) -> Tensor:
        """Fold all experts and keep the result, in autocast's dtype if it is enabled, else in the parameters' own."""
        sites, kept = self.all_sites(), self._folded
        key = _key_of(sites)
        if kept is None or kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # or what is kept could never meet a gradient
                weights = mpo_expert_weights(self.central, list(self.aux)).to(key[0])
                kept = key, weights, [site.detach() for site in sites]
            self._folded = kept
        return kept[1]  # another thread may have replaced or dropped what is kept

    def unfold(self) -> None:
        """Drop what `fold` kept."""
        self._folded = None

    @torch.no_grad()
    def fold_experts(self, experts: Sequence[int]) -> Tensor:
        """The weights (len(experts), out, in) of some experts, without keeping them."""
        return mpo_expert_weights(self.central, [a[list(experts)] for a in self.aux]).to(self._compute_dtype())

    def cache_key(self) -> tuple[Any, ...]:
        """The compute dtype, then what changes when a parameter may have changed, while the sites of before live."""
        return _key_of(self.all_sites())

    def all_sites(self) -> list[Any]:
        """As `sites`, in another order."""
        return self.own_sites() or self.sites

    def own_sites(self) -> list[Any] | None:
        """All sites from the modules' dictionaries: `nn.Module.__getattr__` costs as much as the rest of `cache_key`.

        None: one is not there, but computed by a parametrization, or an attribute of a replica of nn.DataParallel.
        """
        central: Any = self._parameters.get("central")
        aux: Any = self._modules["aux"]
        if central is None or len(aux._parameters) != len(aux):
            return None
        return [central, *aux._parameters.values()]

    def _compute_dtype(self) -> torch.dtype:
        return autocast_dtype(self.central) or self.central.dtype

    def open_leaf(self) -> None:
        """Fold now, and give the result out as a leaf that accumulates gradients; see `shared_fold`."""
        with torch.enable_grad(), torch.autocast(self.central.device.type, enabled=False):
            folded = self._fold(None)
        self._leaf = folded, folded.detach().requires_grad_(folded.requires_grad)

    def close_leaf(self, backward: bool) -> None:
        """Forget the leaf; with `backward`, first run the fold's backward with its gradient."""
        if self._leaf is None:
            return
        folded, leaf = self._leaf
        self._leaf = None
        if backward and leaf.grad is not None:
            folded.backward(leaf.grad)
        if leaf.requires_grad:
            leaf.register_hook(_refuse_late_backward)

    @property
    def has_leaf(self) -> bool:
        return self._leaf is not None

    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(site.requires_grad for site in self.sites)

    def _fold(self, offsets: Tensor | None) -> Tensor:
        aux, all_masked = list(self.aux), hold(self, self.masked)
        if not any(all_masked) or not self._wants_gradient() or not self.central.requires_grad:
            return mpo_expert_weights(self.central, aux, offsets=offsets)
        if all(all_masked):
            weights = mpo_expert_weights(self.central.detach(), aux, offsets=offsets)
        else:
            rows: dict[int, Tensor] = {}
            for central, masked in ((self.central, False), (self.central.detach(), True)):
                experts = [e for e in range(self.num_experts) if all_masked[e] == masked]
                counts = None if offsets is None else offsets.diff()[experts]
                some = None if counts is None else torch.cat([counts.new_zeros(1), counts.cumsum(0).to(counts.dtype)])
                folded = mpo_expert_weights(central, [a[experts] for a in aux], offsets=some)
                rows |= dict(zip(experts, folded.unbind(), strict=True))
            weights = torch.stack([rows[e] for e in range(self.num_experts)])
        if not all(all_masked) or not _is_distributed():
            return weights
        return _JoinGraph.apply(weights, self.central)  # type: ignore[no-any-return, no-untyped-call]

    def train(self, mode: bool = True) -> MPOWeight:
        if mode:
            self.unfold()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.unfold()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unfold()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_folded": None, "_leaf": None}  # copies and pickles fold for themselves

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._folded = None  # it would be on another device, or of older parameters
        return replica

    def extra_repr(self) -> str:
        sites = ", ".join(str(tuple(s.shape[-4:])) for s in self.sites)
        return f"num_experts={self.num_experts}, shape={tuple(self.shape[1:])}, sites=[{sites}]"


def _key_of(sites: Sequence[Tensor]) -> tuple[Any, ...]:
    try:
        versions = [site._version for site in sites]
    except RuntimeError:  # made in inference mode: never changed but there
        versions = [_version(site) for site in sites]
    dtype = autocast_dtype(sites[0]) or sites[0].dtype
    return (dtype, _optimizer_steps, *[site.data_ptr() for site in sites], *versions)


class KeptFolds:
    """Folded weights that two `MPOWeight`s keep, and whether they still hold.

    One check for both: with few tokens, finding kept weights is Python that runs with cold caches, which is most of
    what a layer of such experts takes longer than one of dense experts.
    """

    @classmethod
    def of(cls, *weights: MPOWeight) -> KeptFolds | None:
        """What they keep.

        None: one keeps nothing, has sites that are computed, or was made in inference mode, which counts no versions.
        """
        if any(weight.own_sites() is None for weight in weights):
            return None
        keys: list[Any] = [weight._folded and weight._folded[0] for weight in weights]
        sites = [site for weight in weights for site in weight.sites]
        if None in keys or any(site.is_inference() for site in sites) or autocast_dtype(sites[0]) is not None:
            return None
        if any(key[0] != sites[0].dtype for key in keys):  # of another thread, under autocast
            return None
        return cls(weights, keys)

    def __init__(self, weights: Sequence[MPOWeight], keys: Sequence[Any]) -> None:
        # their keys, not the folds: those must go when a weight drops them
        self._keys = list(zip(weights, keys, strict=True))
        # the modules' own dictionaries: a parameter may be replaced
        self._places = [m._parameters for weight in weights for m in (weight, weight.aux)]
        self._steps = _optimizer_steps
        self._versions = [
            (site._version, site.data_ptr()) for place in self._places for site in place.values() if site is not None
        ]

    def folded(self) -> Any:
        """The weights (E, out, in) of each, or None where one does not hold any more."""
        if self._steps != _optimizer_steps:
            return None
        found = []
        for weight, key in self._keys:
            kept = weight._folded  # read once: another thread may replace it
            if kept is None or kept[0] is not key:
                return None
            found.append(kept[1])
        if torch.is_autocast_enabled(found[0].device.type):
            return None
        versions = iter(self._versions)
        for place in self._places:
            for site in place.values():
                if site is None or (site._version, site.data_ptr()) != next(versions, None):
                    return None
        return found if next(versions, None) is None else None  # a site may have become a computed one


def site_shapes(
    row_factors: Sequence[int], col_factors: Sequence[int], max_bond: int | Sequence[int] | None = None
) -> list[tuple[int, int, int, int]]:
    """Shapes (D_k, i_k, j_k, D_k+1) of all sites; raises as `mpo_bonds`."""
    bonds = mpo_bonds(row_factors, col_factors, max_bond)
    return list(zip(bonds[:-1], row_factors, col_factors, bonds[1:], strict=True))


def mpo_bonds(
    row_factors: Sequence[int], col_factors: Sequence[int], max_bond: int | Sequence[int] | None = None
) -> tuple[int, ...]:
    """Bond dimensions (D_1, ..., D_n+1): as many as a full-rank matrix needs, cut at `max_bond`.

    Args:
        row_factors, col_factors: i_1 .. i_n and j_1 .. j_n, n >= 1.
        max_bond: one cap for all bonds, or n - 1 caps; None: no cap.

    Raises:
        UserError: factors or caps that are not integers >= 1, or of another number.
    """
    for name, factors in (("row_factors", row_factors), ("col_factors", col_factors)):
        if len(factors) == 0 or not all(_positive(factor) for factor in factors):
            raise UserError(f"{name}: expected integers >= 1, got {list(factors)}")
    if len(col_factors) != len(row_factors):
        raise UserError(f"col_factors: expected {len(row_factors)} of them (as row_factors), got {len(col_factors)}")
    inner = len(row_factors) - 1
    caps = list(max_bond) if isinstance(max_bond, Sequence) else [max_bond] * inner
    if len(caps) != inner:
        raise UserError(f"max_bond: expected {inner} caps for {inner + 1} sites, got {len(caps)}")
    if not all(cap is None or _positive(cap) for cap in caps):
        raise UserError(f"max_bond: expected integers >= 1, got {max_bond}")
    sizes = [i * j for i, j in zip(row_factors, col_factors, strict=True)]
    full = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, inner + 1)]
    return (1, *(size if cap is None else min(size, cap) for size, cap in zip(full, caps, strict=True)), 1)


def check_factors(name: str, factors: Any, shape: tuple[int, ...] | None = None) -> None:
    """Raise a UserError unless these are row and column factors, as many of each; of a weight of `shape`, if given."""
    sequences = (list, tuple)
    two = isinstance(factors, sequences) and [isinstance(part, sequences) for part in factors] == [True, True]
    if not two or not 2 <= len(factors[0]) == len(factors[1]) or not all(_positive(k) for ks in factors for k in ks):
        raise UserError(
            f"{name}: expected row and column factors (see plan_factors), as many of both, integers >= 1 and at least "
            f"two, got {factors!r}"
        )
    products = tuple(map(math.prod, factors))
    if shape is not None and products != shape:
        raise UserError(f"{name}: expected products {shape}, got {products}")


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@contextmanager
def shared_fold(module: nn.Module) -> Iterator[None]:
    """Fold every `MPOWeight` in `module` once for all forwards and backwards of an optimizer step.

    The gradients of the folded weights are summed over the micro-batches; leaving the context runs the folds' backward
    into the parameters, so that clipping and the optimizer's step come after it. An error inside drops the gradients
    of the folded weights. Needs the memory of all folded weights and their gradients.

    Raises:
        ValueError: this context is inside another one.
    """
    weights = [m for m in module.modules() if isinstance(m, MPOWeight)]
    if any(weight.has_leaf for weight in weights):
        raise ValueError("shared_fold: expected no other one around it, got one")
    complete = False
    try:
        for weight in weights:
            weight.open_leaf()
        yield
        complete = True
    finally:
        for weight in weights:
            weight.close_leaf(backward=complete)


class _JoinGraph(torch.autograd.Function):
    """`weights`, with `central` in the graph and a gradient of zero for it, which costs no GEMM.

    DistributedDataParallel waits for a gradient of every parameter. `GradientMask` takes the zeros away.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, central: Tensor) -> Tensor:
        ctx.save_for_backward(central)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, dweights: Tensor) -> tuple[Tensor, Tensor]:
        return dweights, torch.zeros_like(ctx.saved_tensors[0])


def _refuse_late_backward(_: Tensor) -> None:
    raise ValueError("shared_fold: expected the backward of its forwards inside it, got one after its end")


def _is_distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
