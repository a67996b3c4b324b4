"""The ops as a project of the Hub's `kernel-builder`: `python build_hub.py FOLDER` writes build.toml and torch-ext/.

A kernel on the Hub is loaded under a name of its own, several versions in one process. So its modules import each other
by relative paths, and its ops are registered under the name that kernel-builder puts into `_ops.py`. The modules are
ours with just that changed. docs/guide/build.md says what such a project still lacks.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent
PACKAGE = "moebert_kernels"
FOLDERS = ("ops", "torch_backend", "triton_backend", "kernels")
FILES = ("__init__", "backend", "native", "grouping", "activation", "dropout", "cpu", "warming")
BUILD_TOML = """[general]
name = "moebert-kernels"
version = 0
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch-noarch]
pyext = ["py", "json"]
"""
CARD = """---
library_name: kernels
license: apache-2.0
---

# moebert-kernels

Mixture-of-experts feed-forwards as differentiable ops: Triton kernels on GPUs of compute capability 8.0 and
above, plain torch on CPUs. The kernels have been tested without a GPU, and nobody has measured them on one.
"""
# what names the package -> the same in a package of another name
_REPLACED = (
    (re.compile(r'"moebert_kernels::(\w+)"'), r'add_op_namespace_prefix("\1")'),
    (re.compile(r'f"moebert_kernels::([^"]+)"'), r'add_op_namespace_prefix(f"\1")'),
    (re.compile(r'"moebert_kernels\.Grouping"'), 'add_op_namespace_prefix("Grouping")'),
    (re.compile(r"torch\.ops\.moebert_kernels\."), "ops."),
    (re.compile(r'files\("moebert_kernels\.kernels"\)'), "files(__package__)"),
    (re.compile(r'f?"moebert_kernels\.(_C|\{_FOLDERS\[backend\]\}\.\{op\})"'), r'f"{__package__}.\1"'),
)
_IMPORT = re.compile(r"^(\s*)from moebert_kernels(?:\.([\w.]+))? import ", re.MULTILINE)


def relative(source: str, depth: int) -> str:
    """A module's text for a package of any name; `depth` is the number of folders between it and the package."""
    dots = "." * (depth + 1)
    for pattern, replacement in _REPLACED:
        source = pattern.sub(replacement, source)
    source = _IMPORT.sub(lambda found: f"{found[1]}from {dots}{found[2] or ''} import ", source)
    if re.search(r"\badd_op_namespace_prefix\(|\bops\.\w+ if ", source):
        source = source.replace(
            "\nimport torch\n", f"\nimport torch\n\nfrom {dots}_ops import add_op_namespace_prefix, ops\n", 1
        )
    return source


def write(target: Path) -> Path:
    """Write the project into a folder; the path of its Python package."""
    package = target / "torch-ext" / PACKAGE
    shutil.rmtree(package, ignore_errors=True)
    own = ROOT / PACKAGE
    modules = [own / f"{name}.py" for name in FILES]
    modules += [path for folder in FOLDERS for path in sorted((own / folder).rglob("*.py"))]
    for path in [*modules, *sorted((own / "kernels").rglob("*.json"))]:
        place = package / path.relative_to(own)
        place.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        depth = len(path.relative_to(own).parts) - 1
        place.write_text(relative(text, depth) if path.suffix == ".py" else text, encoding="utf-8")
    (target / "build.toml").write_text(BUILD_TOML, encoding="utf-8")
    (target / "CARD.md").write_text(CARD, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", target)
    return package


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python build_hub.py FOLDER")
    print(f"wrote {write(Path(sys.argv[1]))}")
