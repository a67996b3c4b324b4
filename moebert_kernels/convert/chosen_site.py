"""Experts that fit the text at one feed-forward, and for each token id the expert that loses least.

1. Token ids are clustered by which neurons they move (balanced k-means of the mean activations).
2. In turns: each expert takes the neurons that vary most on its tokens, then each id takes the expert of the least
   error, balanced. Neurons that all tokens need come into all experts so; nothing says how many.
3. The least squares on each expert's tokens say which neurons are kept in the end, and correct w2 and b2 for the rest.
4. Ids of few tokens, and ids that the text lacks, go by what a ridge regression on the embeddings says of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moebert_kernels.convert.assignment import balanced_assignment
from moebert_kernels.convert.correction import Moments, Refit, prune, refit, strongest
from moebert_kernels.convert.site_errors import SiteErrors
from moebert_kernels.convert.split import default_split, expert_indices
from moebert_kernels.convert.tables import random_hash_table
from moebert_kernels.layers.config import MoEConfig

_MARGIN = 0.5  # of what `max_load` allows beyond an even share: other text of the kind is less even
_ROUNDS = 3  # of experts and tables in turns
_CLUSTER_ROUNDS = 10
_CLUSTERED_IDS = 4096  # the most frequent ids, which make the first clusters
_PRIOR_TOKENS = 1.0  # as many tokens the embeddings' prediction counts
_PRIOR_RIDGE = 30.0  # ids, of the regression on embeddings of unit mean square
_SHRINK = 2.0  # tokens of the whole text, for each neuron of an expert, in the least squares of the expert


@dataclass(frozen=True)
class SiteReport:
    """Errors of one feed-forward on text that did not choose, as `SiteErrors` has them.

    Attributes:
        name: of the feed-forward.
        dense: of one feed-forward for all tokens, with as many neurons as an expert and the same correction.
        random: of MoEBERT's split with a random table, uncorrected; None where it is not measured.
        chosen: of the experts and the table.
        best: of these experts if each token had its best one.
        load: tokens of the fullest expert, relative to the E-th part.
        common: neurons that are in every expert.
        unseen: share of the tokens whose ids the choosing text did not have.
        shares: of the tokens, for each expert.
    """

    name: str
    dense: float
    random: float | None
    chosen: float
    best: float
    load: float
    common: int
    unseen: float
    shares: list[float] = field(default_factory=list)

    @property
    def least(self) -> float | None:
        """Tokens of the emptiest expert, relative to the E-th part; None where the shares are not known."""
        return min(self.shares) * len(self.shares) if self.shares else None


class SiteChoice(NamedTuple):
    """What was chosen for one feed-forward.

    Attributes:
        indices: (E, I) neurons of each expert.
        table: (V,) expert of each token id.
        w2, b2: (E, H, I), (E, H) float32, as corrected; b2 is None where the dense layer has none.
        known: (V,) bool, ids that the text had.
        strength: (D,) how much each neuron's part of the output varies, a ranking without labels.
        dense: the best feed-forward of I neurons for all tokens, corrected.
        report: how good it is.
    """

    indices: Tensor
    table: Tensor
    w2: Tensor
    b2: Tensor | None
    known: Tensor
    strength: Tensor
    dense: Refit
    report: SiteReport

    def experts(self, device: torch.device) -> list[Refit]:
        """The experts' neurons and second weights, on a device."""
        parts = zip(self.indices, self.w2, [None] * len(self.w2) if self.b2 is None else self.b2, strict=True)
        return [_on(Refit(*part), device) for part in parts]

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a layer's experts that the correction changes, by their names in the layer."""
        made = {"experts.w2": self.w2, "experts.b2": self.b2}
        return {name: tensor.to(dtype) for name, tensor in made.items() if tensor is not None}


class SiteChooser:
    """Chooses for one feed-forward.

    Args:
        name: of the feed-forward, for the report.
        site: its errors on some text.
        embeddings: (V, any) of the model's token ids.
        config: with every choice made.
        seed: of what is random.
        table: (V,) to be kept as it is; None: one is chosen.
    """

    def __init__(
        self, name: str, site: SiteErrors, embeddings: Tensor, config: MoEConfig, seed: int, table: Tensor | None = None
    ) -> None:
        self.name, self.site, self.config, self.given = name, site, config, table
        self.generator = torch.Generator().manual_seed(seed)
        self.E = config.num_experts
        assert config.expert_size is not None
        self.size = config.expert_size
        ids = site.text.ids[site.train]
        self.types, self.type_of = ids.unique(return_inverse=True)  # (n,), and of each choosing token
        self.counts = torch.bincount(self.type_of, minlength=len(self.types)).float()
        self.whole: Moments | None = None  # of all tokens that choose
        self.max_load = 1 + _MARGIN * (config.max_load - 1)
        self.embeddings = embeddings.detach().float().to(ids.device)

    def choose(self, indices: Tensor | None = None) -> SiteChoice:
        """The choice; with the neurons `indices` (E, I) of the experts given, of the table alone."""
        site, config = self.site, self.config
        if indices is not None:
            experts = [self._plain(kept) for kept in indices.to(site.w2.device)]
            table = self._table(experts)
            return self._choice(experts, table)
        table = self._first_clusters() if self.given is None else self.given.to(site.w2.device)
        for _ in range(_ROUNDS if self.given is None else 1):
            experts = self._experts(table)
            table = self._table(experts)
        if config.correction:
            experts = self._corrected(table)
            table = self._table(experts)
        return self._choice(experts, table)

    def _plain(self, kept: Tensor) -> Refit:
        return Refit(kept, self.site.w2[:, kept], self.site.b2)

    def _group(self, table: Tensor) -> Tensor:
        """The expert of each choosing token."""
        return table[self.types][self.type_of]

    def _first_clusters(self) -> Tensor:
        """A table (V,): balanced k-means of ids by the squared deviations of their mean activations, times w2's."""
        often = self.counts.argsort(descending=True, stable=True)[:_CLUSTERED_IDS]
        group = torch.full((len(self.types),), len(often), device=often.device)
        group[often] = torch.arange(len(often), device=often.device)
        _, means, _ = self.site.means(group[self.type_of], len(often) + 1)
        weight, counts = self.site.w2.square().sum(0), self.counts[often]
        means = means[: len(often)]
        centre = (counts[:, None] * means).sum(0) / counts.sum()
        points = F.normalize((means - centre).square() * weight, dim=1)
        # the centres begin at ids drawn by how often they occur, far from those before
        distance, chosen = torch.ones(len(often), device=often.device), []
        for _ in range(self.E):
            drawn = int(torch.multinomial((distance * counts).cpu().double() + 1e-12, 1, generator=self.generator))
            chosen.append(drawn)
            distance = torch.minimum(distance, (1 - points @ points[drawn]).clamp(min=0))
        centres = points[chosen]
        for _ in range(_CLUSTER_ROUNDS):
            far = 1 - points @ F.normalize(centres, dim=1).T
            expert = balanced_assignment(far, counts, self.max_load).expert.to(points.device)
            centres = torch.zeros_like(centres).index_add_(0, expert, points * counts[:, None])
        table = random_hash_table(len(self.embeddings), self.E, self.generator).to(points.device)
        table[self.types[often]] = expert
        return table

    def _experts(self, table: Tensor) -> list[Refit]:
        """Each expert's neurons that vary most on its tokens, and b2 corrected for the means of those cut."""
        site, group = self.site, self._group(table)
        weight, mean, square = site.means(group, self.E)
        whole_weight = weight.sum()
        whole, whole_square = ((weight[:, None] * t).sum(0) / whole_weight for t in (mean, square))
        pseudo = _SHRINK * self.size * float(whole_weight) / len(site.train)  # of the whole text, for small experts
        centred = site.b2 is not None
        experts = []
        always = self._always(square=whole_square - whole.square() if centred else whole_square)
        for e in range(self.E):
            a = weight[e] / (weight[e] + pseudo)
            m, s = a * mean[e] + (1 - a) * whole, a * square[e] + (1 - a) * whole_square
            strength = (s - m.square() if centred else s) * site.w2.square().sum(0)
            strength[always] = torch.inf
            kept = strength.argsort(descending=True, stable=True)[: self.size]
            if self.config.correction and site.b2 is not None:
                b2 = site.b2 + site.w2 @ m - site.w2[:, kept] @ m[kept]
                experts.append(Refit(kept, site.w2[:, kept], b2))
            else:
                experts.append(self._plain(kept))
        return experts

    def _always(self, square: Tensor) -> Tensor:
        """The neurons that the configuration wants in every expert."""
        strength = square * self.site.w2.square().sum(0)
        return strength.argsort(descending=True, stable=True)[: self.config.num_shared_neurons or 0]

    def _corrected(self, table: Tensor) -> list[Refit]:
        *parts, self.whole = self.site.moments(self._group(table), self.E)
        pseudo = _SHRINK * self.size * self.whole.weight / len(self.site.train)
        always = strongest(self.site.w2, self.whole, self.config.num_shared_neurons or 0)
        return [self._least_squares(part.mixed_with(self.whole, pseudo), always) for part in parts]

    def _least_squares(self, moments: Moments, always: Tensor | None = None) -> Refit:
        kept = prune(self.site.w2, moments, self.size, always)
        return refit(self.site.w2, self.site.b2, moments, kept)

    def _table(self, experts: list[Refit]) -> Tensor:
        """The table (V,) of the least error of these experts, balanced; the given one where there is one."""
        if self.given is not None:
            return self.given.to(self.types.device)
        errors = self.site.errors(experts, self.site.train)
        n, E = len(self.types), self.E
        mean = torch.zeros(n, E, device=errors.device).index_add_(0, self.type_of, errors) / self.counts[:, None]
        level = mean.mean(1, keepdim=True)
        predicted = self._predicted(mean - level)
        seen = predicted[self.types]
        share = (self.counts / (self.counts + _PRIOR_TOKENS))[:, None]
        judged = share * (mean - level) + (1 - share) * seen
        found = balanced_assignment(judged, self.counts, self.max_load)
        table = (predicted.double() + found.prices.to(predicted.device)).argmin(1)
        table[self.types] = found.expert.to(table.device)
        return table

    def _predicted(self, values: Tensor) -> Tensor:
        """(V, E) of every id from `values` (n, E) of those in the text: ridge regression on the embeddings."""
        known = self.embeddings[self.types]
        centre, scale = known.mean(0), (known - known.mean(0)).square().mean().sqrt().clamp(min=1e-12)
        weight = (self.counts / (self.counts + 4.0))[:, None]
        middle = (weight * values).sum(0) / weight.sum()
        z = (known - centre) / scale
        gram = z.T @ (weight * z) + _PRIOR_RIDGE * torch.eye(z.shape[1]).to(z)
        slope: Tensor = torch.linalg.solve(gram, z.T @ (weight * (values - middle)))
        return self.embeddings @ (slope / scale) + (middle - centre @ slope / scale)

    def _choice(self, experts: list[Refit], table: Tensor) -> SiteChoice:
        site = self.site
        if self.whole is None:
            self.whole = site.moments(torch.zeros_like(self.type_of), 1)[-1]
        strength = self.whole.covariance.diagonal() * site.w2.square().sum(0)
        known = torch.zeros(len(self.embeddings), dtype=torch.bool, device=table.device)
        known[self.types] = True
        choice = SiteChoice(
            torch.stack([e.kept for e in experts]).cpu(), table.cpu(), torch.stack([e.w2 for e in experts]).cpu(),
            None if site.b2 is None else torch.stack([e.b2 for e in experts if e.b2 is not None]).cpu(),
            known.cpu(), strength.cpu(),
            _on(self._least_squares(self.whole), torch.device("cpu")),
            SiteReport(self.name, 0.0, None, 0.0, 0.0, 0.0, 0, 0.0),
        )  # fmt: skip
        report = judge(self.name, site, choice, site.judged)
        if site.text.gradient is not None:
            weighted = site.moments(torch.zeros_like(self.type_of), 1, site.weight_by_gradient())[-1]
            choice = choice._replace(dense=_on(self._least_squares(weighted), torch.device("cpu")))
        return choice._replace(report=replace(report, random=self._random_error(strength.cpu())))

    def _random_error(self, strength: Tensor) -> float:
        """Of MoEBERT's split by the activations' strength, with a random table and no correction."""
        site, D = self.site, self.site.w2.shape[1]
        size, shared = default_split(D, self.size)
        while shared + (D - shared) // self.E < size:  # experts of many neurons share more
            shared += 1
        split = expert_indices(strength, self.E, size, shared).to(site.w2.device)
        errors = site.errors([self._plain(kept) for kept in split], site.judged)
        table = random_hash_table(len(self.embeddings), self.E, self.generator).to(errors.device)
        return float(errors.gather(1, table[site.text.ids[site.judged]][:, None]).mean())


def judge(name: str, site: SiteErrors, choice: SiteChoice, tokens: Tensor) -> SiteReport:
    """The report of a choice on some tokens of a text, without the error of random tables."""
    device, E = site.w2.device, len(choice.indices)
    ids = site.text.ids[tokens]
    errors, expert = site.errors(choice.experts(device), tokens), choice.table.to(device)[ids]
    dense = site.errors([_on(choice.dense, device)], tokens)
    inside = torch.bincount(choice.indices.flatten(), minlength=site.w2.shape[1])
    shares = (torch.bincount(expert, minlength=E) / len(ids)).tolist()
    return SiteReport(
        name, float(dense.mean()), None, float(errors.gather(1, expert[:, None]).mean()),
        float(errors.min(1).values.mean()), max(shares) * E, int((inside == E).sum()),
        1.0 - float(choice.known.to(device)[ids].float().mean()), shares,
    )  # fmt: skip


def _on(part: Refit, device: torch.device) -> Refit:
    return Refit(part.kept.to(device), part.w2.to(device), None if part.b2 is None else part.b2.to(device))
