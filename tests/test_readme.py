"""The Python snippets of the guide run as printed, each in a process of its own, and those of the README in one."""

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
README = "README"


@pytest.mark.slow
def test_snippets_run_as_printed(tmp_path):
    programs = {f"{page}-{i}": text for i, (page, text) in enumerate(SNIPPETS) if page != README}
    programs[README] = "\n".join(text for page, text in SNIPPETS if page == README)  # as one reads it
    for name, (status, printed) in run_forked(programs, tmp_path).items():
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


def test_the_readme_converts_distils_and_serves_a_model_and_calls_an_op():
    (_, first), (_, second), (_, third) = blocks("python", PAGES[:1])
    assert all(name in first for name in ("convert_to_moe(", "MoETrainer(", "AutoModel.from_pretrained("))
    assert "prepare(" in second and "fused_moe_ffn(" in third
