// The two kernels of tiny_ffn. A CTA is a tile of one expert's rows times a slice of the outputs.
//
//   hidden:  h = act(x w1[e]^T + b1[e])                                    (gathers x, writes h in row order)
//   output:  sums[split] = h w2[e]^T (+ b2[e] + x by the first split), then the CTA of a tile that arrives last adds
//            the splits in order, normalises and writes y in token order
//
// Every CTA finds its tile itself from the offsets or from the ids. The second kernel is launched while the first one
// runs; it has its weights on the way before it waits for h.
#pragma once

#include "tiny_ffn_tile.cuh"
#include "token_lookup.cuh"

namespace mbk {
namespace tiny {

struct Arguments {
  TinyFfnParams p;
  TinyFfnPlan plan;
  Operand x, w1, h, w2;
  bool x_is_float;   // where w1 is not
  bool norm_vector;  // rows of norm_weight, norm_bias and y are aligned to four elements
};

struct Tile {
  int expert;  // E: tokens without an expert
  int first_row;
  int rows;  // 0: no such tile
  int earlier_rows;  // of the expert, in earlier tiles
};

// Dynamic shared memory behind the slabs.
template <int kBlockM>
struct Tail {
  int tokens[kBlockM];
  Tile tile;
  int arrived;
};

template <int kBlockM>
constexpr int kSharedBytes = Layout<kBlockM>::kBytes + static_cast<int>(sizeof(Tail<kBlockM>));

// The warp finds row tile `index` of experts with count(e) rows; e = E are the tokens without one.
template <typename Count>
__device__ __forceinline__ Tile find_tile(Count count, int experts, int index, int block_m) {
  const int lane = threadIdx.x & 31;
  int tiles_before = 0, rows_before = 0;
  for (int base = 0; base <= experts; base += 32) {
    const int e = base + lane;
    const int rows = e <= experts ? count(e) : 0;
    const int tiles = (rows + block_m - 1) / block_m;
    int last_tile = tiles, last_row = rows;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int more_tiles = __shfl_up_sync(kWholeWarp, last_tile, distance);
      const int more_rows = __shfl_up_sync(kWholeWarp, last_row, distance);
      if (lane >= distance) {
        last_tile += more_tiles;
        last_row += more_rows;
      }
    }
    last_tile += tiles_before;
    last_row += rows_before;
    const unsigned reached = __ballot_sync(kWholeWarp, last_tile > index);
    if (reached != 0) {
      const int owner = 31 - __clz(reached & (0u - reached));
      const int earlier = (index - (last_tile - tiles)) * block_m;
      const int left = rows - earlier;
      const Tile tile{e, last_row - rows + earlier, left < block_m ? left : block_m, earlier};
      return {__shfl_sync(kWholeWarp, tile.expert, owner), __shfl_sync(kWholeWarp, tile.first_row, owner),
              __shfl_sync(kWholeWarp, tile.rows, owner), __shfl_sync(kWholeWarp, tile.earlier_rows, owner)};
    }
    tiles_before = __shfl_sync(kWholeWarp, last_tile, 31);
    rows_before = __shfl_sync(kWholeWarp, last_row, 31);
  }
  return {experts, 0, 0, 0};
}

// Experts of all tokens (E: none) and how many tokens each has. Integer sums: their order does not matter.
__device__ __forceinline__ void count_ids(const TinyFfnParams& p, int* expert_of, int* counts) {
  constexpr int kItems = kTinyFfnMaxTokens / kThreads;
  int ids[kItems];
  load_below(p.routing.expert_ids, 0, threadIdx.x, kThreads, p.tokens, p.experts, ids);
  for (int e = threadIdx.x; e <= p.experts; e += kThreads) counts[e] = 0;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int token = threadIdx.x + i * kThreads;
    if (token < p.tokens) {
      const int expert = ids[i] >= 0 ? ids[i] : p.experts;
      expert_of[token] = expert;
      atomicAdd(counts + expert, 1);
    }
  }
  __syncthreads();
}

// The CTA's tile, and the token of row threadIdx.x, which `share_tokens` gives to the others: it may still be on its
// way while the weights are asked for. `scratch` is where the slabs will be.
template <int kBlockM>
__device__ __forceinline__ Tile locate(const TinyFfnParams& p, int index, unsigned char* scratch, Tail<kBlockM>& tail,
                                       int* token) {
  static_assert(kBlockM <= kThreads, "a thread brings one token");
  const TinyFfnRouting& routing = p.routing;
  const int lane = threadIdx.x & 31;
  if (routing.offsets != nullptr) {
    const auto count = [&](int e) { return (e < p.experts ? routing.offsets[e + 1] : p.tokens) - routing.offsets[e]; };
    const Tile tile = find_tile(count, p.experts, index, kBlockM);
    if (static_cast<int>(threadIdx.x) < tile.rows) *token = routing.row_to_assignment[tile.first_row + threadIdx.x];
    return tile;
  }
  int* const expert_of = reinterpret_cast<int*>(scratch);
  int* const counts = expert_of + kTinyFfnMaxTokens;
  count_ids(p, expert_of, counts);
  if (threadIdx.x < 32) {
    const Tile tile = find_tile([&](int e) { return counts[e]; }, p.experts, index, kBlockM);
    int rank = -tile.earlier_rows;
    for (int base = 0; base < p.tokens && rank < tile.rows; base += 32) {
      const bool in_tile = base + lane < p.tokens && expert_of[base + lane] == tile.expert;
      const unsigned same = __ballot_sync(kWholeWarp, in_tile);
      const int row = rank + __popc(same & ((1u << lane) - 1));
      if (in_tile && row >= 0 && row < tile.rows) tail.tokens[row] = base + lane;
      rank += __popc(same);
    }
    if (lane == 0) tail.tile = tile;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < tail.tile.rows) *token = tail.tokens[threadIdx.x];
  return tail.tile;
}

template <int kBlockM>
__device__ __forceinline__ void share_tokens(const Tile& tile, int token, Tail<kBlockM>& tail) {
  if (static_cast<int>(threadIdx.x) < tile.rows) tail.tokens[threadIdx.x] = token;
  __syncthreads();
}

template <typename T, int kBlockM>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) tiny_ffn_hidden_kernel(const Arguments a) {
  allow_next_kernel();
  const TinyFfnParams& p = a.p;
  unsigned char* const shared = dynamic_shared();
  auto& tail = *reinterpret_cast<Tail<kBlockM>*>(shared + Layout<kBlockM>::kBytes);
  const int slice = blockIdx.x % a.plan.hidden_slices, index = blockIdx.x / a.plan.hidden_slices;
  unsigned char* const workspace = static_cast<unsigned char*>(p.workspace);
  if (slice == 0 && threadIdx.x == 0) reinterpret_cast<int*>(workspace + a.plan.count_offset)[index] = 0;
  int token = 0;
  const Tile tile = locate(p, index, shared, tail, &token);
  if (tile.rows == 0 || tile.expert == p.experts) return;

  const bool gated = is_gated(p.activation);
  const int columns = gated ? kBlockN / 2 : kBlockN;
  const int first_column = slice * columns;
  const int column = threadIdx.x & (columns - 1);
  const int n = first_column + column;
  float bias = 0.0f, up_bias = 0.0f;
  if (p.b1 != nullptr && n < p.width) {
    const int64_t base = int64_t{tile.expert} * p.width * (gated ? 2 : 1) + n;
    bias = load<T>(p.b1, base, false);
    if (gated) up_bias = load<T>(p.b1, base + p.width, false);
  }

  const auto row_of_x = [&](int r) { return r < tile.rows ? tail.tokens[r] * p.x_stride_t : int64_t{-1}; };
  const int64_t weight = tile.expert * p.w1_stride_e;
  const auto row_of_w1 = [&](int r) {
    const bool up = r >= columns;
    const int output = first_column + (up ? r - columns : r);
    return output < p.width ? weight + (output + (up ? p.width : 0)) * p.w1_stride_n : int64_t{-1};
  };
  constexpr int kSlab = kChunks * kPerChunk<T>;
  multiply_tile<T, kBlockM>(shared, a.x, a.w1, tile.rows, 0, (p.hidden + kSlab - 1) / kSlab, p.hidden, row_of_x,
                            row_of_w1, [&] { share_tokens(tile, token, tail); });

  T* const h = reinterpret_cast<T*>(workspace);
  for (int r = threadIdx.x / columns; r < tile.rows; r += kThreads / columns) {
    if (n >= p.width) break;
    float value = activate(p.activation, summed<kBlockM>(shared, r, column) + bias);
    if (gated) value *= summed<kBlockM>(shared, r, column + columns) + up_bias;
    from_float(value, h[(tile.first_row + r) * a.plan.h_pitch + n]);
  }
}

// Four neighbours of a tensor of T or of float32 as float32; zeros from `valid` on.
template <typename T>
__device__ __forceinline__ Floats load_four(const void* data, int64_t index, bool is_float, bool vector, int valid) {
  Floats four;
  if (vector && is_float) return *reinterpret_cast<const Floats*>(static_cast<const float*>(data) + index);
  if (vector) {
    struct alignas(4 * sizeof(T)) Four {
      T value[4];
    };
    const Four raw = *reinterpret_cast<const Four*>(static_cast<const T*>(data) + index);
#pragma unroll
    for (int i = 0; i < 4; ++i) four.value[i] = to_float(raw.value[i]);
    return four;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) four.value[i] = i < valid ? load<T>(data, index + i, is_float) : 0.0f;
  return four;
}

template <typename T>
__device__ __forceinline__ void store_four(void* data, int64_t index, bool is_float, bool vector, int valid,
                                           const Floats& four) {
  if (vector && is_float) {
    *reinterpret_cast<Floats*>(static_cast<float*>(data) + index) = four;
  } else if (vector) {
    struct alignas(4 * sizeof(T)) Four {
      T value[4];
    } raw;
#pragma unroll
    for (int i = 0; i < 4; ++i) from_float(four.value[i], raw.value[i]);
    *reinterpret_cast<Four*>(static_cast<T*>(data) + index) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < valid) store<T>(data, index + i, is_float, four.value[i]);
    }
  }
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(kWholeWarp, value, bits);
  return value;
}

// One warp, one row: sums[split * stride + column] become y[token]. Overwrites the first split.
template <typename T>
__device__ __forceinline__ void normalise_row(const Arguments& a, int expert, int token, float* sums, int64_t stride) {
  const TinyFfnParams& p = a.p;
  const int first = 4 * (threadIdx.x & 31);
  float total = 0.0f;
  for (int column = first; column < p.hidden; column += 128) {
    Floats z = *reinterpret_cast<const Floats*>(sums + column);
    for (int split = 1; split < a.plan.splits; ++split) {
      const Floats more = *reinterpret_cast<const Floats*>(sums + split * stride + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) z.value[i] += more.value[i];
    }
    *reinterpret_cast<Floats*>(sums + column) = z;
    total += (z.value[0] + z.value[1]) + (z.value[2] + z.value[3]);  // columns past H are zero
  }
  const float mean = sum_of_warp(total) / static_cast<float>(p.hidden);
  float squares = 0.0f;
  for (int column = first; column < p.hidden; column += 128) {
    const Floats z = *reinterpret_cast<const Floats*>(sums + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float centred = column + i < p.hidden ? z.value[i] - mean : 0.0f;
      squares = fmaf(centred, centred, squares);
    }
  }
  const float scale = 1.0f / sqrtf(sum_of_warp(squares) / static_cast<float>(p.hidden) + p.eps);
  const float weight = p.routing_weights == nullptr ? 1.0f : load<T>(p.routing_weights, token, a.x_is_float);
  const int64_t of_expert = int64_t{expert} * p.hidden, of_token = int64_t{token} * p.hidden;
  for (int column = first; column < p.hidden; column += 128) {
    const int valid = p.hidden - column;
    Floats z = *reinterpret_cast<const Floats*>(sums + column);
    const Floats gain = load_four<T>(p.norm_weight, of_expert + column, a.x_is_float, a.norm_vector, valid);
    const Floats shift = load_four<T>(p.norm_bias, of_expert + column, a.x_is_float, a.norm_vector, valid);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      z.value[i] = weight * fmaf((z.value[i] - mean) * scale, gain.value[i], shift.value[i]);
    }
    store_four<T>(p.y, of_token + column, a.x_is_float, a.norm_vector, valid, z);
  }
}

// The tile's rows, one by one to the warps. A warp brings as many as fit into its shared memory at once.
template <typename T, int kBlockM>
__device__ __forceinline__ void normalise_tile(const Arguments& a, const Tile& tile, const int* tokens,
                                               unsigned char* shared, float* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int splits = a.plan.splits, pitch = static_cast<int>(a.plan.sum_pitch);
  const int64_t stride = a.p.tokens * a.plan.sum_pitch;
  const int64_t row_bytes = splits * a.plan.sum_pitch * int64_t{sizeof(float)};
  const int at_once = static_cast<int>(Layout<kBlockM>::kWarpBytes / row_bytes);
  float* const copies = reinterpret_cast<float*>(shared + warp * Layout<kBlockM>::kWarpBytes);
  if (at_once == 0) {
    for (int r = warp; r < tile.rows; r += kWarps) {
      normalise_row<T>(a, tile.expert, tokens[r], sums + (tile.first_row + r) * a.plan.sum_pitch, stride);
    }
    return;
  }
  for (int first = warp; first < tile.rows; first += kWarps * at_once) {
    const int left = (tile.rows - first + kWarps - 1) / kWarps;
    const int rows = left < at_once ? left : at_once;
    for (int i = 0; i < rows; ++i) {
      for (int split = 0; split < splits; ++split) {
        const float* from = sums + split * stride + (tile.first_row + first + i * kWarps) * a.plan.sum_pitch;
        float* const to = copies + (i * splits + split) * pitch;
        for (int column = 4 * lane; column < pitch; column += 128) copy_async(to + column, from + column, 16);
      }
    }
    // Every lane reads what it copied itself.
    copy_commit();
    copy_wait<0>();
    for (int i = 0; i < rows; ++i) {
      normalise_row<T>(a, tile.expert, tokens[first + i * kWarps], copies + i * splits * pitch, pitch);
    }
  }
}

template <typename T, int kBlockM>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) tiny_ffn_output_kernel(const Arguments a) {
  const TinyFfnParams& p = a.p;
  unsigned char* const shared = dynamic_shared();
  auto& tail = *reinterpret_cast<Tail<kBlockM>*>(shared + Layout<kBlockM>::kBytes);
  const int slice = blockIdx.x % a.plan.output_slices, rest = blockIdx.x / a.plan.output_slices;
  const int index = rest % a.plan.tiles, split = rest / a.plan.tiles;
  unsigned char* const workspace = static_cast<unsigned char*>(p.workspace);
  int token = 0;
  const Tile tile = locate(p, index, shared, tail, &token);

  const bool has_norm = p.norm_weight != nullptr;
  constexpr int kRowsAtOnce = kThreads / kBlockN;
  const int first_column = slice * kBlockN, column = threadIdx.x & (kBlockN - 1), first_row = threadIdx.x / kBlockN;
  const int n = first_column + column;
  const auto x_of_row = [&](int r) {
    return load<T>(p.x, tail.tokens[r] * p.x_stride_t + n * p.x_stride_h, a.x_is_float);
  };
  if (tile.rows == 0 || tile.expert == p.experts) {
    share_tokens(tile, token, tail);
    wait_for_previous_kernel();
    for (int r = first_row; r < tile.rows && split == 0 && n < p.hidden; r += kRowsAtOnce) {
      store<T>(p.y, int64_t{tail.tokens[r]} * p.hidden + n, a.x_is_float, has_norm ? x_of_row(r) : 0.0f);
    }
    return;
  }

  // What the products are added to; loaded early, while the weights are on their way.
  float start[kBlockM / kRowsAtOnce];
  const float bias = p.b2 != nullptr && split == 0 && n < p.hidden
                         ? load<T>(p.b2, int64_t{tile.expert} * p.hidden + n, false)
                         : 0.0f;
  const auto load_start = [&] {
    share_tokens(tile, token, tail);
#pragma unroll
    for (int i = 0; i < kBlockM / kRowsAtOnce; ++i) {
      const int r = first_row + i * kRowsAtOnce;
      start[i] = bias + (has_norm && split == 0 && r < tile.rows && n < p.hidden ? x_of_row(r) : 0.0f);
    }
    wait_for_previous_kernel();
  };
  const auto row_of_h = [&](int r) {
    return r < tile.rows ? (tile.first_row + r) * a.plan.h_pitch : int64_t{-1};
  };
  const int64_t weight = tile.expert * p.w2_stride_e;
  const auto row_of_w2 = [&](int r) {
    return first_column + r < p.hidden ? weight + (first_column + r) * p.w2_stride_n : int64_t{-1};
  };
  constexpr int kSlab = kChunks * kPerChunk<T>;
  const int slabs = (p.width + kSlab - 1) / kSlab;
  const int of_split = (slabs + a.plan.splits - 1) / a.plan.splits;
  const int first = split * of_split;
  multiply_tile<T, kBlockM>(shared, a.h, a.w2, tile.rows, first, first + of_split < slabs ? first + of_split : slabs,
                            p.width, row_of_h, row_of_w2, load_start);

  float* const sums = reinterpret_cast<float*>(workspace + a.plan.sums_offset);
#pragma unroll
  for (int i = 0; i < kBlockM / kRowsAtOnce; ++i) {
    const int r = first_row + i * kRowsAtOnce;
    if (r >= tile.rows) continue;
    const float value = n < p.hidden ? summed<kBlockM>(shared, r, column) + start[i] : 0.0f;
    if (has_norm) {
      const int64_t row = int64_t{split} * p.tokens + tile.first_row + r;
      if (n < a.plan.sum_pitch) sums[row * a.plan.sum_pitch + n] = value;
    } else if (n < p.hidden) {
      const int t = tail.tokens[r];
      const float p_t = p.routing_weights == nullptr ? 1.0f : load<T>(p.routing_weights, t, a.x_is_float);
      store<T>(p.y, int64_t{t} * p.hidden + n, a.x_is_float, p_t * value);
    }
  }
  if (!has_norm) return;

  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // with the barrier before it: the sums of all threads
    tail.arrived = atomicAdd(reinterpret_cast<int*>(workspace + a.plan.count_offset) + index, 1) + 1;
    __threadfence();
  }
  __syncthreads();
  if (tail.arrived == a.plan.output_slices * a.plan.splits) {
    normalise_tile<T, kBlockM>(a, tile, tail.tokens, shared, sums);
  }
}

}  // namespace tiny
}  // namespace mbk
