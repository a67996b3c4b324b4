"""More packages from a local folder, without a network: wheels are installed aside, checkouts imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Extras:
    """What a folder gave.

    Attributes:
        paths: for PYTHONPATH, in order.
        found: name of each wheel or checkout -> where it is imported from.
        left_out: name -> why it cannot be used.
        variables: for the environment: where the headers of a CUTLASS checkout are.
    """

    paths: list[Path] = field(default_factory=list)
    found: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


def prepare(folder: Path, installed: Path) -> Extras:
    """Install the wheels of `folder` into `installed`, without a network and without what they depend on.

    A folder inside is a checkout: its packages are imported from it, or from its `src`; CUTLASS's headers are found in
    its `include`. Nothing is compiled.

    Raises:
        ValueError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise ValueError(f"EXTRAS: expected a folder, got {folder}")
    extras = Extras()
    for entry in sorted(folder.iterdir()):
        if entry.suffix == ".whl":
            if reason := _install(entry, installed):
                extras.left_out[entry.name] = reason
            else:
                extras.found[entry.name] = str(installed)
        elif entry.is_dir() and not entry.name.startswith((".", "__")):
            root = next((place for place in (entry / "src", entry) if _has_package(place)), None)
            headers = entry / "include"
            if (headers / "cutlass" / "cutlass.h").is_file():
                extras.variables["MOEBERT_KERNELS_CUTLASS"] = extras.found[entry.name] = str(headers.resolve())
            elif root is None:
                extras.left_out[entry.name] = "no Python package in it"
            else:
                extras.paths.append(root.resolve())
                extras.found[entry.name] = str(root)
    if any(place == str(installed) for place in extras.found.values()):
        extras.paths.insert(0, installed.resolve())
    return extras


def _install(wheel: Path, target: Path) -> str:
    """ "" or why pip refuses the wheel."""
    if (target / f".{wheel.name}").exists():
        return ""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps",
               "--quiet", "--upgrade", "--target", str(target), str(wheel)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[0]
    (target / f".{wheel.name}").touch()
    return ""


def _has_package(folder: Path) -> bool:
    return any(folder.glob("*/__init__.py")) and not (folder / "__init__.py").exists()
