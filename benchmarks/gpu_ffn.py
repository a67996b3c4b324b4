"""The feed-forward op on a GPU: CUDA-graph replays, checked first, interleaved, against dense layers and other ways.

bfloat16, E = 4, H = I = 768, ragged groups with the experts' shares of real text (`real_text.json`). A provider is
captured into a CUDA graph once and replayed in rounds; a round's order changes, its times come from CUDA events, and
ratios are taken round by round. Warm: the replay before has just run. Cold: the L2 is overwritten before each replay.
"""

from __future__ import annotations

import random
import statistics
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baselines
from benchmarks.bench_ffn import runner
from benchmarks.gate import check
from benchmarks.measuring import Outputs, Provider, speed_ratio, spread
from benchmarks.real_text import expert_shares
from moebert_kernels import fused_moe_ffn, group_tokens, reference

H, I, D, E = 768, 768, 3072, 4
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)
# T: forward at most (us), forward over the best dense layer, forward and backward over the best dense layer
WANTED = {256: (20, 1.0, 1.0), 4096: (30, 2.5, 2.2), 16384: (80, 3.2, 2.8), 65536: (280, 3.4, 3.0)}
DENSE = ("dense", "dense_compiled")
PEERS = ("loop_of_linear", "grouped_mm", "transformers_grouped_mm")
FLUSHED_BYTES = 256 * 2**20  # four times the L2 of an H200


def expert_ids(tokens: int, generator: torch.Generator) -> Tensor:
    """(T,) random ids with the shares that real text gives a hash table's experts."""
    shares = torch.tensor(expert_shares(), dtype=torch.float64)
    return torch.multinomial(shares, tokens, replacement=True, generator=generator)


def providers(tokens: int, direction: str, device: torch.device, dtype: torch.dtype) -> dict[str, Provider]:
    """Everything that is compared, by name."""
    generator = torch.Generator().manual_seed(tokens)

    def new(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    def weights(*lead: int, width: int) -> list[Tensor]:
        return [new(*lead, width, H, scale=H**-0.5), new(*lead, width), new(*lead, H, width, scale=width**-0.5),
                new(*lead, H)]  # fmt: skip

    ids = expert_ids(tokens, generator).to(device)
    grouping = group_tokens(ids, E)
    counts = torch.bincount(ids, minlength=E).tolist()
    order = grouping.row_to_token.long()
    x, dy, moe, dense = new(tokens, H), new(tokens, H), weights(E, width=I), weights(width=D)

    def provide(function: Callable[..., Tensor], parameters: list[Tensor], exact: Callable[..., Tensor]) -> Provider:
        return Provider(
            runner(function, x, parameters, dy, direction),
            lambda wanted: runner(
                exact, x.to(wanted), [w.to(wanted) for w in parameters], dy.to(wanted), direction
            )(),
        )  # fmt: skip

    def exact(x: Tensor, *parameters: Tensor) -> Tensor:
        return reference.fused_moe_ffn(x, ids, *parameters)

    def loop(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        experts = zip(x[order].split(counts), w1.unbind(), b1.unbind(), w2.unbind(), b2.unbind(), strict=True)
        rows = torch.cat([baselines.dense_ffn(r, *e) for r, *e in experts if len(r)])
        return torch.zeros_like(x).index_copy(0, order, rows)

    def grouped_mm(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        owner, ends = ids[order], grouping.offsets[1:]
        h = F.gelu(F.grouped_mm(x[order], w1.transpose(1, 2), offs=ends) + b1[owner])
        rows = F.grouped_mm(h, w2.transpose(1, 2), offs=ends) + b2[owner]
        return torch.zeros_like(x).index_copy(0, order, rows)

    ones = torch.ones(tokens, 1, device=device, dtype=dtype)

    def transformers_grouped_mm(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        from transformers.integrations.moe import grouped_mm_experts_forward

        experts = types.SimpleNamespace(
            up_proj=w1, up_proj_bias=b1, down_proj=w2, down_proj_bias=b2, act_fn=F.gelu, num_experts=E,
            has_gate=False, has_bias=True, is_transposed=False, is_concatenated=True, has_post_expert_norm=False,
            _is_expert_parallel=False,
        )  # fmt: skip
        return grouped_mm_experts_forward(experts, x, ids[:, None], ones)

    return {
        "moebert_kernels": provide(lambda x, *p: fused_moe_ffn(x, grouping, *p), moe, exact),
        "moebert_kernels_with_grouping": provide(lambda x, *p: fused_moe_ffn(x, ids, *p), moe, exact),
        "dense": provide(baselines.dense_ffn, dense, baselines.dense_ffn),
        "dense_compiled": provide(torch.compile(baselines.dense_ffn), dense, baselines.dense_ffn),
        "ideal": provide(baselines.dense_ffn, weights(width=I), baselines.dense_ffn),
        "loop_of_linear": provide(loop, moe, exact),
        "grouped_mm": provide(grouped_mm, moe, exact),
        "transformers_grouped_mm": provide(transformers_grouped_mm, moe, exact),
    }


def captured(run: Callable[[], Outputs]) -> Callable[[], None]:
    """`run` as a CUDA graph: replaying it costs one launch and allocates nothing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def replay_us(replay: Callable[[], None], before: Callable[[], object], times: int) -> float:
    """Microseconds of one replay: the mean of `times` in a row, each after `before`."""
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(times)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        before()
        start.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))


def measure(runs: Mapping[str, Callable[[], Outputs]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Interleaved microseconds, {"warm": {provider: one time per round}, "cold": ...}."""
    replays, refused = {}, {}
    for name, run in runs.items():
        try:
            replays[name] = captured(run)
        except Exception as error:  # a provider that synchronises cannot be captured
            refused[name] = f"{type(error).__name__}: {error}"
            torch.cuda.synchronize()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    ways = {"warm": lambda: None, "cold": flushed.zero_}
    samples: dict[str, dict[str, list[float]]] = {way: {name: [] for name in replays} for way in ways}
    order = list(replays)
    shuffled = random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for way, before in ways.items():
            for name in order:
                samples[way][name].append(replay_us(replays[name], before, times=5))
    for name, reason in refused.items():
        print(f"  {name}: not captured: {reason.splitlines()[0]}")
    return samples


def run_case(tokens: int, direction: str, rounds: int) -> dict[str, Any]:
    """One row of the table, as plain data: times, ratios, memory, and what was refused and why."""
    device = torch.device("cuda")
    made = providers(tokens, direction, device, torch.bfloat16)
    checked = check(made)
    samples = measure({name: provider.run for name, provider in checked.passed.items()}, rounds)
    torch.cuda.reset_peak_memory_stats()
    base_bytes = torch.cuda.memory_allocated()
    made["moebert_kernels"].run()
    peak_mib = (torch.cuda.max_memory_allocated() - base_bytes) / 2**20
    flops = 4 * tokens * H * I * (1 if direction == "forward" else 3)
    times = {}
    for way, of_way in samples.items():
        for name, values in of_way.items():
            q1, median, q3 = spread(values)
            times.setdefault(name, {})[f"{way}_us"] = [round(v, 2) for v in (q1, median, q3)]
            if way == "warm" and not name.startswith("dense"):
                times[name]["tflops"] = round(flops / median / 1e6, 1)
    warm = samples["warm"]
    ratios = {
        other: [round(value, 3) for value in ratio]
        for other in warm
        if (ratio := speed_ratio(warm, "moebert_kernels", other)) is not None
    }
    entry = {
        "T": tokens, "direction": direction, "dtype": "bfloat16", "E": E, "H": H, "I": I, "D": D, "rounds": rounds,
        "times": times, "speed_of_moebert_kernels_over": ratios, "refused": checked.refused,
        "peak_mib": round(peak_mib, 1),
    }  # fmt: skip
    return entry | {"missed": missed(entry)}


def missed(entry: Mapping[str, Any]) -> list[str]:
    """The requirements that this row does not meet."""
    if "moebert_kernels" not in entry["times"]:
        return [f"moebert_kernels: {entry['refused'].get('moebert_kernels', 'not captured')}"]
    ratios, found = entry["speed_of_moebert_kernels_over"], []
    over_dense = min((ratios[name][1] for name in DENSE if name in ratios), default=None)
    if entry["T"] in WANTED:
        most_us, forward, both = WANTED[entry["T"]]
        median = entry["times"]["moebert_kernels"]["warm_us"][1]
        if entry["direction"] == "forward" and median > most_us:
            found.append(f"expected at most {most_us} us, got {median}")
        wanted = forward if entry["direction"] == "forward" else both
        if over_dense is None or round(over_dense, 2) < wanted:
            found.append(f"expected {wanted} times the best dense layer's speed, got {over_dense}")
    slower = [f"{name} {ratios[name][1]}" for name in PEERS if name in ratios and round(ratios[name][1], 2) < 1.0]
    return found + [f"expected never to be slower than {name}" for name in slower]


def run(rounds: int) -> list[dict[str, Any]]:
    """Every case, printed as it is done."""
    entries = []
    for direction in ("forward", "forward_backward"):
        for tokens in TOKENS:
            entry = run_case(tokens, direction, rounds)
            print(f"T={tokens} {direction}")
            for name, time in entry["times"].items():
                ratio = entry["speed_of_moebert_kernels_over"].get(name)
                print(f"  {name:30} warm {time['warm_us'][1]:9.1f} us  cold {time['cold_us'][1]:9.1f} us"
                      + (f"   ours is {ratio[1]:.2f}x" if ratio else ""), flush=True)  # fmt: skip
            for line in [*entry["refused"].items(), *entry["missed"]]:
                print(f"  NOT AS WANTED: {line}")
            entries.append(entry)
    return entries
