"""What a table of machine code was compiled from. The same sources in the same compiler give the same code again, so a
check compiles only what has changed since the table was written."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMENT = dict.fromkeys((".cu", ".cuh", ".h", ".cpp"), r"//[^\n]*|/\*.*?\*/") | dict.fromkeys(
    (".py", ".cmake"), r"#[^\n]*"
)


def without_comments(path: Path) -> str:
    """The text of a file, as a comment, a docstring or a version of Python does not change it."""
    text = path.read_text()
    if path.suffix == ".py":
        text = without_docstrings(text)
    lines = re.sub(COMMENT[path.suffix], " ", text, flags=re.DOTALL).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())  # how far a line is indented is code


def without_docstrings(text: str) -> str:
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno - 1, node.body[0].end_lineno
            lines[first:last] = [""] * (last - first)
    return "\n".join(lines)


def digest(files: Iterable[Path], *words: str) -> str:
    """16 hexadecimal digits for the code in these files under ROOT and for the words, such as a version."""
    parts = [f"{path.relative_to(ROOT)}\n{without_comments(path)}" for path in sorted(files)]
    return hashlib.sha256("\n".join([*parts, *words]).encode()).hexdigest()[:16]
