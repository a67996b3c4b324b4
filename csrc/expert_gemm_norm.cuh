// Expert GEMM for Hopper whose epilogue adds a residual and normalises whole rows (docs/design/0011).
//
// A cluster holds 128 rows: CTA `rank` multiplies them with columns rank * kBlockN and on of their expert's weights.
// All CTAs walk the same row tiles. Each loads its part of the rows for all of them, so a stage is free when the
// consumers of all CTAs have released it. Pipeline and turns are those of expert_gemm.cuh. A row's mean and variance
// are those of its parts (Chan, Golub and LeVeque 1979: no difference of large squares), which the CTAs send into each
// other's shared memory.
//
// Why parts are neither missed nor mixed:
// - A warp owns 32 rows of a tile and exchanges with the warps of the same place in the other CTAs alone. Its barrier
//   completes when the parts of all CTAs are in: the first lane expects their bytes, every lane sends its own.
// - Another CTA may be one exchange ahead of this warp, but no more: it needs this warp's part to end one. So parts and
//   barriers are there twice: what comes for exchange i + 1 does not count for i, and a place is written again for
//   i + 2 only after this warp has sent its part of i + 1, and so has read those of i.
// - Nobody waits in a circle: the products of a tile need no exchange but those of the same group's tiles before it.
// - A CTA leaves after its last exchange, so that all parts sent to it have come, and after its producer's tail.
#pragma once

#include "expert_gemm.cuh"

namespace mbk {

template <class T>
struct NormEpilogue {
  T* y;              // (T, N) contiguous, by token
  const T* x;        // (T, N), rows x_row_stride apart
  const T* bias;     // (E, N) contiguous, or null; as those of the norm
  const T* norm_weight;
  const T* norm_bias;
  const T* weights;  // (T,), or null
  const int* row_to_token;
  int64_t x_row_stride;
  int columns;
  float eps;
  bool x_by_row;
};

template <class T>
struct ExpertGemmNormKernelParams {
  CUtensorMap weights;  // (E, N, K), boxes of (1, kBlockN, 64)
  CUtensorMap rows;     // (rows, K), boxes of (128 / cluster, 64)
  const int* offsets;
  NormEpilogue<T> epilogue;
  int num_rows, num_experts, depth, cluster, clusters;  // CTAs of a cluster, and how many there are
};

template <class Element, int kBlockN>
struct ExpertGemmNormTraits : ExpertGemmTraits<Element, kBlockN, 1> {
  using Gemm = ExpertGemmTraits<Element, kBlockN, 1>;
  static_assert(Gemm::kGroups == 1, "an exchange is hidden behind the other group's products");
  static constexpr int kMaxCluster = kBlockN == 128 ? 8 : 4;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // of 3 * 168

  struct Shared {  // as that of Gemm, and what is exchanged
    alignas(1024) Element rows[Gemm::kStages][Gemm::kRowsElements];
    alignas(1024) Element weights[Gemm::kStages][Gemm::kWeightsElements];
    uint64_t full[Gemm::kStages], empty[Gemm::kStages];
    uint64_t arrived[2][2][kConsumerWarps];  // of a group's exchanges, even and odd
    float2 parts[2][2][kConsumerWarps][kMaxCluster][kWarpSize];  // mean and sum of squared differences from it
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "more shared memory than an SM has");
};

// Columns of a row that lie in a CTA's tile.
template <int kBlockN>
__device__ __forceinline__ int columns_of_rank(int columns, int rank) {
  return max(0, min(kBlockN, columns - rank * kBlockN));
}

// By a warp, each lane for one row: its part in, the mean and 1 / standard deviation of the whole row out.
template <class Traits, class Params>
__device__ __forceinline__ float2 exchange(const Params& params, typename Traits::Shared& shared, int group, int count,
                                           float2 part) {
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32, lane = static_cast<int>(threadIdx.x) % 32;
  uint64_t* arrived = &shared.arrived[group][count % 2][warp];
  auto& parts = shared.parts[group][count % 2][warp];
  if (lane == 0) hopper::arrive_and_expect(arrived, static_cast<uint32_t>(params.cluster) * sizeof(parts[0]));
  for (int to = 0; to < params.cluster; ++to) hopper::send(&parts[hopper::rank_in_cluster()][lane], arrived, to, part);
  hopper::wait_for_cluster(arrived, static_cast<uint32_t>(count / 2) & 1u);
  const int columns = params.epilogue.columns;
  float mean = 0.0f, squares = 0.0f;
  for (int from = 0; from < params.cluster; ++from) {
    const auto share = static_cast<float>(columns_of_rank<Traits::kBlockN>(columns, from));
    mean = fmaf(share, hopper::received(&parts[from][lane]).x, mean);
  }
  mean /= static_cast<float>(columns);
  for (int from = 0; from < params.cluster; ++from) {
    const auto share = static_cast<float>(columns_of_rank<Traits::kBlockN>(columns, from));
    const float2 theirs = hopper::received(&parts[from][lane]);
    squares += fmaf(share * (theirs.x - mean), theirs.x - mean, theirs.y);
  }
  return make_float2(mean, 1.0f / sqrtf(squares / static_cast<float>(columns) + params.epilogue.eps));
}

__device__ __forceinline__ float sum_of_quad(float value) {
  value += __shfl_xor_sync(kWholeWarp, value, 1);
  return value + __shfl_xor_sync(kWholeWarp, value, 2);
}

// A tile by one warp group, whose accumulators lie as in store_tile. A quad of lanes has four rows, and does two at a
// time: pointers and sums of all four do not fit into registers beside the accumulators. Lane q looks up and exchanges
// what belongs to row q. Columns are multiples of 32, so a block of them is there in all lanes or in none. Rows past
// the tile's end read what its last one reads and are not stored.
template <class T, int kBlockN, class Accumulators, class ExchangeRows>
__device__ __forceinline__ void normalise_tile(const NormEpilogue<T>& params, const ExpertTile& tile, int thread,
                                               const Accumulators& acc, const ExchangeRows& exchange_rows) {
  constexpr int kBlocks = kBlockN / 32, kHalves = kExpertGemmBlockM / 64;
  const int lane = thread % 32, quad_lane = lane % 4;
  const int column0 = tile.tile_n * kBlockN, left = params.columns - column0;
  const int of_expert = tile.expert * params.columns + column0 + 2 * quad_lane;
  const auto of_row = [](auto mine, int m, int v) { return __shfl_sync(kWholeWarp, mine, 2 * m + v, 4); };
  const auto pair_of = [&](const T* values, int j) {
    return Half2<T>::unpack(__ldg(reinterpret_cast<const uint32_t*>(values + of_expert + 8 * j)));
  };

  const int row = tile.row0 + quad_lane / 2 * 64 + thread / 32 * 16 + lane / 4 + quad_lane % 2 * 8;
  const int row_read = min(row, tile.row_end - 1), token = params.row_to_token[row_read];
  const int source = params.x_by_row ? row_read : token, target = row < tile.row_end ? token : -1;

  float2 part = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int m = 0; m < kHalves; ++m) {
    const T* from[2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      from[v] = params.x + of_row(source, m, v) * params.x_row_stride + (column0 + 8 * quad_lane);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (32 * block >= left) continue;
      if (params.bias != nullptr) {
#pragma unroll
        for (int j = 4 * block; j < 4 * block + 4; ++j) {
          const float2 bias = pair_of(params.bias, j);
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            acc(j, v, m, 0) += bias.x;
            acc(j, v, m, 1) += bias.y;
          }
        }
      }
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(from[v] + 32 * block));
        uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
        transpose_quad(words, lane);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 residual = Half2<T>::unpack(words[j]);
          acc(4 * block + j, v, m, 0) += residual.x;
          acc(4 * block + j, v, m, 1) += residual.y;
        }
      }
    }
    float sums[2] = {}, squares[2] = {};  // zeros stand past the last column
#pragma unroll
    for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) sums[v] += acc(j, v, m, 0) + acc(j, v, m, 1);
    }
    const auto share = static_cast<float>(max(1, min(kBlockN, left)));
#pragma unroll
    for (int v = 0; v < 2; ++v) sums[v] = sum_of_quad(sums[v]) / share;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (32 * block >= left) continue;
#pragma unroll
      for (int j = 4 * block; j < 4 * block + 4; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const float first = acc(j, v, m, 0) - sums[v], second = acc(j, v, m, 1) - sums[v];
          squares[v] = fmaf(first, first, fmaf(second, second, squares[v]));
        }
      }
    }
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      squares[v] = sum_of_quad(squares[v]);
      if (quad_lane == 2 * m + v) part = make_float2(sums[v], squares[v]);
    }
  }

  {
    const float2 moments = exchange_rows(part);
#pragma unroll
    for (int m = 0; m < kHalves; ++m) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const float scale = of_row(moments.y, m, v), shift = -scale * of_row(moments.x, m, v);
#pragma unroll
        for (int j = 0; j < kBlockN / 8; ++j) {
          acc(j, v, m, 0) = fmaf(acc(j, v, m, 0), scale, shift);
          acc(j, v, m, 1) = fmaf(acc(j, v, m, 1), scale, shift);
        }
      }
    }
  }
  const float weight = params.weights == nullptr ? 1.0f : static_cast<float>(params.weights[max(target, 0)]);
#pragma unroll
  for (int m = 0; m < kHalves; ++m) {
    T* to[2];
    bool stored[2];
    float weights[2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int to_token = of_row(target, m, v);
      stored[v] = to_token >= 0;
      to[v] = params.y + static_cast<int64_t>(to_token) * params.columns + (column0 + 8 * quad_lane);
      weights[v] = of_row(weight, m, v);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (32 * block >= left) continue;
      uint32_t words[2][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 gain = pair_of(params.norm_weight, 4 * block + j), bias = pair_of(params.norm_bias, 4 * block + j);
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const float first = fmaf(acc(4 * block + j, v, m, 0), gain.x, bias.x);
          const float second = fmaf(acc(4 * block + j, v, m, 1), gain.y, bias.y);
          words[v][j] = Half2<T>::pack(weights[v] * first, weights[v] * second);
        }
      }
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        transpose_quad(words[v], lane);
        if (stored[v]) store_words(to[v] + 32 * block, words[v]);
      }
    }
  }
}

// Rows without an expert, by one warp group: they pass.
template <class T, int kBlockN>
__device__ __forceinline__ void pass_rows(const NormEpilogue<T>& params, const ExpertTile& tile, int thread) {
  constexpr int kPieces = kBlockN / 8, kRowsAtOnce = 128 / kPieces;
  const int column = tile.tile_n * kBlockN + thread % kPieces * 8;
  if (thread >= kRowsAtOnce * kPieces || column >= params.columns) return;
  const int end = min(tile.row_end, tile.row0 + kExpertGemmBlockM);
  for (int row = tile.row0 + thread / kPieces; row < end; row += kRowsAtOnce) {
    const int64_t token = params.row_to_token[row];
    const T* from = params.x + (params.x_by_row ? row : token) * params.x_row_stride + column;
    *reinterpret_cast<uint4*>(params.y + token * params.columns + column) = *reinterpret_cast<const uint4*>(from);
  }
}

// All CTAs of a cluster find the same tiles, each with columns of its own.
template <class Traits, class Params>
__device__ __forceinline__ typename Traits::Scheduler scheduler_of_cluster(const Params& params) {
  return typename Traits::Scheduler(params.offsets, params.num_experts, params.num_rows, 1, 0,
                                    static_cast<int>(blockIdx.x) / params.cluster, params.clusters);
}

// By one thread.
template <class Traits, class Params>
__device__ __forceinline__ void produce_for_cluster(const Params& params, typename Traits::Shared& shared, int rank) {
  auto scheduler = scheduler_of_cluster<Traits>(params);
  const int part = Traits::kBlockM / params.cluster;
  const auto all = static_cast<uint16_t>((1 << params.cluster) - 1);
  typename Traits::Slot slot;
  ExpertTile tile;
  while (scheduler.next(tile)) {
    if (tile.expert == params.num_experts) continue;
    for (int k = 0; k < params.depth; k += Traits::kBlockK, ++slot) {
      producer_acquire<Traits>(shared, slot);
      uint64_t* full = &shared.full[slot.stage];
      hopper::arrive_and_expect(full, Traits::kWeightsBytes + Traits::kRowsBytes);
      hopper::load_box(&params.weights, full, &shared.weights[slot.stage][0], k, rank * Traits::kBlockN, tile.expert);
      hopper::load_box_for(all, &params.rows, full, &shared.rows[slot.stage][rank * part * Traits::kBlockK], k,
                           tile.row0 + rank * part);
    }
  }
  producer_tail<Traits>(shared, slot);
}

template <class Traits, class Params>
__device__ __forceinline__ void consume_and_normalise(const Params& params, typename Traits::Shared& shared,
                                                      int group) {
  using T = typename Traits::Element;
  using Product = typename Traits::Product;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const auto rows = Product::rows(&shared.rows[0][0], thread);
  const auto weights = Product::weights(&shared.weights[0][0], thread);
  auto acc = Product::accumulators();
  const auto accumulator = [&](int j, int v, int m, int c) -> float& { return Product::at(acc, j, v, m, c); };
  auto scheduler = scheduler_of_cluster<Traits>(params);
  const int steps = (params.depth + Traits::kBlockK - 1) / Traits::kBlockK;
  int exchanges = 0;
  typename Traits::Slot slot;
  ExpertTile tile;
  in_turns<Traits>(scheduler, params.num_experts, group, steps, slot, tile, [&](auto after_products) {
    tile.tile_n = hopper::rank_in_cluster();  // asked for again: registers are scarce
    if (tile.expert < params.num_experts) {
      const int last = multiply<Traits>(shared, rows, weights, steps, slot, acc, params.cluster);
      after_products();
      Product::template wait<0>(acc);
      consumer_release<Traits>(shared, last, params.cluster);
      normalise_tile<T, Traits::kBlockN>(params.epilogue, tile, thread, accumulator, [&](float2 part) {
        return exchange<Traits>(params, shared, group, exchanges++, part);
      });
    } else {
      after_products();
      pass_rows<T, Traits::kBlockN>(params.epilogue, tile, thread);
    }
  });
}

template <class Traits, class Params>
__global__ void __launch_bounds__(kExpertGemmThreads, 1)
    expert_gemm_norm_kernel(const __grid_constant__ Params params) {
#ifdef MBK_HAS_WGMMA
  allow_next_kernel();
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(hopper::swizzled_shared());
  const int warp_group = hopper::warp_group_index(), rank = hopper::rank_in_cluster();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      hopper::init_barrier(&shared.full[stage], 1);
      hopper::init_barrier(&shared.empty[stage], kConsumerWarps * params.cluster);
    }
    for (int i = 0; i < 4 * kConsumerWarps; ++i) hopper::init_barrier(&shared.arrived[0][0][0] + i, 1);
    hopper::publish_barriers();
    hopper::prefetch_map(&params.weights);
    hopper::prefetch_map(&params.rows);
  }
  __syncwarp();
  hopper::sync_cluster();
  wait_for_previous_kernel();

  if (warp_group == 0) {
    hopper::give_registers_up<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) produce_for_cluster<Traits>(params, shared, rank);
  } else {
    hopper::take_registers<Traits::kConsumerRegisters>();
    consume_and_normalise<Traits>(params, shared, warp_group - 1);
  }
#endif
}

}  // namespace mbk
