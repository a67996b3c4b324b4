// A warp's share of a product: it loads its own steps along K into its own shared memory, so that warps meet once only.
//
// A slab is one step along K: 128 bytes of each of BLOCK_M rows of A and of 32 rows of B (a weight's outputs), as eight
// chunks of 16 bytes in an order that keeps reads free of bank conflicts. The four warps of a CTA take slabs in turn,
// and their sums are added in the order of the warps.
#pragma once

#include "tiny_ffn.h"
#include "tiny_ffn_math.cuh"

namespace mbk {
namespace tiny {

constexpr int kWarps = kTinyFfnWarps;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocksPerSm = 2;  // what shared memory allows at least; said to the compiler, which else spills for more
constexpr int kBlockN = kTinyFfnBlockN;
constexpr int kChunks = 8;           // of a row of a slab
constexpr int kSumPitch = kBlockN + 8;  // floats; the pitch at which a warp writes its sums without bank conflicts

// Stages are as many as 99 KiB leave room for: what one CTA may have on compute capability 8.6, 8.9 and 12.0.
template <int kBlockM>
struct Layout {
  static constexpr int kStages = kBlockM == 64 ? 2 : 3;
  static constexpr int kRowTiles = kBlockM / 16;
  static constexpr int kSlabA = kBlockM * kTinyFfnSlabBytes;
  static constexpr int kSlab = kSlabA + kBlockN * kTinyFfnSlabBytes;
  static constexpr int kWarpBytes = kStages * kSlab;
  static constexpr int kBytes = kWarps * kWarpBytes;
  static_assert(kBlockM * kSumPitch * sizeof(float) <= kWarpBytes, "a warp's sums lie where its slabs were");
};

template <typename T>
constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * kTinyFfnSlabBytes + ((chunk ^ ((row & 1) << 2 | (row >> 1 & 3))) << 4);
}

// One of the two operands. Rows are in elements from `data`; `vector`: rows and chunks are aligned to 16 bytes.
struct Operand {
  const void* data;
  int64_t stride_k;
  bool vector;
  bool is_float;  // float32 that is cast to T on the way
};

__device__ __forceinline__ Words pack(const float (&value)[4], float) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) words.word[i] = __float_as_uint(value[i]);
  return words;
}

template <typename T>
__device__ __forceinline__ Words pack(const float (&value)[8], T) {
  Words words;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words.word[i] = bits_from_float<T>(value[2 * i]) | bits_from_float<T>(value[2 * i + 1]) << 16;
  }
  return words;
}

// `valid` elements (at most kPerChunk, none below 1) from element `start` of the operand; zeros behind them.
template <typename T>
__device__ __forceinline__ void load_chunk(unsigned char* destination, const Operand& source, int64_t start,
                                           int valid) {
  float value[kPerChunk<T>];
  if (source.vector && valid >= kPerChunk<T>) {
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; i += 4) {
      const Floats four = *reinterpret_cast<const Floats*>(static_cast<const float*>(source.data) + start + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) value[i + j] = four.value[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerChunk<T>; ++i) {
      value[i] = i < valid ? load<T>(source.data, start + i * source.stride_k, source.is_float) : 0.0f;
    }
  }
  *reinterpret_cast<Words*>(destination) = pack(value, T{});
}

// Rows [0, rows) of an operand at one step along K; `rows` is a multiple of 16. row_start(r): first element of row r,
// below 0 for a row of zeros. What does not depend on the row is decided before the rows, and four of them are asked for
// at a time: a warp has as many chains of addresses.
template <typename T, typename RowStart>
__device__ __forceinline__ void load_rows(unsigned char* slab, const Operand& source, int rows, int slab_index,
                                          int length, RowStart row_start) {
  constexpr int kStep = 32 / kChunks, kAtOnce = 16 / kStep;
  static_assert(2 * kStep == 8, "see below");
  const int lane = threadIdx.x & 31;
  const int chunk = lane & (kChunks - 1), first = lane / kChunks;
  const int k = (slab_index * kChunks + chunk) * kPerChunk<T>, left = length - k;
  if (source.vector && !source.is_float) {
    const int bytes = (left < 0 ? 0 : left < kPerChunk<T> ? left : kPerChunk<T>) * static_cast<int>(sizeof(T));
    const T* const data = static_cast<const T*>(source.data);
    // Eight rows on, a chunk has the same place among those of its row.
    const int places[2] = {chunk_offset(first, chunk), chunk_offset(first + kStep, chunk)};
#pragma unroll 1
    for (int block = 0; block < rows; block += kStep * kAtOnce) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t start = row_start(block + first + i * kStep);
        const bool inside = start >= 0 && bytes > 0;
        copy_async(slab + places[i % 2] + (block + (i - i % 2) * kStep) * kTinyFfnSlabBytes,
                   inside ? data + start + k : data, inside ? bytes : 0);
      }
    }
    return;
  }
#pragma unroll 1
  for (int row = first; row < rows; row += kStep) {
    const int64_t start = row_start(row);
    load_chunk<T>(slab + chunk_offset(row, chunk), source, start + k * source.stride_k, start < 0 ? 0 : left);
  }
}

// sums += A B^T over one slab, for the row tiles of 16 rows that hold any row.
template <typename T, int kRowTiles>
__device__ __forceinline__ void multiply_slab(const unsigned char* a, const unsigned char* b, int row_tiles,
                                              float (&sums)[kRowTiles][16], T) {
  const int group = (threadIdx.x & 31) >> 2, quad = threadIdx.x & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // A thread's 16 bytes are 8 neighbours along K. Which of the 32 columns of two products they stand for is free, as
    // long as A and B agree.
    const int chunk = 4 * half + quad;
    Words right[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      right[j] = *reinterpret_cast<const Words*>(b + chunk_offset(8 * j + group, chunk));
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (m >= row_tiles) continue;
      const Words upper = *reinterpret_cast<const Words*>(a + chunk_offset(16 * m + group, chunk));
      const Words lower = *reinterpret_cast<const Words*>(a + chunk_offset(16 * m + group + 8, chunk));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float* c = sums[m] + 4 * j;
        multiply_16x8x16<T>(c, upper.word[0], lower.word[0], upper.word[1], lower.word[1], right[j].word[0],
                            right[j].word[1]);
        multiply_16x8x16<T>(c, upper.word[2], lower.word[2], upper.word[3], lower.word[3], right[j].word[2],
                            right[j].word[3]);
      }
    }
  }
}

template <int kRowTiles>
__device__ __forceinline__ void multiply_slab(const unsigned char* a, const unsigned char* b, int row_tiles,
                                              float (&sums)[kRowTiles][16], float) {
  const int group = (threadIdx.x & 31) >> 3, eighth = threadIdx.x & 7;
#pragma unroll 2
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    Floats right[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      right[j] = *reinterpret_cast<const Floats*>(b + chunk_offset(8 * j + eighth, chunk));
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (m >= row_tiles) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Floats left = *reinterpret_cast<const Floats*>(a + chunk_offset(16 * m + 4 * i + group, chunk));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            sums[m][4 * i + j] = fmaf(left.value[k], right[j].value[k], sums[m][4 * i + j]);
          }
        }
      }
    }
  }
}

// Where element `index` of a thread's 16 lies in its row tile.
__device__ __forceinline__ int sum_offset(int index, float) {
  const int lane = threadIdx.x & 31;
  return ((lane >> 3) + 4 * (index >> 2)) * kSumPitch + (lane & 7) + 8 * (index & 3);
}

template <typename T>
__device__ __forceinline__ int sum_offset(int index, T) {
  const int lane = threadIdx.x & 31;
  return ((lane >> 2) + 8 * (index >> 1 & 1)) * kSumPitch + 8 * (index >> 2) + 2 * (lane & 3) + (index & 1);
}

// The product of `rows` rows of A with 32 rows of B over slabs [first, last), left in shared memory as one tile of
// float32 for each warp (`summed` adds them). `before_a` runs when B is on its way and A is about to be read.
template <typename T, int kBlockM, typename RowsA, typename RowsB, typename BeforeA>
__device__ __forceinline__ void multiply_tile(unsigned char* shared, const Operand& a, const Operand& b, int rows,
                                              int first, int last, int length, RowsA rows_a, RowsB rows_b,
                                              BeforeA before_a) {
  using L = Layout<kBlockM>;
  const int warp = threadIdx.x / 32;
  unsigned char* const slabs = shared + warp * L::kWarpBytes;
  const int row_tiles = (rows + 15) / 16;
  const int padded_rows = row_tiles * 16;
  first += warp;
  const auto load_b = [&](int stage, int slab) {
    load_rows<T>(slabs + stage * L::kSlab + L::kSlabA, b, kBlockN, slab, length, rows_b);
  };
  const auto load_a = [&](int stage, int slab) {
    load_rows<T>(slabs + stage * L::kSlab, a, padded_rows, slab, length, rows_a);
  };
#pragma unroll 1
  for (int stage = 0; stage < L::kStages; ++stage) {
    if (first + stage * kWarps < last) load_b(stage, first + stage * kWarps);
  }
  before_a();
#pragma unroll 1
  for (int stage = 0; stage < L::kStages; ++stage) {
    if (first + stage * kWarps < last) load_a(stage, first + stage * kWarps);
    copy_commit();
  }

  float sums[L::kRowTiles][16] = {};
  int stage = 0;
#pragma unroll 1
  for (int slab = first; slab < last; slab += kWarps) {
    copy_wait<L::kStages - 1>();
    __syncwarp();
    const unsigned char* const here = slabs + stage * L::kSlab;
    multiply_slab(here, here + L::kSlabA, row_tiles, sums, T{});
    __syncwarp();
    const int next = slab + L::kStages * kWarps;
    if (next < last) {
      load_b(stage, next);
      load_a(stage, next);
    }
    copy_commit();
    stage = stage + 1 == L::kStages ? 0 : stage + 1;
  }

  // every slab that was asked for has been multiplied, so nothing writes or reads here any more
  float* const tile = reinterpret_cast<float*>(slabs);
#pragma unroll
  for (int m = 0; m < L::kRowTiles; ++m) {
    if (m >= row_tiles) continue;
#pragma unroll
    for (int i = 0; i < 16; ++i) tile[16 * m * kSumPitch + sum_offset(i, T{})] = sums[m][i];
  }
  __syncthreads();
}

template <int kBlockM>
__device__ __forceinline__ float summed(const unsigned char* shared, int row, int column) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float* tile = reinterpret_cast<const float*>(shared + warp * Layout<kBlockM>::kWarpBytes);
    sum += tile[row * kSumPitch + column];
  }
  return sum;
}

}  // namespace tiny
}  // namespace mbk
