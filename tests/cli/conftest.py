"""What each command makes of the one before, made once."""

import pytest

from tests.cli.tiny import SPLIT, TABLE, TRAINING, done, write_base, write_data


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def teacher(base, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("teacher") / "out"
    done("finetune", "--model", base, *TABLE, "--data", data, "--output", output, *TRAINING)
    return output


@pytest.fixture(scope="session")
def importance(teacher, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("importance") / "importance.safetensors"
    done("importance", "--model", teacher, *TABLE, "--data", data, "--output", output)
    return output


@pytest.fixture(scope="session")
def moe(teacher, importance, tmp_path_factory):
    output = tmp_path_factory.mktemp("moe") / "out"
    done("convert", "--model", teacher, "--importance", importance, *SPLIT, "--output", output)
    return output


@pytest.fixture(scope="session")
def student(teacher, moe, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("student") / "out"
    done("distill", "--model", moe, "--teacher", teacher, *TABLE, "--data", data, "--output", output, *TRAINING)
    return output
