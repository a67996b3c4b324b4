"""The README's table of served encoders is the committed result's."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import serving_report

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks/results/amd-epyc/serving/bert-base-1-threads.json"


def test_the_readme_has_the_committed_results_table(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    serving_report.main(str(RESULT), str(readme))
    assert readme.read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8")


def test_a_way_that_was_left_out_has_no_row_and_a_reason():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    for case in result["cases"]:
        case["ms"].pop("dense int8 openvino", None)
    result["left_out"] = {"dense int8 openvino": "too far"}
    lines = serving_report.table(result).splitlines()
    assert lines[-1] == "Left out: dense, int8, OpenVINO (too far)."
    assert not any(line.startswith("| dense, int8, OpenVINO") for line in lines)
