// The expert GEMM's epilogue: bias, activation, routing weight and the stores, on one consumer warp group's
// accumulators.
//
// wgmma leaves a thread two adjacent columns of each 8, on rows lane / 4 and lane / 4 + 8 of its warp's 16. Storing
// those writes half sectors. So each quad of lanes transposes 4 x 4 pairs by shuffles, and a lane stores 8 adjacent
// columns of one row: 16 bytes, 64 adjacent ones per row and instruction. No shared memory, so nothing here waits for
// anybody.
#pragma once

#include "device.cuh"
#include "expert_gemm_scheduler.h"

namespace mbk {

// Activations that differ only in constants share code.
enum class ActivationForm { kGelu, kSigmoid, kClamp };

struct ActivationConstants {
  float linear, cubic;    // kSigmoid: x / (1 + 2^(linear * x + cubic * x^3))
  bool zero_if_negative;  // kClamp: relu, else the identity
};

template <ActivationForm kForm>
__device__ __forceinline__ float activate(float x, const ActivationConstants& constants) {
  if constexpr (kForm == ActivationForm::kGelu) {
    // max(x, 0) - |x| Phi(-|x|), with Phi(-|x|) as in moebert_kernels/kernels/activation.py: off by 3.5e-5 of itself.
    const float size = fminf(fabsf(x), 16.0f);  // from 16 on the tail is 0: infinity times it would be NaN
    const float t = fast_reciprocal(fmaf(size, 0.376f, 1.0f));
    float tail = fmaf(t, -0.0908573932f, 0.1987446318f);
    tail = fmaf(t, tail, 0.0847112676f);
    tail = fmaf(t, tail, 0.1579140741f);
    tail = fmaf(t, tail, 0.1494775642f);
    tail *= t * fast_exp2(x * x * -0.7213475204444817f);
    return fmaf(-size, tail, fmaxf(x, 0.0f));
  } else if constexpr (kForm == ActivationForm::kSigmoid) {
    // The constants hold -log2(e) already. Infinity times zero is NaN: hence the bounds, where the sigmoid is 0 or 1.
    const float slope = fmaf(constants.cubic, fminf(x * x, 16384.0f), constants.linear);
    return fmaxf(x, -128.0f) * fast_reciprocal(1.0f + fast_exp2(x * slope));
  } else {
    return constants.zero_if_negative && x < 0.0f ? 0.0f : x;  // NaN stays NaN
  }
}

template <class T>
struct Half2;

template <>
struct Half2<__half> {
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    const __half2 pair = __floats2half2_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct Half2<__nv_bfloat16> {
  static __device__ __forceinline__ float2 unpack(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

// What the epilogue needs of the problem; `T` is the type of y, pre, bias and weights.
template <class T>
struct EpilogueParams {
  T* y;              // (rows, N) contiguous
  T* pre;            // (rows, N) contiguous, or null
  const T* bias;     // (E, N) contiguous, or null
  const T* weights;  // (rows,) by assignment, or null
  const int* row_to_assignment;
  int columns;
  bool scatter;
  ActivationConstants constants;
};

// Word j of lane q (of a quad) becomes word q of lane j. All lanes of the warp take part.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit <<= 1) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? words[i] : words[i | bit], bit);
      words[i] = upper ? received : words[i];
      words[i | bit] = upper ? words[i | bit] : received;
    }
  }
}

template <class T>
__device__ __forceinline__ void store_words(T* target, const uint32_t (&words)[4]) {
  *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
}

// kRows of the tile by one warp group. acc(j, v, m, c): column 8 * j + 2 * (lane % 4) + c, row 64 * m + 16 * warp +
// lane / 4 + 8 * v.
// 32 columns after the other: a load of the bias serves all rows of a thread, and of what is neither an accumulator
// nor a row's, little lives at a time.
template <class T, ActivationForm kForm, int kRows, int kBlockN, class Accumulators>
__device__ __forceinline__ void store_tile(const EpilogueParams<T>& params, const ExpertTile& tile, int thread,
                                           const Accumulators& acc) {
  constexpr int kSlots = kRows / 32;  // rows of a thread
  const int lane = thread % 32, quad_lane = lane % 4;
  const int column0 = tile.tile_n * kBlockN;
  const int bias_columns = params.bias == nullptr ? 0 : params.columns - (column0 + 2 * quad_lane);
  const T* bias = params.bias + (static_cast<int64_t>(tile.expert) * params.columns + column0 + 2 * quad_lane);
  int64_t targets[kSlots];
  int columns_left[kSlots];
  float weights[kSlots];
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    const int row = tile.row0 + i / 2 * 64 + thread / 32 * 16 + lane / 4 + i % 2 * 8;
    const bool valid = row < tile.row_end;
    int target_row = row;
    weights[i] = 1.0f;
    if (valid && (params.scatter || params.weights != nullptr)) {
      const int assignment = params.row_to_assignment[row];
      if (params.scatter) target_row = assignment;
      if (params.weights != nullptr) weights[i] = static_cast<float>(params.weights[assignment]);
    }
    targets[i] = static_cast<int64_t>(target_row) * params.columns + (column0 + 8 * quad_lane);
    columns_left[i] = valid ? params.columns - (column0 + 8 * quad_lane) : 0;
  }
#pragma unroll
  for (int block = 0; block < kBlockN / 8; block += 4) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (8 * (block + j) < bias_columns) {
        const float2 b = Half2<T>::unpack(__ldg(reinterpret_cast<const uint32_t*>(bias + 8 * (block + j))));
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          acc(block + j, i % 2, i / 2, 0) += b.x;
          acc(block + j, i % 2, i / 2, 1) += b.y;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const int v = i % 2, m = i / 2;
      uint32_t words[4];
      if (params.pre != nullptr) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          words[j] = Half2<T>::pack(acc(block + j, v, m, 0), acc(block + j, v, m, 1));
        }
        transpose_quad(words, lane);
        if (8 * block < columns_left[i]) store_words(params.pre + targets[i] + 8 * block, words);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float x = activate<kForm>(acc(block + j, v, m, 0), params.constants);
        const float y = activate<kForm>(acc(block + j, v, m, 1), params.constants);
        words[j] = Half2<T>::pack(x * weights[i], y * weights[i]);
      }
      transpose_quad(words, lane);
      if (8 * block < columns_left[i]) store_words(params.y + targets[i] + 8 * block, words);
    }
  }
}


// kRows rows without an expert, by one warp group.
template <class T, int kRows, int kBlockN>
__device__ __forceinline__ void store_zeros(const EpilogueParams<T>& params, const ExpertTile& tile, int thread) {
  const uint32_t zeros[4] = {0, 0, 0, 0};
  const int column = tile.tile_n * kBlockN + thread % (kBlockN / 8) * 8;
  constexpr int kRowsAtOnce = 128 / (kBlockN / 8);
  if (thread >= kRowsAtOnce * (kBlockN / 8) || column >= params.columns) return;
  const int end = min(tile.row_end, tile.row0 + kRows);
  for (int row = tile.row0 + thread / (kBlockN / 8); row < end; row += kRowsAtOnce) {
    const int target_row = params.scatter ? params.row_to_assignment[row] : row;
    const int64_t target = static_cast<int64_t>(target_row) * params.columns + column;
    store_words(params.y + target, zeros);
    if (params.pre != nullptr) store_words(params.pre + target, zeros);
  }
}

}  // namespace mbk
