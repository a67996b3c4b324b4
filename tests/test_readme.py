"""The Python snippets of the README and of the guide run as printed, each in a process of its own."""

import re

import pytest

from tests.forks import run_forked
from tests.helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/guide").glob("*.md"))]


def blocks(fence, pages=PAGES):
    """(page, text) of every block of that fence."""
    pattern = rf"^```{fence}\n(.*?)^```"
    return [(page.stem, text) for page in pages for text in re.findall(pattern, page.read_text(), re.M | re.S)]


SNIPPETS = blocks("python")


@pytest.mark.slow
def test_snippets_run_as_printed(tmp_path):
    programs = {f"{page}-{i}": text for i, (page, text) in enumerate(SNIPPETS)}
    for name, (status, printed) in run_forked(programs, tmp_path, ("torch", "transformers")).items():
        assert status == 0, f"{name}:\n{printed}"


@pytest.mark.parametrize("fence", ["python", "py"])
def test_snippets_compile(fence):
    for page, text in blocks(fence):
        compile(text, page, "exec")


def test_a_snippet_that_is_not_run_says_what_it_needs():
    assert all(text.startswith("# needs ") for _, text in blocks("py"))
    assert len(blocks("py")) < len(SNIPPETS) / 2


def test_each_task_of_the_guide_has_a_snippet_that_runs():
    """Training on several GPUs launches the first one of the page on training: see tests/test_examples.py."""
    tasks = {"conversion", "serving", "ops", "trainer", "embeddings", "mpoe", "microbert", "routing"}
    assert tasks <= {page for page, _ in SNIPPETS}


def test_the_readme_begins_with_a_snippet_for_models_and_has_one_for_the_op():
    (_, first), (_, second) = blocks("python", PAGES[:1])
    assert "convert_to_moe(" in first and "AutoModel.from_pretrained(" in first
    assert "fused_moe_ffn(" in second
