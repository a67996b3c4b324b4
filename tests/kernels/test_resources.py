"""Every kernel and configuration compiles for every architecture, without spills, as the committed table says.

What has not changed since the table was written is not compiled again.
"""

import ast
import os
import subprocess
import sys

import pytest

from benchmarks import sources
from tests.helpers import ROOT

pytest.importorskip("triton")


def compiled(*command):
    """What a benchmark module prints that compiles kernels, which Triton's interpreter would keep it from."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_table_of_resources():
    assert ", 0 complaints" in compiled("benchmarks.resources", "--check")


def test_a_comment_changes_no_digest_and_code_does(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text('"""Text."""\nfor i in y:\n    x = 1\n    z = 2\n')
    (tmp_path / "a.cu").write_text("int x = 1;  // text\n")
    files = [tmp_path / "a.py", tmp_path / "a.cu"]
    before = sources.digest(files, "1")
    (tmp_path / "a.py").write_text("# other text\n\nfor i in y:\n    x = 1  # text\n    z = 2\n")
    (tmp_path / "a.cu").write_text("/* other\n text */\nint x = 1;\n")
    assert sources.digest(files, "1") == before
    assert sources.digest(files, "2") != before
    for file, right, wrong in ((files[0], "x = 1", "x = 2"), (files[0], "    z", "z"), (files[1], "1", "2")):
        kept = file.read_text()
        file.write_text(kept.replace(right, wrong))
        assert sources.digest(files, "1") != before
        file.write_text(kept)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sizes_of_one_compile():
    printed = compiled("tests.kernels.sizes_of_one")
    assert f" of {sum(map(len, kernels_in_source().values()))} kernels compiled, 0 complaints" in printed


def kernels_in_source():
    """The functions that are launched, by file."""
    found = {}
    for path in (ROOT / "moebert_kernels" / "kernels").glob("*.py"):
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        found[path.name] = [function for function in functions if function.name.endswith("_kernel")]
    return found


def test_no_kernel_uses_an_argument_as_a_tensor():
    """A size of 1 arrives as an int, which has no attributes; the interpreter gives it some."""
    offenders = []
    for path, functions in kernels_in_source().items():
        for function in functions:
            sizes = {argument.arg for argument in function.args.args if argument.annotation is None}
            pointers = {node.value.id for node in ast.walk(function) if is_element_type(node)}
            offenders += [
                f"{path}:{node.lineno}: {node.value.id}.{node.attr}"
                for node in ast.walk(function)
                if isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in sizes - pointers
            ]
    assert offenders == []


def is_element_type(node):
    """Whether this is `Y.dtype`, which a pointer has and no size is asked for."""
    return isinstance(node, ast.Attribute) and node.attr == "dtype" and isinstance(node.value, ast.Name)
