"""README's table of whole encoders for inference, from the results of `python -m benchmarks.serving`.

python -m benchmarks.serving_report RESULT.json README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- serving: begin -->\n", "<!-- serving: end -->\n"
ROWS = {
    "dense float32 plain": "dense, float32",
    "dense bfloat16": "dense, bfloat16",
    "dense int8": "dense, int8, by `prepare`",
    "dense int8-bfloat16": "dense, int8-bfloat16, by `prepare`",
    "dense int8 onnx": "dense, int8, ONNX Runtime",
    "dense int8 openvino": "dense, int8, OpenVINO",
    "ideal int8": "dense of the same FLOPs, int8, by `prepare`",
    "ideal int8-bfloat16": "dense of the same FLOPs, int8-bfloat16, by `prepare`",
    "moe float32 plain": "ours, float32",
    "moe bfloat16": "ours, bfloat16",
    "moe int8": "**ours, int8, by `prepare`**",
    "moe int8-bfloat16": "**ours, int8-bfloat16, by `prepare`**",
    "moe int8 onnx": "**ours, int8, exported to ONNX**",
    "moe int8 openvino": "**ours, int8, exported to ONNX, in OpenVINO**",
}


def table(result: dict[str, Any]) -> str:
    """The block between the marks: times and speeds at every size, and which of the rows were left out and why."""
    cases, environment = result["cases"], result["environment"]
    sizes = [f"B = {case['B']}, T = {case['T']}" for case in cases]
    lines = [
        f"Whole BERT-base with random weights, {environment['cpu']}, {environment['threads']} thread, torch "
        f"{environment['torch']}, commit {environment['commit']}, {environment['date']}; random tables and tokens, "
        "float32 as transformers runs it, bfloat16 by `prepare`, int8 without `batches`. Median times, and in brackets "
        "the speed over the first row in the same rounds:",
        "",
        f"| model | {' | '.join(sizes)} |",
        f"|---|{'---|' * len(sizes)}",
    ]
    for way, name in ROWS.items():
        if way in cases[0]["ms"]:
            cells = [f"{case['ms'][way][1]:.1f} ms ({case['over'][way][1]:.2f})" for case in cases]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    if out := [f"{ROWS[way]} ({why})" for way, why in result.get("left_out", {}).items() if way in ROWS]:
        lines += ["", f"Left out: {'; '.join(out)}."]
    return "\n".join(lines) + "\n"


def main(result: str, readme: str) -> None:
    text = Path(readme).read_text(encoding="utf-8")
    (before, rest), block = text.split(BEGIN), table(json.loads(Path(result).read_text(encoding="utf-8")))
    Path(readme).write_text(before + BEGIN + block + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
