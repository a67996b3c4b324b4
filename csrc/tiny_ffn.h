// The expert feed-forward for at most 256 tokens, inference only, in two launches without a sort of its own.
//
//   y[t] = p[t] * LayerNorm_e(x[t] + w2[e] act(w1[e] x[t] + b1[e]) + b2[e]), or without the norm and the residual
//
// Traffic: the weights of the experts in use once for each row tile, x (T, H) once for each slice of 32 outputs, the
// workspace (tiny_ffn_plan) written once and read once. x, norm_weight, norm_bias, routing_weights and y share a
// dtype; w1, b1, w2 and b2 share one; the first is the second, or float32 (autocast). Accumulated in float32.
#pragma once

#include "common.h"
#include "token_lookup.h"

namespace mbk {

constexpr int kTinyFfnMaxTokens = 256;
constexpr int kTinyFfnMaxExperts = 1024;
constexpr int kTinyFfnWarps = 4;
constexpr int kTinyFfnBlockN = 32;
constexpr int kTinyFfnSlabBytes = 128;  // of one row at one step along K

// Either a Grouping (offsets is not null), or ids that every CTA looks through. Ids outside [0, E) have no expert.
struct TinyFfnRouting {
  const int32_t* offsets;       // (E + 1,) or null
  const int32_t* row_to_assignment;  // (T,) or null
  Integers expert_ids;          // (T,), not looked at where there are offsets
};

struct TinyFfnParams {
  TinyFfnRouting routing;
  int tokens, hidden, width, experts;  // T, H, I, E
  DType dtype;                         // of w1, b1, w2, b2
  DType x_dtype;                       // of x, norm_weight, norm_bias, routing_weights, y
  Activation activation;
  float eps;
  const void* x;  // (T, H), strides in elements
  int64_t x_stride_t, x_stride_h;
  const void* w1;  // (E, I, H), or (E, 2I, H) with the gate's rows first
  int64_t w1_stride_e, w1_stride_n, w1_stride_k;
  const void* w2;  // (E, H, I)
  int64_t w2_stride_e, w2_stride_n, w2_stride_k;
  const void* b1;               // (E, I) or (E, 2I), or null
  const void* b2;               // (E, H), or null
  const void* norm_weight;      // (E, H), or null: y[t] = p[t] * FFN_e(x[t]), 0 without an expert
  const void* norm_bias;        // (E, H), or null with norm_weight
  const void* routing_weights;  // (T,), or null
  void* y;                      // (T, H); x where a token has no expert and there is a norm
  void* workspace;              // tiny_ffn_plan(...).bytes, aligned to 16; any contents
  cudaStream_t stream;
};

// Where the work is cut and what the workspace holds.
struct TinyFfnPlan {
  int block_m;           // rows of a tile: 16, 32 or 64
  int tiles;             // the most row tiles that E experts and the tokens without one can have together
  int hidden_slices;     // CTAs along I of the first kernel
  int output_slices;     // CTAs along H of the second
  int splits;            // CTAs along I of the second
  int64_t h_pitch;       // elements of a row of h
  int64_t sum_pitch;     // floats of a row of sums
  int64_t sums_offset;   // bytes: (splits, T, sum_pitch) float32
  int64_t count_offset;  // bytes: (tiles,) int32
  int64_t bytes;
};

inline TinyFfnPlan tiny_ffn_plan(int tokens, int hidden, int width, int experts, DType dtype, Activation activation,
                                 bool has_norm) {
  TinyFfnPlan plan{};
  const int rows_per_expert = tokens / (experts < 1 ? 1 : experts);
  plan.block_m = rows_per_expert > 24 ? 64 : rows_per_expert > 8 ? 32 : 16;
  const int groups = tokens < experts + 1 ? tokens : experts + 1;
  plan.tiles = (tokens - groups) / plan.block_m + groups;
  const int columns = is_gated(activation) ? kTinyFfnBlockN / 2 : kTinyFfnBlockN;
  plan.hidden_slices = static_cast<int>(ceil_div(width, columns));
  plan.output_slices = static_cast<int>(ceil_div(hidden, kTinyFfnBlockN));
  plan.splits = 1;
  if (has_norm) {
    // About one CTA for each of 132 SMs, and a step along K for each warp of a CTA.
    const int64_t busy = static_cast<int64_t>(plan.output_slices) * (plan.tiles > 0 ? plan.tiles : 1);
    const int64_t steps = ceil_div(int64_t{width} * size_of(dtype), kTinyFfnSlabBytes * kTinyFfnWarps);
    while (plan.splits < 4 && (plan.splits + 1) * busy <= 132 && plan.splits + 1 <= steps) ++plan.splits;
  }
  plan.h_pitch = round_up(width, 8);
  plan.sum_pitch = round_up(hidden, 4);
  plan.sums_offset = round_up(tokens * plan.h_pitch * size_of(dtype), 16);
  const int64_t sums = has_norm ? plan.splits * tokens * plan.sum_pitch * int64_t{sizeof(float)} : 0;
  plan.count_offset = plan.sums_offset + sums;
  plan.bytes = plan.count_offset + round_up(plan.tiles * int64_t{sizeof(int32_t)}, 16);
  return plan;
}

// Dynamic shared memory of both kernels, for 16, 32 or 64 rows of a tile.
int tiny_ffn_shared_bytes(int block_m);

// Two launches on `stream`; cudaErrorInvalidValue where a size or a combination of dtypes is outside the above.
cudaError_t tiny_ffn(const TinyFfnParams& params);

}  // namespace mbk
