"""Dense -> MoE: importance, split, hash tables, MPO, conversion, the original's checkpoints, merging, students."""

# ruff: noqa: E402  what is missing is named before the imports that need it
from moebert_kernels.errors import require_extra

require_extra("train", "transformers")

from moebert_kernels.convert.card import parameter_counts
from moebert_kernels.convert.chosen import choose_experts, judge_experts, report_chart, report_table
from moebert_kernels.convert.chosen_site import SiteChoice, SiteReport
from moebert_kernels.convert.dense import dense_student, merge
from moebert_kernels.convert.importance import importance_scores
from moebert_kernels.convert.importance_file import Importance, load_importance, model_fingerprint, save_importance
from moebert_kernels.convert.in_turn import Correction, correct_in_turn
from moebert_kernels.convert.loading import MoELoader
from moebert_kernels.convert.mpo import MPODecomposition, mpo_decompose
from moebert_kernels.convert.mpo_plan import FactorPlan, check_caps, plan_factors
from moebert_kernels.convert.mpoe import MPOEReport, mpoe_report, to_dense_experts
from moebert_kernels.convert.original import from_original
from moebert_kernels.convert.replace import convert_to_moe
from moebert_kernels.convert.split import Share, default_split, expert_indices, importance_kept
from moebert_kernels.convert.students import STUDENT_SHAPES, StudentShape, describe_layer_map, layer_map, make_student
from moebert_kernels.convert.tables import balanced_hash_table, count_tokens, random_hash_table

__all__ = [
    "STUDENT_SHAPES",
    "Correction",
    "FactorPlan",
    "Importance",
    "MPODecomposition",
    "MPOEReport",
    "MoELoader",
    "Share",
    "SiteChoice",
    "SiteReport",
    "StudentShape",
    "balanced_hash_table",
    "check_caps",
    "choose_experts",
    "convert_to_moe",
    "correct_in_turn",
    "count_tokens",
    "default_split",
    "dense_student",
    "describe_layer_map",
    "expert_indices",
    "from_original",
    "importance_kept",
    "importance_scores",
    "judge_experts",
    "layer_map",
    "load_importance",
    "make_student",
    "merge",
    "model_fingerprint",
    "mpo_decompose",
    "mpoe_report",
    "parameter_counts",
    "plan_factors",
    "random_hash_table",
    "report_chart",
    "report_table",
    "save_importance",
    "to_dense_experts",
]
