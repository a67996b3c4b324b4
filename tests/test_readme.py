"""The Python snippets of the README and of two guides run as printed, each in a process of its own."""

import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "docs/guide/conversion.md", ROOT / "docs/guide/routing.md"]
SNIPPETS = [
    snippet
    for page in PAGES
    for snippet in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet_runs_as_printed(snippet, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}  # also where the package is not installed
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_has_a_snippet_for_the_models_and_one_for_the_op():
    assert any("convert_to_moe(" in snippet for snippet in SNIPPETS)
    assert any("fused_moe_ffn(" in snippet for snippet in SNIPPETS)
