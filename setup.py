"""Entry point for setuptools: pyproject.toml says what the package is, build_native.py how its CUDA part is built."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
from build_native import COMMANDS, NativeDistribution

setup(cmdclass=COMMANDS, distclass=NativeDistribution)
