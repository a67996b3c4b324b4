"""What needs which extra: the ops need torch alone, and what is missing is named with the command that installs it."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from moebert_kernels.errors import MissingExtra, require_extra
from tests.helpers import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULE_OF = {"scikit-learn": "sklearn", "pyyaml": "yaml"}

# As if these packages were not installed.
WITHOUT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in %r else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def modules_of(requirements: list[str]) -> set[str]:
    names = (re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements)
    return {MODULE_OF.get(name, name) for name in names}


BASE = modules_of(PROJECT["dependencies"])
EXTRAS = {name: modules_of(needs) - {"moebert_kernels"} for name, needs in PROJECT["optional-dependencies"].items()}


def imported_packages(folder: str) -> set[str]:
    found = set()
    for path in (ROOT / "moebert_kernels" / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"moebert_kernels"}


def test_every_package_that_is_imported_is_a_dependency_or_in_an_extra():
    assert imported_packages(".") <= BASE | EXTRAS["train"] | EXTRAS["demo"] | EXTRAS["serve"]


@pytest.mark.parametrize("folder", ["ops", "torch_backend", "triton_backend", "cuda_backend", "kernels", "nn"])
def test_the_ops_and_their_modules_import_base_dependencies_alone(folder):
    assert imported_packages(folder) <= BASE


def test_without_the_extras_the_op_runs_and_the_rest_says_what_to_install():
    code = WITHOUT % (EXTRAS["train"] | EXTRAS["demo"]) + (
        "import torch, moebert_kernels as mk, moebert_kernels.nn\n"
        "w = [torch.randn(s, requires_grad=True) for s in ((2, 3, 4), (2, 3), (2, 4, 3), (2, 4))]\n"
        "mk.fused_moe_ffn(torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1]), *w).sum().backward()\n"
        "print(w[0].grad.shape)\n"
        "for name in ('layers', 'convert', 'distill'):\n"
        "    try:\n"
        "        __import__(f'moebert_kernels.{name}')\n"
        "    except ImportError as error:\n"
        "        print(name, error)\n"
        "from moebert_kernels.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    shape, *refusals = done.stdout.splitlines()
    assert shape == "torch.Size([2, 3, 4])"
    assert [line.split()[0] for line in refusals] == ["layers", "convert", "distill"]
    for line in [*refusals, done.stderr.strip()]:
        assert "pip install -e '.[train]'" in line
    assert done.stderr.startswith("moebert: typer, transformers, accelerate, datasets are not installed: run")


def test_a_missing_package_is_named_with_its_extra():
    require_extra("demo", "torch")
    with pytest.raises(MissingExtra, match=r"^no_such_package is not installed: run .* -e '\.\[x\]'"):
        require_extra("x", "torch", "no_such_package")
