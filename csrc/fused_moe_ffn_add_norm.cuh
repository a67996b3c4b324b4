// One pass over the tokens forward, one over the rows backward; whole rows stay in registers.
//
// A row belongs to 1, 2, 4 or 8 warps of a block, and a lane has STEPS vectors of 8 columns. Forward walks tokens
// and reads ffn through the permutation. Backward walks rows in chunks that never cross an expert: the chunk's sums for
// the norm's parameters stay in registers, are added over the block's rows in a fixed order, and leave as partials that
// a second kernel adds in order.
#pragma once

#include "device.cuh"
#include "dropout.cuh"
#include "fused_moe_ffn_add_norm.h"
#include "vectors.cuh"

namespace mbk {

constexpr int kNormThreads = 256;
constexpr int kNormWarps = kNormThreads / kWarpSize;
constexpr int kReduceThreads = 128;
constexpr int kMaxSums = 3;
constexpr int kNormSumsBytes = kNormWarps * kMaxSums * static_cast<int>(sizeof(float));

__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

// Sums over the lanes of a row, for all of them. All threads of the block together.
template <int COUNT>
__device__ __forceinline__ void sum_over_row(float (&values)[COUNT], int warps_per_row) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] = sum_over_warp(values[i]);
  if (warps_per_row == 1) return;
  auto* sums = reinterpret_cast<float*>(dynamic_shared());
  const int warp = threadIdx.x / kWarpSize, first = warp / warps_per_row * warps_per_row;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (threadIdx.x % kWarpSize == 0) sums[i * kNormWarps + warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    values[i] = 0.0f;
    for (int other = first; other < first + warps_per_row; ++other) values[i] += sums[i * kNormWarps + other];
  }
}

// The expert that has `row`, E if none has; by a whole warp.
__device__ __forceinline__ int expert_of_row(const int32_t* offsets, int num_experts, int row) {
  int expert = 0;
  for (int first = 0; first < num_experts; first += kWarpSize) {
    const int e = first + static_cast<int>(threadIdx.x) % kWarpSize;
    expert += __popc(__ballot_sync(kWholeWarp, e < num_experts && row >= offsets[e + 1]));
  }
  return expert;
}

// x + dropout(ffn) of a row; without `routed` x alone. Returns by step which of the lane's columns were kept.
template <typename X, typename F, int STEPS>
__device__ __forceinline__ unsigned load_sums(const AddNormInputs& in, int64_t token, int64_t row, bool active,
                                              bool routed, int lane_of_row, int lanes_of_row,
                                              float (&z)[STEPS][kVector]) {
  static_assert(STEPS * kVector <= 32, "the mask is one register");
  const Matrix ffn_rows = {in.ffn, in.columns, 1};
  float ffn[STEPS][kVector];
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    const int column = (s * lanes_of_row + lane_of_row) * kVector;
    load_vector<X>(in.x, in.x_type, token, column, active ? in.columns : 0, z[s]);
    load_vector<F>(ffn_rows, in.ffn_type, row, column, routed ? in.columns : 0, ffn[s]);
  }
  unsigned kept = ~0u;
  if (in.seed != nullptr) {
    const int64_t seed = *in.seed;
    kept = 0;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      kept |= keep_bits(seed, token, s * lanes_of_row + lane_of_row, kOutputStream, in.threshold) << (s * kVector);
    }
  }
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      z[s][i] += (kept >> (s * kVector + i)) & 1 ? ffn[s][i] * in.scale : 0.0f;
    }
  }
  return kept;
}

// Mean and 1 / standard deviation of a row.
template <int STEPS>
__device__ __forceinline__ void row_statistics(const AddNormInputs& in, const float (&z)[STEPS][kVector],
                                               int lane_of_row, int warps_per_row, float* mean, float* rstd) {
  float sum[1] = {0.0f}, squares[1] = {0.0f};
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[0] += z[s][i];
  }
  sum_over_row(sum, warps_per_row);
  *mean = sum[0] / static_cast<float>(in.columns);
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    const int column = (s * warps_per_row * kWarpSize + lane_of_row) * kVector;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float centred = column + i < in.columns ? z[s][i] - *mean : 0.0f;
      squares[0] += centred * centred;
    }
  }
  sum_over_row(squares, warps_per_row);
  *rstd = 1.0f / sqrtf(squares[0] / static_cast<float>(in.columns) + in.eps);
}

template <typename X, typename F, int STEPS>
__global__ void __launch_bounds__(kNormThreads)
    add_norm_kernel(AddNormInputs in, const int32_t* assignment_to_row, void* y, int warps_per_row) {
  const int lanes_of_row = warps_per_row * kWarpSize;
  const int lane_of_row = static_cast<int>(threadIdx.x) % lanes_of_row;
  const int64_t token = int64_t{blockIdx.x} * (kNormThreads / lanes_of_row) + threadIdx.x / lanes_of_row;
  const bool active = token < in.tokens;
  const int row = active ? assignment_to_row[token] : 0;
  const int expert = expert_of_row(in.offsets, in.num_experts, row);
  const bool routed = active && expert < in.num_experts;
  float z[STEPS][kVector];
  load_sums<X, F, STEPS>(in, token, row, active, routed, lane_of_row, lanes_of_row, z);
  float mean = 0.0f, rstd = 0.0f;
  row_statistics<STEPS>(in, z, lane_of_row, warps_per_row, &mean, &rstd);
  if (!active) return;
  const float p = in.weights != nullptr ? load_float(in.weights, token, in.x_type) : 1.0f;
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    const int column = (s * lanes_of_row + lane_of_row) * kVector;
    float weight[kVector], bias[kVector];
    load_vector<X>(in.norm_weight, in.x_type, expert, column, routed ? in.columns : 0, weight);
    load_vector<X>(in.norm_bias, in.x_type, expert, column, routed ? in.columns : 0, bias);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (routed) z[s][i] = ((z[s][i] - mean) * rstd * weight[i] + bias[i]) * p;
    }
    store_vector<X>(y, in.x_type, token, column, in.columns, z[s]);
  }
}

// First row, end and expert of chunk `chunk`; expert E: there is no such chunk. By a whole warp.
__device__ __forceinline__ int find_chunk(const int32_t* offsets, int num_experts, int64_t chunk, int* row, int* end) {
  const int lane = threadIdx.x % kWarpSize;
  int64_t before = 0;
  for (int first = 0; first < num_experts; first += kWarpSize) {
    const int e = first + lane;
    const int start = e < num_experts ? offsets[e] : 0, stop = e < num_experts ? offsets[e + 1] : 0;
    const int rows = stop - start;
    const int own = e < num_experts ? (rows > kNormChunk ? (rows - 1) / kNormChunk + 1 : 1) : 0;
    int sum = own;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int other = __shfl_up_sync(kWholeWarp, sum, distance);
      if (lane >= distance) sum += other;
    }
    const unsigned passed = __ballot_sync(kWholeWarp, before + sum <= chunk);
    const int owner = __popc(passed);
    if (owner < kWarpSize) {
      const int64_t own_before = before + sum - own;
      const int mine = start + static_cast<int>(chunk - own_before) * kNormChunk;
      *row = __shfl_sync(kWholeWarp, mine, owner);
      const int last = __shfl_sync(kWholeWarp, stop, owner);
      *end = last - *row < kNormChunk ? last : *row + kNormChunk;
      return first + owner;
    }
    before += __shfl_sync(kWholeWarp, sum, kWarpSize - 1);
  }
  return num_experts;
}

// Adds the shares of the rows that a block has at a time, group after group, and writes them.
template <int STEPS>
__device__ __forceinline__ void store_partials(const float (&sums)[STEPS][kVector], int columns, int lanes_of_row,
                                               float* partials) {
  auto* total = reinterpret_cast<float*>(dynamic_shared() + kNormSumsBytes);
  const int group = static_cast<int>(threadIdx.x) / lanes_of_row;
  const int lane_of_row = static_cast<int>(threadIdx.x) % lanes_of_row;
  for (int turn = 0; turn < kNormThreads / lanes_of_row; ++turn) {
    if (turn == group) {
#pragma unroll
      for (int s = 0; s < STEPS; ++s) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const int column = (s * lanes_of_row + lane_of_row) * kVector + i;
          if (column < columns) total[column] = turn == 0 ? sums[s][i] : total[column] + sums[s][i];
        }
      }
    }
    __syncthreads();
  }
  for (int column = threadIdx.x; column < columns; column += kNormThreads) partials[column] = total[column];
  __syncthreads();
}

template <typename X, typename F, int STEPS>
__global__ void __launch_bounds__(kNormThreads, 1)
    add_norm_backward_kernel(FusedMoeFfnAddNormBackwardParams a, int warps_per_row) {
  const AddNormInputs& in = a.inputs;
  int first_row = 0, end = 0;
  const int expert = find_chunk(in.offsets, in.num_experts, blockIdx.x, &first_row, &end);
  if (expert >= in.num_experts) return;
  const int lanes_of_row = warps_per_row * kWarpSize, rows_at_once = kNormThreads / lanes_of_row;
  const int lane_of_row = static_cast<int>(threadIdx.x) % lanes_of_row;
  float dweight[STEPS][kVector] = {}, dbias[STEPS][kVector] = {};
  for (int first = first_row; first < end; first += rows_at_once) {
    const int row = first + static_cast<int>(threadIdx.x) / lanes_of_row;
    const bool active = row < end;
    const int64_t token = active ? a.row_to_assignment[row] : 0;
    float z[STEPS][kVector], d[STEPS][kVector];
    const unsigned kept = load_sums<X, F, STEPS>(in, token, row, active, active, lane_of_row, lanes_of_row, z);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int column = (s * lanes_of_row + lane_of_row) * kVector;
      load_vector<X>(a.dy, in.x_type, token, column, active ? in.columns : 0, d[s]);
    }
    float mean = 0.0f, rstd = 0.0f;
    row_statistics<STEPS>(in, z, lane_of_row, warps_per_row, &mean, &rstd);
    const float p = active && in.weights != nullptr ? load_float(in.weights, token, in.x_type) : 1.0f;
    float sums[3] = {0.0f, 0.0f, 0.0f};  // of dn, dn * n and dy * LayerNorm
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int column = (s * lanes_of_row + lane_of_row) * kVector;
      float weight[kVector], bias[kVector];
      load_vector<X>(in.norm_weight, in.x_type, expert, column, in.columns, weight);
      if (a.dweights != nullptr) load_vector<X>(in.norm_bias, in.x_type, expert, column, in.columns, bias);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float n = active && column + i < in.columns ? (z[s][i] - mean) * rstd : 0.0f;
        if (a.dweights != nullptr) sums[2] += d[s][i] * (n * weight[i] + bias[i]);
        const float dy = d[s][i] * p;
        dweight[s][i] += dy * n;
        dbias[s][i] += dy;
        z[s][i] = n;
        d[s][i] = dy * weight[i];
        sums[0] += d[s][i];
        sums[1] += d[s][i] * n;
      }
    }
    sum_over_row(sums, warps_per_row);
    if (!active) continue;
    if (a.dweights != nullptr && lane_of_row == 0) store_float(a.dweights, token, in.x_type, sums[2]);
    const float mean_dn = sums[0] / static_cast<float>(in.columns), along = sums[1] / static_cast<float>(in.columns);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int column = (s * lanes_of_row + lane_of_row) * kVector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) d[s][i] = (d[s][i] - mean_dn - z[s][i] * along) * rstd;
      store_vector<X>(a.dz, in.x_type, row, column, in.columns, d[s]);
      if (a.dffn == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kVector; ++i) d[s][i] = (kept >> (s * kVector + i)) & 1 ? d[s][i] * in.scale : 0.0f;
      store_vector<F>(a.dffn, in.ffn_type, row, column, in.columns, d[s]);
    }
  }
  const int64_t place = int64_t{blockIdx.x} * in.columns;
  store_partials<STEPS>(dweight, in.columns, lanes_of_row, a.weight_partials + place);
  store_partials<STEPS>(dbias, in.columns, lanes_of_row, a.bias_partials + place);
}

// dnorm_weight and dnorm_bias: each expert's partials, in order. A template, so that every file may have it.
template <int THREADS>
__global__ void __launch_bounds__(THREADS)
    reduce_partials_kernel(FusedMoeFfnAddNormBackwardParams a, int blocks_per_expert) {
  const AddNormInputs& in = a.inputs;
  const int expert = static_cast<int>(blockIdx.x) / blocks_per_expert;
  const int column = static_cast<int>(blockIdx.x) % blocks_per_expert * THREADS + static_cast<int>(threadIdx.x);
  int first = 0, count = 0;
  for (int start = 0; start <= expert; start += kWarpSize) {
    const int e = start + static_cast<int>(threadIdx.x) % kWarpSize;
    const int rows = e <= expert ? in.offsets[e + 1] - in.offsets[e] : 0;
    const int own = e <= expert ? (rows > kNormChunk ? (rows - 1) / kNormChunk + 1 : 1) : 0;
    int sum = e < expert ? own : 0;
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kWholeWarp, sum, distance);
    }
    first += sum;
    if (expert - start < kWarpSize) count = __shfl_sync(kWholeWarp, own, expert - start);
  }
  if (column >= in.columns) return;
  float weight = 0.0f, bias = 0.0f;
#pragma unroll 8
  for (int i = first; i < first + count; ++i) {
    weight += a.weight_partials[int64_t{i} * in.columns + column];
    bias += a.bias_partials[int64_t{i} * in.columns + column];
  }
  const int64_t place = int64_t{expert} * in.columns + column;
  if (a.dnorm_weight != nullptr) store_float(a.dnorm_weight, place, in.x_type, weight);
  if (a.dnorm_bias != nullptr) store_float(a.dnorm_bias, place, in.x_type, bias);
}

}  // namespace mbk
