"""What `moebert doctor` prints: its report as text, and what that means for a person."""

from __future__ import annotations

from typing import Any

import torch

from moebert_kernels.errors import how_to_install

_OF_MODELS = ("transformers", "accelerate", "datasets")
_TITLES = {
    "versions": "versions", "machine": "machine", "triton": "Triton, for GPUs",
    "native": "CUDA kernels, for GPUs: optional, and used only where they are asked for",
}  # fmt: skip


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = []
    for title in _TITLES:
        lines += [_TITLES[title], *_table(report[title])]
    backends = report["backends"]
    if not isinstance(backends, str):
        backends = {op: f"{choice['backend']:8} {choice['reason']}" for op, choice in backends.items()}
        if not report["machine"]["gpus"] and all(reason.startswith("torch") for reason in backends.values()):
            backends = "plain torch, since Triton's and CUDA's kernels need a GPU (--json gives the reason of each op)"
    lines += ["what runs the ops", *_table(backends)]
    for title, name in (("self-test, a few tokens against the reference", "self_test"), ("CUDA", "cuda_self_test")):
        if results := report[name]:
            verdicts = {test: f"{'ok' if r['ok'] else 'FAILED':8} {r['message']}" for test, r in results.items()}
            lines += [title, *_table(verdicts)]
    return "\n".join([*lines, "what this means", *(f"  {line}" for line in meaning(report))])


def meaning(report: dict[str, Any]) -> list[str]:
    """What the report means for a person: what works, what does not matter, and what to do."""
    machine, triton = report["machine"], report["triton"]
    if report["ok"]:
        lines = ["Every op runs here and agrees with its reference."]
    else:
        wrong = [name for part in ("self_test", "cuda_self_test") for name, r in report[part].items() if not r["ok"]]
        lines = [f"AN OP FAILED ({', '.join(wrong)}): do not trust it, and report it with `moebert doctor --json`."]
    if not machine["gpus"]:
        lines += ["There is no GPU that torch can use, so the ops run on the CPU. Nothing is missing for that."]
        if torch.version.cuda is None:
            lines += ["If the machine has an NVIDIA GPU: this torch is built without CUDA; install one with it."]
    elif isinstance(triton, dict) and triton["usable"]:
        lines += ["The ops run on the GPU, in Triton's kernels. The CUDA kernels are optional."]
    else:
        lines += ["Triton's kernels do not run, for the reason above: on the GPU the ops are slower, in plain torch."]
    serving = machine["serving on the cpu"]
    for dtype in ("int8", "bfloat16"):
        if isinstance(serving, dict) and not serving[f"{dtype} instructions"]:
            lines += [f"This CPU has no instructions for {dtype}: a model that is prepared in it gains less time."]
    if missing := [name for name in _OF_MODELS if report["versions"][name] == "not installed"]:
        need = f"converting and training need {', '.join(missing)}; run {how_to_install('train')}"
        lines += [f"The ops alone are installed: {need}"]
    return lines


def _table(values: Any) -> list[str]:
    if not isinstance(values, dict):
        return [f"  {values}"]
    width = max(len(name) for name in values)
    return [f"  {name:{width}}  {_text(value)}" for name, value in values.items()]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(str(item) for item in value) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_text(item)}" for name, item in value.items()) or "none"
    return str(value)
