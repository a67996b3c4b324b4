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


def test_what_is_missed_is_listed():
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    required = result["cases"][0]["required"]
    required[:] = [[*required[0][:2], 99.0, required[0][3]]]
    assert "moe int8 over dense int8 at B = 1, T = 32 is 1.21 where 99.0 is wanted" in serving_report.table(result)
