"""A model's folder in parts of a size that a narrow way allows, with weights in bfloat16, and whole again."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

from safetensors.torch import load_file, save

from moebert_kernels.errors import UserError

PART_MB = 60
MANIFEST = "parts.json"


def split_folder(folder: Path, parts: Path, part_mb: int = PART_MB) -> int:
    """Write the files of `folder` (no folders inside it) as numbered parts; the number of parts."""
    import torch

    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        raise UserError(f"folder: expected files in {folder}, got none")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for file in files:
            content = file.read_bytes()
            if file.suffix == ".safetensors":
                tensors = load_file(file)
                narrow = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in tensors.items()}
                content = save(narrow, {"format": "pt"})
            entry = tarfile.TarInfo(file.name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    whole, size = packed.getbuffer(), part_mb * 10**6
    parts.mkdir(parents=True, exist_ok=True)
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    for number, piece in enumerate(pieces):
        (parts / f"part-{number:03d}").write_bytes(piece)
    facts = {"parts": len(pieces), "sha256": hashlib.sha256(whole).hexdigest()}
    (parts / MANIFEST).write_text(json.dumps(facts) + "\n")
    return len(pieces)


def join_folder(parts: Path, folder: Path) -> None:
    """The folder of which `split_folder` made `parts`.

    Raises:
        UserError: a part is missing or damaged.
    """
    try:
        facts = json.loads((parts / MANIFEST).read_text())
        whole = b"".join((parts / f"part-{number:03d}").read_bytes() for number in range(facts["parts"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"parts: expected all parts and {MANIFEST} in {parts} ({error})") from None
    if hashlib.sha256(whole).hexdigest() != facts["sha256"]:
        raise UserError(f"parts: expected the parts as they were written, got damaged ones in {parts}")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        archive.extractall(folder, filter="data")
