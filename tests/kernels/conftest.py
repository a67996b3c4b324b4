"""Tests of ops that have no CUDA form run with Triton alone."""

from tests.backends import deselect, runs_here


def pytest_collection_modifyitems(config, items):
    deselect(config, items, runs_here)
