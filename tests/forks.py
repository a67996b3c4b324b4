"""Programs in processes of their own, forked from one that has imported the libraries, which takes most of their time.

    python forks.py FOLDER MODULE ...

runs FOLDER/*/program.py, each in its folder, and prints their exit statuses. This package is not imported before.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "transformers.trainer")  # what programs that use this package import, seconds of it


def run_forked(
    programs: Mapping[str, str], folder: Path, modules: tuple[str, ...] = LIBRARIES, path: Path = ROOT
) -> dict:
    """{name: (exit status, what it printed)} of Python programs, one after the other.

    Args:
        programs: the text of each program by its name.
        folder: an empty folder; each program runs in `folder / name`.
        modules: what is imported before the programs run.
        path: where the programs find this package.
    """
    for name, text in programs.items():
        (folder / name).mkdir()
        (folder / name / "program.py").write_text(text)
    env = os.environ | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-P", __file__, folder, *modules]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    return {name: (statuses[name], (folder / name / "output.txt").read_text()) for name in programs}


def main(folder: Path, modules: list[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    statuses = {}
    for place in sorted(folder.iterdir()):
        process = os.fork()
        if process == 0:  # which ends as a program of its own does
            output = os.open(place / "output.txt", os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.chdir(place)
            runpy.run_path("program.py", run_name="__main__")
            return
        statuses[place.name] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(json.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
