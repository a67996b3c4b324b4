"""Dense -> MoE: importance of neurons, split into experts, hash tables, MPO, conversion, the original's checkpoints."""

from moebert_kernels.convert.importance import importance_scores
from moebert_kernels.convert.importance_file import Importance, load_importance, model_fingerprint, save_importance
from moebert_kernels.convert.moe import convert_to_moe, dense_student
from moebert_kernels.convert.mpo import MPODecomposition, mpo_bonds, mpo_decompose, mpo_reconstruct
from moebert_kernels.convert.mpo_plan import FactorPlan, check_caps, plan_factors
from moebert_kernels.convert.original import from_original
from moebert_kernels.convert.split import expert_indices
from moebert_kernels.convert.tables import balanced_hash_table, count_tokens, random_hash_table

__all__ = [
    "FactorPlan",
    "Importance",
    "MPODecomposition",
    "balanced_hash_table",
    "check_caps",
    "convert_to_moe",
    "count_tokens",
    "dense_student",
    "expert_indices",
    "from_original",
    "importance_scores",
    "load_importance",
    "model_fingerprint",
    "mpo_bonds",
    "mpo_decompose",
    "mpo_reconstruct",
    "plan_factors",
    "random_hash_table",
    "save_importance",
]
