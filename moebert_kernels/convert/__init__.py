"""Dense -> MoE: importance of neurons, split into experts, hash tables, conversion, the original's checkpoints."""

from moebert_kernels.convert.importance import importance_scores
from moebert_kernels.convert.importance_file import Importance, load_importance, model_fingerprint, save_importance
from moebert_kernels.convert.moe import convert_to_moe, dense_student
from moebert_kernels.convert.original import from_original
from moebert_kernels.convert.split import expert_indices
from moebert_kernels.convert.tables import balanced_hash_table, count_tokens, random_hash_table

__all__ = [
    "Importance",
    "balanced_hash_table",
    "convert_to_moe",
    "count_tokens",
    "dense_student",
    "expert_indices",
    "from_original",
    "importance_scores",
    "load_importance",
    "model_fingerprint",
    "random_hash_table",
    "save_importance",
]
