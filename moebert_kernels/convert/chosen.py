"""Experts and hash tables that fit some text, for all feed-forwards of a model; if asked, kept on disk one by one."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from moebert_kernels.convert.chosen_site import SiteChoice, SiteChooser, SiteReport, judge
from moebert_kernels.convert.correction import Refit
from moebert_kernels.convert.importance_file import model_fingerprint
from moebert_kernels.convert.site_errors import SiteErrors
from moebert_kernels.convert.sites import Site, common_width, find_sites
from moebert_kernels.convert.split import check_split, default_split
from moebert_kernels.convert.text_pass import check_text, read_text
from moebert_kernels.errors import UserError
from moebert_kernels.files import write_json, write_tensors
from moebert_kernels.layers.config import MoEConfig
from moebert_kernels.layers.routing import stack_of

MOST_TOKENS = 32768  # of the text, read by default
_FEW_TOKENS = 4  # for each neuron of an expert: with fewer the least squares see little but noise
_MEMORY = 2 << 30  # bytes of inputs that one pass may keep; more feed-forwards take more passes


def choose_experts(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], config: MoEConfig | None = None, *,
    indices: Sequence[Tensor] | None = None, tables: Tensor | None = None, seed: int = 0,
    max_tokens: int = MOST_TOKENS, folder: str | Path | None = None, progress: bool = False, weigh_dense: bool = False,
) -> list[SiteChoice]:  # fmt: skip
    """Choose the neurons of the experts, their correction and the hash tables by unlabelled text.

    Of the text one sequence in eight only judges: the reports' errors are of text that chose nothing (of fewer than
    eight sequences all choose and judge). On a CPU the same text and seed give the same choice. Memory: `max_tokens` x
    H numbers for each feed-forward of a pass (2 GiB in all, or one feed-forward; more feed-forwards take more passes
    over the batches), 1 GiB of activations at most, and (E + 3) D^2 float32 for the feed-forward at work.

    Args:
        model: a dense model of transformers; not changed.
        batches: mappings of tensors with `input_ids` and, where there is padding, `attention_mask`. 20,000 tokens are
            enough to beat random tables; reading ends at `max_tokens`.
        config: of the conversion; None: `MoEConfig.chosen()`.
        indices: L times (E, I), the neurons of the experts, of which only the tables are chosen. None: chosen too.
        tables: (L, V) tables for which the experts are chosen. None: chosen too.
        seed: of all that is random.
        folder: keep the choice for each feed-forward here as soon as it is made; an interrupted call goes on.
        progress: show bars.
        weigh_dense: fit the dense feed-forwards (`SiteChoice.dense`) by labelled batches: half of a token's weight is
            the squared gradient of the model's loss. The reports have the errors without these weights. Experts do not
            gain by it, since their tables keep the tokens that matter, as [CLS], apart.

    Returns:
        A choice for each feed-forward.

    Raises:
        UserError: a model or sizes that do not fit, as for `convert_to_moe`; text of which no table can be made (none,
            a few ids, mostly ids unseen in the rest of it, one id for most tokens); labels that are missing; batches
            that cannot be read twice where they must be; a folder of another choice.
    """
    config = config or MoEConfig.chosen()
    sites = find_sites(model, None if config.target_modules is None else tuple(config.target_modules))
    D = common_width(sites)
    size = default_split(D, config.expert_size)[0]
    config = replace(config, expert_size=size)
    check_split(D, 1, size, config.num_shared_neurons or 0)
    without = [site.name for site in sites if stack_of(model, site.name) is None]
    if without:
        raise UserError(f"model: expected feed-forwards behind token ids, got {without[0]} of {type(model).__name__}")
    given = {"indices": indices, "tables": tables}
    kept = None if folder is None else _Folder(Path(folder), model, config, seed, max_tokens, weigh_dense, given)
    done: dict[int, SiteChoice] = {} if kept is None else kept.read(len(sites))
    missing = [n for n in range(len(sites)) if n not in done]
    bar = tqdm(total=len(sites), initial=len(done), desc="choosing experts", unit=" layers", disable=not progress)
    at_once = sites_at_once(sites, max_tokens)
    if len(missing) > at_once and iter(batches) is batches:
        raise UserError(
            f"batches: expected a list, or what can be read again: the {len(missing)} feed-forwards take "
            f"{-(-len(missing) // at_once)} passes, got {type(batches).__name__}"
        )
    with bar:
        for start in range(0, len(missing), at_once):
            numbers = missing[start : start + at_once]
            some = [sites[n] for n in numbers]
            texts: list[Any] = list(read_text(model, some, batches, max_tokens, progress, weigh_dense))
            for place, n in enumerate(numbers):
                text, texts[place] = texts[place], None  # what is done with is let go
                check_text(text, config.num_experts)
                if n == 0 and len(text.ids) < _FEW_TOKENS * size:
                    warnings.warn(
                        f"batches: {len(text.ids)} tokens are few to correct experts of {size} neurons by; 20,000 do",
                        stacklevel=2,
                    )
                if kept is not None:
                    kept.check_text(text.ids, _stack_name(model, sites[n]))
                site = sites[n]
                chooser = SiteChooser(
                    site.name, SiteErrors(site.weights(), site.activation, text),
                    stack_of(model, site.name).get_input_embeddings().weight, config, seed + n,
                    None if tables is None else tables[n].long(),
                )  # fmt: skip
                with torch.no_grad():
                    done[n] = chooser.choose(None if indices is None else indices[n])
                if kept is not None:
                    kept.write(n, done[n])
                bar.update()
    return [done[n] for n in range(len(sites))]


def judge_experts(
    model: nn.Module, choices: Sequence[SiteChoice], batches: Iterable[Mapping[str, Any]], *,
    target_modules: Sequence[str] | None = None, max_tokens: int = MOST_TOKENS, progress: bool = False,
) -> list[SiteReport]:  # fmt: skip
    """Measure choices on other text: their errors, how even the experts' tokens are, how many ids are new.

    Args:
        model: the dense model that they are for; not changed.
        choices: of `choose_experts`.
        batches, max_tokens, progress: as for `choose_experts`; all tokens are judged.
        target_modules: as in the configuration of the choice.

    Raises:
        UserError: no text, or choices for another model.
    """
    sites = find_sites(model, None if target_modules is None else tuple(target_modules))
    if len(sites) != len(choices):
        raise UserError(f"choices: expected {len(sites)}, one for each feed-forward, got {len(choices)}")
    texts = read_text(model, sites, batches, max_tokens, progress)
    reports = []
    with torch.no_grad():
        for site, text, choice in zip(sites, texts, choices, strict=True):
            errors = SiteErrors(site.weights(), site.activation, text)
            reports.append(judge(site.name, errors, choice, torch.arange(len(text.ids), device=text.ids.device)))
    return reports


def report_table(reports: Iterable[SiteReport]) -> str:
    """The reports as text of fixed width: a row for each feed-forward, and the means."""
    rows = list(reports)
    names = ["dense", "random", "chosen", "best", "least", "load", "common", "unseen"]
    means: dict[str, Any] = {}
    for name in names:
        values = [getattr(row, name) for row in rows]
        means[name] = None if None in values else sum(values) / len(values)
    width = max(len("feed-forward"), *(len(row.name) for row in rows))

    def line(name: str, values: Mapping[str, Any]) -> str:
        shown = ["-" if values[n] is None else f"{values[n]:.{0 if n == 'common' else 4}f}" for n in names]
        return f"{name:{width}}" + "".join(f"{cell:>8}" for cell in shown)

    lines = [f"{'feed-forward':{width}}" + "".join(f"{name:>8}" for name in names)]
    lines += [line(row.name, {name: getattr(row, name) for name in names}) for row in rows]
    return "\n".join([*lines, line("mean", means)])


def report_chart(reports: Iterable[SiteReport], width: int = 50) -> str:
    """The errors as bars, one line for each feed-forward: `#` the chosen experts', `-` what the dense one loses more.

    Args:
        reports: of `choose_experts` or `judge_experts`.
        width: of the longest bar, in characters.
    """
    rows = list(reports)
    most = max((max(row.chosen, row.dense) for row in rows), default=0.0) or 1.0
    label = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        chosen, dense = (round(width * error / most) for error in (row.chosen, row.dense))
        below = f"{100 - 100 * row.chosen / row.dense:.0f} % below dense" if row.dense else "no error"
        lines.append(f"{row.name:{label}} {'#' * chosen}{'-' * (dense - chosen)} {below}")
    return "\n".join(lines)


def sites_at_once(sites: Sequence[Site], max_tokens: int) -> int:
    weight = max((site.weights().w2 for site in sites), key=lambda w2: w2.shape[0])
    return max(1, _MEMORY // (max_tokens * weight.shape[0] * weight.element_size()))


def _stack_name(model: nn.Module, site: Site) -> str:
    stack: nn.Module = stack_of(model, site.name)
    return next(str(name) for name, module in model.named_modules() if module is stack)


def _digest(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


class _Folder:
    """The choices for a model that were made so far: a file for each feed-forward, and of what they are."""

    def __init__(
        self, path: Path, model: nn.Module, config: MoEConfig, seed: int, max_tokens: int, weigh_dense: bool,
        given: Mapping[str, Sequence[Tensor] | Tensor | None],
    ) -> None:  # fmt: skip
        self.path, self.facts_file = path, path / "choice.json"
        facts = {"config": config.to_dict(), "seed": seed, "max_tokens": max_tokens, "model": model_fingerprint(model)}
        facts |= {"weigh_dense": True} if weigh_dense else {}
        facts |= {name: _digest(*tensors) for name, tensors in given.items() if tensors is not None}
        self.facts = json.loads(json.dumps(facts))
        if self.facts_file.exists():
            found = json.loads(self.facts_file.read_text())
            texts = {name for name in found if name.split()[0] == "text"}
            names = [*self.facts, *(found.keys() - self.facts.keys() - texts)]
            other = [name for name in names if found.get(name) != self.facts.get(name)]
            if other:
                raise UserError(f"folder: expected the choice of this {other[0]}, got another one's in {path}")
            self.facts = found
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._write_facts()

    def _write_facts(self) -> None:
        write_json(self.facts_file, self.facts)

    def check_text(self, ids: Tensor, stack: str) -> None:
        """Raise a UserError where the files are of other text; encoder and decoder have one each."""
        digest = _digest(ids)
        if self.facts.setdefault(f"text {stack}".rstrip(), digest) != digest:
            raise UserError(f"folder: expected the choice of this text, got another one's in {self.path}")
        self._write_facts()

    def _file(self, n: int) -> Path:
        return self.path / f"feed-forward-{n:03d}.safetensors"

    def read(self, count: int) -> dict[int, SiteChoice]:
        return {n: _read_choice(self._file(n)) for n in range(count) if self._file(n).exists()}

    def write(self, n: int, choice: SiteChoice) -> None:
        named = choice._asdict() | {f"dense.{name}": t for name, t in choice.dense._asdict().items()}
        tensors = {name: t for name, t in named.items() if isinstance(t, Tensor)}
        write_tensors(self._file(n), tensors, {"report": json.dumps(asdict(choice.report))})


def _read_choice(path: Path) -> SiteChoice:
    try:
        with safe_open(path, "pt") as file:
            report = SiteReport(**json.loads(file.metadata()["report"]))
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        dense = Refit(**{name: tensors.pop(f"dense.{name}", None) for name in Refit._fields})
        return SiteChoice(**{"b2": None} | tensors, dense=dense, report=report)
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a choice of experts, got a damaged file; remove it ({error})") from None
