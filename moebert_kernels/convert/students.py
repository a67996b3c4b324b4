"""Small dense students: shapes, and where their first weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from torch import Tensor, nn

from moebert_kernels.convert.dense import build_model, constructor_options
from moebert_kernels.convert.sites import find_sites
from moebert_kernels.errors import UserError


@dataclass(frozen=True)
class StudentShape:
    """The four sizes of a BERT."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise UserError(f"num_attention_heads: expected a divisor of hidden_size={self.hidden_size}, got {heads}")


# by layers and hidden size; the first is TinyBERT's (1909.10351)
STUDENT_SHAPES = {
    "4l-312": StudentShape(4, 312, 1200, 12),
    "6l-384": StudentShape(6, 384, 1536, 12),
    "6l-768": StudentShape(6, 768, 3072, 12),
    "3l-384": StudentShape(3, 384, 1536, 12),
}
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads")
# prefixes of weights that an encoder without a head lacks
_NEW_IN_ENCODER = ("classifier.", "qa_outputs.", "lm_head.", "cls.")


def layer_map(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """Student layer j -> teacher layer g(j) = round(j N / M), halves up; counted from 1, 0 is the embeddings' output.

    Raises:
        UserError: no layers, or more than the teacher has.
    """
    M, N = student_layers, teacher_layers
    if not 1 <= M <= N:
        raise UserError(f"layer_map: expected 1 to {N} student layers, as many as the teacher has, got {M}")
    return {j: (2 * j * N + M) // (2 * M) for j in range(M + 1)}


def describe_layer_map(pairs: dict[int, int]) -> str:
    """One line for people: "student layer 1 <- teacher layer 2, ..."."""
    names = {0: "embeddings"}
    return "student <- teacher: " + ", ".join(f"{names.get(j, j)} <- {names.get(g, g)}" for j, g in pairs.items())


def make_student(
    teacher: nn.Module,
    shape: StudentShape | None = None,
    init: str | nn.Module = "layers",
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Any:
    """Return a smaller dense model with the class, the head and the label names of `teacher`, which is not changed.

    Args:
        teacher: a dense BERT- or RoBERTa-style model with any head. Call `merge` first on a task-routed MoE.
        shape: the student's sizes; see `STUDENT_SHAPES`. None: the sizes of `init`, if that is a model.
        init: "layers" takes embeddings, head and the chosen layers of the teacher; the shape may then differ in the
            number of layers only. "random" draws all weights. A model of the same family and vocabulary gives its
            encoder.
        layers: which of the teacher's layers, counted from 1. None: those of `layer_map`.
        seed: of the weights that are drawn at random.

    Returns:
        The student, on the teacher's device, in its dtype and mode.

    Raises:
        UserError: sizes, layers, families or vocabularies that do not fit.
    """
    _check_encoder(teacher)
    source = cast(Any, teacher)
    given = init if isinstance(init, nn.Module) else None
    if given is not None:
        shape = _shape_of_given(given, source, shape)
    elif shape is None:
        raise UserError("shape: expected one, unless init is a model, got None")
    elif init not in ("layers", "random"):
        raise UserError(f"init: expected layers, random or a model, got {init!r}")
    if layers is not None and init != "layers":
        raise UserError("layers: expected none unless init='layers', got some")

    fields = source.config.to_dict() | asdict(shape)
    config = type(source.config)(
        **{name: value for name, value in fields.items() if name not in ("model_type", "transformers_version")},
        attn_implementation=source.config._attn_implementation,
    )
    prefix = "" if source.base_model is source else f"{source.base_model_prefix}."
    state: dict[str, Tensor] = {}
    new: tuple[str, ...] = ("",)
    if given is not None:
        base = cast(Any, given).base_model.state_dict()
        state, new = {prefix + key: tensor for key, tensor in base.items()}, (*_NEW_IN_ENCODER, f"{prefix}pooler.")
        if getattr(source.base_model, "pooler", None) is None:
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{prefix}pooler.")}
    elif init == "layers":
        state, new = _chosen_layers(source, prefix, shape, layers), ()
    options = constructor_options(source)
    return build_model(type(source), config, state, like=source, new=new, seed=seed, **options)


def _check_encoder(model: nn.Module) -> None:
    """Raise a UserError unless the layers of a dense model have the names of BERT's."""
    if any(site.shape != "split" for site in find_sites(model)):
        raise UserError(f"model: expected a BERT-style encoder, got {type(model).__name__}")


def _shape_of_given(given: Any, teacher: Any, shape: StudentShape | None) -> StudentShape:
    _check_encoder(given)
    for name in ("model_type", "vocab_size", "type_vocab_size", "max_position_embeddings"):
        wanted, got = (getattr(model.config, name, None) for model in (teacher, given))  # MPNet has no token types
        if wanted != got:
            raise UserError(f"init: expected a model with the teacher's {name} {wanted}, got {got}")
    found = StudentShape(given.config.num_hidden_layers, *(getattr(given.config, name) for name in _SIZES))
    if shape not in (None, found):
        raise UserError(f"shape: expected that of the given weights, {found}, got {shape}")
    return found


def _chosen_layers(teacher: Any, prefix: str, shape: StudentShape, layers: Sequence[int] | None) -> dict[str, Tensor]:
    """The teacher's weights with only the chosen layers, numbered anew."""
    for name in _SIZES:
        if getattr(shape, name) != getattr(teacher.config, name):
            raise UserError(
                f"{name}: expected the teacher's {getattr(teacher.config, name)} with init='layers', got "
                f"{getattr(shape, name)}; init='random' or given weights allow others"
            )
    N, M = teacher.config.num_hidden_layers, shape.num_hidden_layers
    chosen = [layer_map(M, N)[j] for j in range(1, M + 1)] if layers is None else list(layers)
    if len(chosen) != M or not all(1 <= layer <= N for layer in chosen):
        raise UserError(f"layers: expected {M} of the teacher's 1 to {N}, got {chosen}")
    state = {}
    stem = f"{prefix}encoder.layer."
    for key, tensor in teacher.state_dict().items():
        if not key.startswith(stem):
            state[key] = tensor
            continue
        number, _, rest = key.removeprefix(stem).partition(".")
        for new, old in enumerate(chosen):
            if old == int(number) + 1:
                state[f"{stem}{new}.{rest}"] = tensor
    return state
