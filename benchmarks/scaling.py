"""More than one GPU: what expert parallelism and data parallelism cost, by `benchmarks.model` and stated assumptions.

Data parallelism (DP): every GPU holds all experts and computes its own T tokens; a training step sums all gradients.
Expert parallelism (EP): P GPUs hold E / P experts each; a layer sends its tokens to their experts' GPUs and back, twice
forward and twice backward, and a training step sums the gradients of what is not an expert. Per GPU and direction:

    DP sends 2 (P - 1) / P  x  gradients of all parameters      a step    (ring all-reduce)
    EP sends 2 (P - 1) / P  x  gradients of the shared ones     a step
             + 4 L (P - 1) / P  x  T top_k H elements           a step, half of that in inference

All of EP's exchanges wait for the layer before and are waited for by the next; DP's sum runs beside the backward pass.
The optimizer is left out: sharded over the GPUs (as FSDP does, for the bytes of the all-reduce) it costs both the same.
Everywhere: bfloat16, top_k = 1, experts of a quarter of the dense width, tokens spread evenly over experts and GPUs.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.model import ENCODERS, Encoder, encoder_cost, op_cost

MODELS = ("bert-base", "bert-large", "t5-base")
EXPERTS = (4, 8, 16, 32, 64)
SEQUENCE = 128
BYTES = 2  # bfloat16, weights and gradients
STATE_BYTES = 16  # a trained parameter, unsharded: bfloat16 weight and gradient, float32 copy and Adam's two moments
REAL_TEXT = Path(__file__).parent / "real_text.json"


@dataclass(frozen=True)
class Roof:
    """One GPU: the rates of a large bfloat16 product and of a device copy. These two were measured on an H200."""

    tflops: float = 790.0
    gbytes_per_s: float = 4300.0


@dataclass(frozen=True)
class Link:
    """What a GPU can send to others, in one direction, while it receives as much.

    Attributes:
        latency_us: of one exchange between all GPUs, however small.
    """

    name: str
    gbytes_per_s: float
    latency_us: float

    def ms(self, sent: float, exchanges: int = 0) -> float:
        return sent / (self.gbytes_per_s * 1e6) + exchanges * self.latency_us / 1e3


NVLINK = Link("NVLink", 450.0, 5.0)
PCIE = Link("PCIe 5.0 x16", 64.0, 10.0)
INFINIBAND = Link("InfiniBand NDR", 50.0, 10.0)
LINKS = (NVLINK, PCIE, INFINIBAND)


def gpus(E: int) -> int:
    """One node of eight GPUs, or one GPU for each expert."""
    return min(8, E)


def parameters(encoder: Encoder, E: int) -> int:
    return encoder.shared_parameters() + encoder.expert_parameters(E, encoder.D // 4)


def break_even_tokens(encoder: Encoder, E: int, top_k: int = 1) -> float:
    """Tokens per GPU and step above which EP sends more than DP, whatever the link and P.

    2 x gradients of the experts = 4 L T top_k H elements, both of BYTES.
    """
    return 2 * encoder.expert_parameters(E, encoder.D // 4) / (4 * encoder.L * top_k * encoder.H)


@dataclass(frozen=True)
class Step:
    """Milliseconds of a training step of one GPU at the roof.

    Attributes:
        compute: forward and backward.
        sums: all-reduce of gradients.
        exchanges: tokens to experts and back.
    """

    compute: float
    sums: float
    exchanges: float

    @property
    def total(self) -> float:
        """The sums run beside the backward pass, two thirds of the compute, as far as they fit."""
        return self.compute + self.exchanges + max(0.0, self.sums - 2 / 3 * self.compute)


def training(encoder: Encoder, E: int, T: int, link: Link, roof: Roof, expert_parallel: bool) -> Step:
    """T tokens on each GPU, in sequences of SEQUENCE."""
    P = gpus(E)
    own = E // P if expert_parallel else E
    cost = encoder_cost(
        encoder, "forward_backward", B=T // SEQUENCE, S=SEQUENCE, E=own, I=encoder.D // 4, dtype="bfloat16"
    )
    summed = encoder.shared_parameters() if expert_parallel else parameters(encoder, E)
    share = (P - 1) / P
    tokens = 4 * encoder.L * share * T * encoder.H * BYTES if expert_parallel else 0.0
    return Step(
        cost.roof_ms(roof.tflops, roof.gbytes_per_s),
        link.ms(2 * share * summed * BYTES),
        link.ms(tokens, 4 * encoder.L) if expert_parallel else 0.0,
    )


def inference_us(encoder: Encoder, E: int, T: int, link: Link, roof: Roof, expert_parallel: bool) -> float:
    """One layer's experts for T tokens on each GPU, in microseconds; DP sends nothing."""
    P = gpus(E)
    own = E // P if expert_parallel else E
    cost = op_cost("fused_moe_ffn_add_norm", "forward", T=T, E=own, H=encoder.H, I=encoder.D // 4, dtype="bfloat16")
    sent = 2 * (P - 1) / P * T * encoder.H * BYTES
    exchange = link.ms(sent, 2) if expert_parallel else 0.0
    return 1e3 * (cost.roof_ms(roof.tflops, roof.gbytes_per_s) + exchange)


def enough_tokens(encoder: Encoder, E: int, link: Link, roof: Roof) -> int:
    """The smallest power of two of tokens per GPU and step at which a DP step takes no longer than an EP step."""
    T = SEQUENCE
    while step_pair(encoder, E, T, link, roof)[0] > step_pair(encoder, E, T, link, roof)[1]:
        T *= 2
    return T


def step_pair(encoder: Encoder, E: int, T: int, link: Link, roof: Roof) -> tuple[float, float]:
    """Milliseconds of a DP and of an EP step."""
    return tuple(training(encoder, E, T, link, roof, parallel).total for parallel in (False, True))


def busiest(kind: str) -> float:
    """Rows of the busiest of 4 experts over the mean, of MNLI's tokens: the mean over the committed tables."""
    tables_of_kind = json.loads(REAL_TEXT.read_text())["expert_shares"][kind]
    return statistics.mean(max(shares) * len(shares) for shares in tables_of_kind)


def tables(roof: Roof) -> str:
    """All tables as Markdown, as they stand in docs/guide/scaling.md."""
    return "\n\n".join(
        (
            f"Roof: {roof.tflops:g} TFLOP/s, {roof.gbytes_per_s:g} GB/s. The busiest of 4 experts has"
            f" {busiest('hash-random'):.2f} times the mean of MNLI's tokens with hash-random,"
            f" {busiest('hash-balance'):.2f} times with hash-balance.",
            "Table 1. Tokens per GPU and step above which expert parallelism sends more than data parallelism:",
            _table(HEAD, _per_experts(lambda encoder, E: f"{break_even_tokens(encoder, E):,.0f}")),
            "Table 2. Tokens per GPU and step (a power of two) from which a data-parallel step takes no longer:",
            _by_link(lambda encoder, E, link: f"{enough_tokens(encoder, E, link, roof):,}"),
            "Table 3. A training step of 4,096 tokens per GPU, ms at the roof, data-parallel / expert-parallel:",
            _by_link(lambda encoder, E, link: _pair(*step_pair(encoder, E, 4096, link, roof), ".1f")),
            "Table 4. One layer's experts in inference, us at the roof, data-parallel / expert-parallel:",
            _inference_table(roof),
            "Table 5. Memory of data-parallel training, GB per GPU without activations:",
            _table(HEAD, _per_experts(lambda encoder, E: f"{parameters(encoder, E) * STATE_BYTES / 1e9:.1f}")),
        )
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines))


HEAD = ["model", *(f"E = {E}" for E in EXPERTS)]


def _per_experts(cell: Callable[[Encoder, int], str]) -> list[list[str]]:
    return [[name, *(cell(ENCODERS[name], E) for E in EXPERTS)] for name in MODELS]


def _by_link(cell: Callable[[Encoder, int, Link], str]) -> str:
    lines = [
        [link.name, *line]
        for link in LINKS
        for line in _per_experts(lambda encoder, E, link=link: cell(encoder, E, link))
    ]
    return _table(["link", *HEAD], lines)


def _inference_table(roof: Roof) -> str:
    """T5-base has BERT-base's H and I: its layers take the same time."""
    lines = []
    for link in (NVLINK, INFINIBAND):
        for name in ("bert-base", "bert-large"):
            for T in (16, 128, 1024, 8192):
                pairs = (
                    [inference_us(ENCODERS[name], E, T, link, roof, parallel) for parallel in (False, True)]
                    for E in EXPERTS
                )
                lines.append([link.name, name, f"{T:,}", *(_pair(dp, ep, ".3g") for dp, ep in pairs)])
    return _table(["link", "model", "T per GPU", *HEAD[1:]], lines)


def _pair(dp: float, ep: float, form: str) -> str:
    """Bold where EP is faster."""
    return f"{dp:{form}} / **{ep:{form}}**" if ep < dp else f"{dp:{form}} / {ep:{form}}"
