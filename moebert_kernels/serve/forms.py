"""A model in all forms in which a CPU serves it, to be compared in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from moebert_kernels.errors import MissingExtra, UserError, require_extra
from moebert_kernels.serve.dtypes import DTYPES
from moebert_kernels.serve.onnx import export_onnx, quantise_onnx
from moebert_kernels.serve.onnx_decoder import PAST, PRESENT
from moebert_kernels.serve.preparation import prepare

FORMS = ("float32", "compiled", "packed", "bfloat16", "int8", "int8-token", "int8-bfloat16", "onnx", "onnx-int8")
_PREPARED = {"packed": "float32"} | {name: name for name in FORMS if name in DTYPES and name != "float32"}


class OnnxModel(nn.Module):
    """An exported model in ONNX Runtime on a CPU, called as the model that it was made of.

    A decoder is called without earlier tokens.

    Args:
        path: of the file.
        config: the model's.
        threads: of a product. Default: torch's.
    """

    def __init__(self, path: str | Path, config: Any = None, threads: int | None = None) -> None:
        super().__init__()
        require_extra("serve", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # its threads would wait busily into what runs next
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.config = config
        self.inputs = {entry.name: entry.shape for entry in self.session.get_inputs()}
        self.outputs = [entry.name for entry in self.session.get_outputs() if not entry.name.startswith(PRESENT)]
        self.anything = nn.Parameter(torch.empty(0), requires_grad=False)  # where callers read the device
        self.eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> ModelOutput:
        """Inputs (B, T) int64 -> what the file gives, by name."""
        given = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            "position_ids": torch.arange(input_ids.shape[1]).expand(input_ids.shape),
            "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
        }
        for name, shape in self.inputs.items():
            if name.startswith(PAST):
                given[name] = torch.empty(len(input_ids), shape[1], 0, shape[3])
        found = self.session.run(self.outputs, {name: given[name].numpy() for name in self.inputs})
        return ModelOutput(zip(self.outputs, map(torch.from_numpy, found), strict=True))


def forms_of(
    model: Any, names: tuple[str, ...], batch: Mapping[str, Tensor], folder: Path
) -> Iterator[tuple[str, Any]]:
    """Name, and the model in that form, called as the model is; or the reason why it does not run here.

    A prepared model has one form, the one that it is in, whatever the names.

    Args:
        model: of transformers on a CPU, in float32 or prepared; left as it was.
        names: of `FORMS`.
        batch: inputs by name, on which each form is tried, and for whose number of tokens engines are chosen.
        folder: for files.

    Raises:
        UserError: a form that is none.
    """
    if unknown := [name for name in names if name not in FORMS]:
        raise UserError(f"form: expected one of {', '.join(FORMS)}, got {unknown[0]!r}")
    if hasattr(model, "prepared"):
        calibrated = "" if model.prepared.token_scales is None else ", calibrated"
        yield f"as saved ({model.prepared.dtype}{calibrated})", model
        return
    tokens = batch["input_ids"].numel()
    for name in names:
        try:
            made = _made(model, name, tokens, folder)
            with torch.inference_mode():
                made(**batch)
        except (UserError, MissingExtra) as error:  # an encoder-decoder has no ONNX; ONNX Runtime is not installed
            made = str(error)
        except Exception as error:  # of a compiler or of ONNX Runtime: the others are compared all the same
            made = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        yield name, made


def _made(model: Any, name: str, tokens: int, folder: Path) -> Any:
    if name == "float32":
        return model
    if name == "compiled":
        compiled = copy.deepcopy(model)
        compiled.compile(dynamic=True)
        return compiled
    if name in _PREPARED:
        return prepare(copy.deepcopy(model), _PREPARED[name], tokens=tokens)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.onnx"
    if not file.exists():
        export_onnx(model, file)
    if name == "onnx-int8":
        file = folder / "model8.onnx"
        quantise_onnx(folder / "model.onnx", file)
    return OnnxModel(file, model.config)
