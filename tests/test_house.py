"""The rules that no reviewer should have to remember: layers, the weight of the import, file sizes, true documents."""

import ast
import functools
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import moebert_kernels
from moebert_kernels import reference
from tests.helpers import ROOT

PACKAGE = "moebert_kernels"
MAX_LINES = 400

# Low to high. A module imports from the lines above its own, and from its own folder.
LAYERS = (
    ("errors", "grouping", "activation", "dropout", "accuracy", "native", "cpu", "graphs"),
    ("backend", "files"),
    ("reference", "torch_backend", "kernels", "_C"),
    ("triton_backend",),
    ("cuda_backend",),
    ("ops", "warming"),
    ("__init__",),
    ("nn", "integrations", "flops"),
    ("layers",),
    ("convert",),
    ("serve", "data", "bench"),
    ("distill",),
    ("study", "doctor_text"),
    ("demo", "doctor"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

CODE_FOLDERS = (PACKAGE, "tests", "benchmarks", "examples", "experiments", "csrc", "python")
CODE = sorted(
    path
    for folder in CODE_FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")
)
MODULES = [path for path in CODE if path.is_relative_to(ROOT / PACKAGE) and path.suffix == ".py"]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
DOCS += sorted((ROOT / "experiments").rglob("*.md"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(module: str) -> str:
    """ "moebert_kernels.ops._checks" -> "ops"; the package itself -> "__init__"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@functools.cache
def module_file(dotted: str) -> Path | None:
    """The file of a module of the package; None of any other name."""
    stem = ROOT / Path(*dotted.split("."))
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.exists()), None)


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of everything a file of the package imports from the package, at any depth in the code."""
    relative = path.relative_to(ROOT).with_suffix("")
    package = ".".join(relative.parts[:-1])  # of the file, and for an __init__.py of the folder itself
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            for alias in node.names:
                dotted = f"{base}.{alias.name}"
                is_module = (base == PACKAGE and alias.name in RANK) or module_file(dotted) is not None
                found.append((node.lineno, dotted if is_module else base))
    return [(line, name) for line, name in found if name.split(".")[0] == PACKAGE]


def test_imports_point_down():
    offenders = []
    for path in MODULES:
        own = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if own not in RANK:
            offenders.append(f"{name_of(path)}: {own} has no place in LAYERS")
            continue
        for line, module in imports_of(path):
            other = layer_of(module)
            if other not in RANK or (other != own and RANK[other] >= RANK[own]):
                offenders.append(f"{name_of(path)}:{line}: {own} must not import {module}")
    assert not offenders


def module_level_imports(path: Path) -> set[str]:
    """Dotted names of the package's modules that a file imports when it is imported itself."""
    later = set()  # lines of functions, and of what only type checkers read
    for node in ast.walk(ast.parse(path.read_text())):
        is_checked_alone = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if is_checked_alone or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            later |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return {name for line, name in imports_of(path) if line not in later}


def test_no_circular_imports_inside_a_folder():
    """Also through the folder's own __init__, which its modules therefore leave alone."""
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        if path.suffix == ".py":
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            graph[name.removesuffix(".__init__")] = module_level_imports(path)

    def circle(name: str, above: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in above:
            return (*above[above.index(name) :], name)
        inside = [other for other in graph.get(name, ()) if layer_of(other) == layer_of(name) and other != PACKAGE]
        return next((found for other in inside if (found := circle(other, (*above, name)))), None)

    circles = {" -> ".join(found) for name in graph if (found := circle(name, ()))}
    assert not circles


def new_modules(statement: str) -> set[str]:
    """Top-level packages that `statement` loads in a fresh interpreter, beyond what `import torch` loads."""
    code = f"import sys, torch; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)


def test_import_loads_torch_and_nothing_heavier():
    assert new_modules(f"import {PACKAGE}") == {PACKAGE}


def test_charts_leave_pyplot_alone():
    """It keeps figures and a backend for the process, which is the caller's; `matplotlib.figure.Figure` does not."""
    drawing = [path for path in CODE if not path.is_relative_to(ROOT / "tests")]
    assert not [name_of(path) for path in drawing if re.search(r"\bpyplot\b|matplotlib\.use", path.read_text())]


def test_files_stay_readable():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in CODE}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_every_op_has_its_five_places():
    """One name through every layer: the op's file, its reference, its tests, its benchmark, its row in the docs."""
    ops = read_all(ROOT / PACKAGE / "ops", "*.py")
    tests, benchmarks = read_all(ROOT / "tests/ops", "test_*.py"), read_all(ROOT / "benchmarks", "*.py")
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    for op in set(moebert_kernels.__all__) - {"Grouping", "warmup"}:
        assert callable(getattr(reference, op))
        assert re.search(rf"^def {op}\(", ops, re.MULTILINE), op
        assert f"{op}(" in tests, op
        assert re.search(rf"\b{op}\b", benchmarks), op
        assert re.search(rf"^\| `{op}`", architecture, re.MULTILINE), op


def read_all(folder: Path, pattern: str) -> str:
    return "\n".join(path.read_text() for path in folder.glob(pattern))


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_makefile_has_the_promised_targets():
    assert {"demo", "test", "check", "smoke", "bench", "doctor"} <= makefile_targets()


def test_oldest_versions_are_the_floors():
    floors = dict(
        re.findall(r"(\w+)==([\d.]+)", re.search(r"^FLOORS := (.*)", (ROOT / "Makefile").read_text(), re.M)[1])
    )
    floors["triton"] = re.search(r"^OLDEST_TRITON := (.*)", (ROOT / "Makefile").read_text(), re.M)[1]
    asked = dict(re.findall(r'"(torch|triton|transformers)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert {name: version.rpartition(".")[0] for name, version in floors.items()} == asked


def spans_of(text: str) -> list[str]:
    """What a document shows as code: inline spans, and the lines of fenced and of indented blocks."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", prose)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^    (.*)$", prose, re.MULTILINE)
    return [span.strip().removeprefix("$ ") for span in inline + lines]


def top_level() -> set[str]:
    """Names a repository path can start with."""
    return {path.name for path in ROOT.iterdir()} | set(CODE_FOLDERS)


def paths_in(text: str) -> set[str]:
    """Repository paths that a document names as code or links to, without placeholders and what a run writes."""
    words = {word for span in spans_of(text) for word in re.split(r"[\s,:=()\"']+", span)}
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    file_names = {word for word in words if re.fullmatch(r"[\w.-]+\.(py|md|toml|txt|yaml|cff)", word)}
    tree = {
        word.removeprefix("./")
        for word in words
        if "/" in word and word.removeprefix("./").split("/")[0] in top_level()
    }
    named = {word.rstrip("./") for word in tree | file_names if not re.search(r"[<>*{}$]|\.\.\.", word)}
    return {path for path in named | links if path and not path.startswith(("demo/", ".venv/", "build/"))}


def test_paths_in_documents_exist():
    offenders = []
    for path in DOCS:
        for name in paths_in(path.read_text()):
            places = [ROOT / name, path.parent / name, *ROOT.glob(f"{PACKAGE}/{name}")]
            if not any(place.exists() for place in places):
                offenders.append(f"{name_of(path)} names {name}, which does not exist")
    assert not offenders


def test_paths_in_the_makefile_and_ci_exist():
    for script in ("Makefile", ".ci/run"):
        text = (ROOT / script).read_text()
        for name in re.findall(r"(?<![\w/.$)-])((?:tests|benchmarks|examples|docs|moebert_kernels)\b[\w/.-]*)", text):
            places = [ROOT / name.rstrip("."), ROOT / f"{name.replace('.', '/')}.py"]  # a module after python -m
            assert any(place.exists() for place in places), f"{script} names {name}, which does not exist"
        for name in re.findall(r"[\w-]+\.(?:txt|toml|py)\b", text):
            assert (ROOT / name).exists() or list((ROOT / "tests").rglob(name)), f"{script} names {name}"


def cli_options() -> dict[str, set[str]]:
    """Command -> its options, from the typer application itself."""
    from typer.main import get_command

    from moebert_kernels.cli import app
    from moebert_kernels.distill.settings import names

    commands = get_command(app).commands
    options = {
        name: {"--help", *(o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts))}
        for name, command in commands.items()
    }
    arguments = {option for name in names() for option in (f"--{name}", f"--{name.replace('_', '-')}")}
    return {name: of | (arguments if "--config" in of else set()) for name, of in options.items()}


def test_commands_in_documents_exist():
    targets, options, offenders = makefile_targets(), cli_options(), []
    for path in DOCS:
        for span in spans_of(path.read_text()):
            for problem in problems_of(span, targets, options):
                offenders.append(f"{name_of(path)}: `{span}`: {problem}")
    assert not offenders


def problems_of(span: str, targets: set[str], options: dict[str, set[str]]) -> list[str]:
    """What a command that a document shows names and the project does not have."""
    found = []
    if (match := re.match(r"make ([a-z-]+)", span)) and match[1] not in targets:
        found.append(f"no target {match[1]}")
    found += [f"no module {name}" for name in re.findall(r"python -m ([\w.]+)", span) if not find_module(name)]
    if not re.match(r"moebert [a-z]", span):
        return found
    words = shlex.split(span, comments=True)
    for name in words[1].split("|"):
        if name not in options:
            found.append(f"no command {name}")
            continue
        given = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
        # an entry of a dictionary is an option too
        found += [f"{name} has no option {option}" for option in given if option.partition(".")[0] not in options[name]]
    return found


@functools.cache
def find_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_names_of_the_package_in_documents_exist():
    offenders = []
    for path in DOCS:
        text = path.read_text()
        for span in (*spans_of(text), *re.findall(r"^::: (.+)", text, re.MULTILINE)):  # the latter: an API page's
            for dotted in re.findall(rf"\b{PACKAGE}(?:\.\w+)+", span):
                if not dotted.endswith((".egg", "._C")) and not resolves(dotted):
                    offenders.append(f"{name_of(path)} names {dotted}, which does not exist")
    assert not offenders


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(value, name):
                return False
            value = getattr(value, name)
        return True
    return False
