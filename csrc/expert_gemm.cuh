// Expert GEMM for Hopper: persistent CTAs of one producer warp group and two consumer warp groups.
//
// The producer fills a ring of shared-memory stages with a 128 x 64 slice of rows and a kBlockN x 64 slice of weights.
// With tiles of 128 and 192 columns the consumers take the CTA's tiles in turn ("ping-pong"): while one is in its
// epilogue, the other multiplies. A tile of 256 columns is shared by both ("cooperative"), 64 rows each: its weights are
// read from shared memory once for 128 rows, and its epilogue is overlapped by copies alone. Traffic per tile: 128 * K +
// kBlockN * K / kCluster elements read from the L2, 128 * kBlockN written.
//
// Why it cannot lose its place or read a slice too early:
// - full[s] completes when its arrivals and its bytes are in. The producer's thread 0 arrives and expects the bytes of
//   the TMA copies: always kBlockN * 64 elements of weights (from two CTAs where they are shared; elements outside the
//   tensor are zeros and count), and 128 * 64 of rows where TMA reads them. Gathered rows come by cp.async, which
//   writes through the generic proxy while wgmma reads through the async one: each writing thread waits for its copies,
//   fences the proxies, and then its warp commits (arrives), kLag steps after it issued them. kLag <= kStages - 2: a
//   consumer releases a stage after it has issued the next one's product, so that one must be committed while the
//   producer waits.
// - empty[s] completes when the warps of the consumer groups that read the stage have released it, in both CTAs of a
//   cluster: weights for a stage are written into both. Both CTAs walk the same items, with the same number of steps;
//   a CTA without a tile of its own multiplies and stores nothing. A copy from the other CTA may reach full[s] before
//   this CTA expects its bytes, but never in an earlier round, as it waits for this CTA's consumers too.
// - A wait on a parity is unambiguous within one round only. A ping-pong consumer skips the other's steps, which may be
//   several rounds, so it first waits (a named barrier) until the other has seen all its full[] barriers complete.
// - The barriers' instructions do not clobber "memory": shared memory is touched by volatile assembly alone, which the
//   compiler keeps in order.
// - In a cluster the producer leaves last: it waits until both CTAs' consumers have released every stage, so that all
//   arrivals of the other CTA find this one's barriers. All copies from the other CTA have been consumed by then.
// - It may be launched while the kernel before it runs: nobody reads or writes global memory before that one has ended.
#pragma once

#include "expert_gemm_epilogue.cuh"
#include "hopper.cuh"

namespace mbk {

template <class T>
struct ExpertGemmKernelParams {
  CUtensorMap weights;  // (E, N, K), boxes of (1, kBlockN / kCluster, 64)
  CUtensorMap rows;     // (rows, K), boxes of (128, 64); unused with `gather`
  const T* a;           // with `gather` (T, K), rows a_row_stride apart
  const int* offsets;
  EpilogueParams<T> epilogue;
  int a_row_stride, num_rows, num_experts, depth, tiles_n, top_k;
  bool gather;
};

template <class Element_, int kBlockN_, int kCluster_>
struct ExpertGemmTraits {
  using Element = Element_;
  static constexpr int kBlockM = kExpertGemmBlockM, kBlockN = kBlockN_, kBlockK = kExpertGemmBlockK;
  static constexpr int kCluster = kCluster_;
  static constexpr int kGroups = expert_gemm_is_cooperative(kBlockN) ? 2 : 1;  // consumer groups that share a tile
  static constexpr int kGroupRows = kBlockM / kGroups;
  static constexpr int kStages = kBlockN == 128 ? 6 : kBlockN == 192 ? 5 : 4, kLag = kStages / 2;
  static_assert(kLag <= kStages - 2, "see above");
  // 512 registers for a thread of each of the three warp groups; accumulators take kBlockN / kGroups of a consumer's.
  static constexpr int kProducerRegisters = kBlockN == 128 ? 56 : 40;
  static constexpr int kConsumerRegisters = kBlockN == 128 ? 224 : 232;

  using Product = hopper::Product<Element, kBlockM, kBlockN, kBlockK, kStages, kGroups>;

  static constexpr int kRowsElements = kBlockM * kBlockK, kWeightsElements = kBlockN * kBlockK;
  static constexpr uint32_t kRowsBytes = kRowsElements * 2, kWeightsBytes = kWeightsElements * 2;

  using Scheduler = ExpertTileScheduler<kBlockM, kCluster>;
  using Slot = PipelineSlot<kStages>;

  struct Shared {  // swizzled over 1024 bytes: every stage begins at a multiple of them
    alignas(1024) Element rows[kStages][kRowsElements];
    alignas(1024) Element weights[kStages][kWeightsElements];
    uint64_t full[kStages], empty[kStages];
  };
  static_assert(sizeof(Shared) <= 227 * 1024, "more shared memory than an SM has");
};

inline constexpr int kExpertGemmThreads = 384;
inline constexpr int kProducerWarps = 4, kConsumerWarps = 4;

template <class Traits>
__device__ __forceinline__ typename Traits::Scheduler make_scheduler(const int* offsets, int num_experts, int rows,
                                                                     int tiles_n, int rank) {
  constexpr int kCluster = Traits::kCluster;
  return typename Traits::Scheduler(offsets, num_experts, rows, tiles_n, rank, static_cast<int>(blockIdx.x) / kCluster,
                                    static_cast<int>(gridDim.x) / kCluster);
}

// Until the consumers have released the stage. True at once in the first round.
template <class Traits>
__device__ __forceinline__ void producer_acquire(typename Traits::Shared& shared, const typename Traits::Slot& slot) {
  hopper::wait(&shared.empty[slot.stage], slot.phase ^ 1);
}

// Until the consumers have released all stages.
template <class Traits>
__device__ __forceinline__ void producer_tail(typename Traits::Shared& shared, typename Traits::Slot slot) {
  for (int i = 0; i < Traits::kStages; ++i, ++slot) producer_acquire<Traits>(shared, slot);
}

// By one thread: expects a stage's bytes and asks for its weights.
template <class Traits, class Params>
__device__ __forceinline__ void load_weights(const Params& params, typename Traits::Shared& shared,
                                             const ExpertTile& tile, int stage, int k, int rank, uint32_t bytes) {
  constexpr int kPart = Traits::kBlockN / Traits::kCluster;
  uint64_t* full = &shared.full[stage];
  hopper::arrive_and_expect(full, bytes);
  const int row = tile.tile_n * Traits::kBlockN;
  if (tile.shared_weights) {
    hopper::load_box_for((1 << Traits::kCluster) - 1, &params.weights, full,
                         &shared.weights[stage][rank * kPart * Traits::kBlockK], k, row + rank * kPart, tile.expert);
  } else {
#pragma unroll
    for (int part = 0; part < Traits::kCluster; ++part) {
      hopper::load_box(&params.weights, full, &shared.weights[stage][part * kPart * Traits::kBlockK], k,
                       row + part * kPart, tile.expert);
    }
  }
}

// By one thread: rows in grouped order, all by TMA. Rows of a tile that are the next expert's are read and not stored.
template <class Traits, class Params>
__device__ __forceinline__ void produce(const Params& params, typename Traits::Shared& shared, int rank) {
  auto scheduler = make_scheduler<Traits>(params.offsets, params.num_experts, params.num_rows, params.tiles_n, rank);
  typename Traits::Slot slot;
  ExpertTile tile;
  while (scheduler.next(tile)) {
    if (tile.expert == params.num_experts) continue;
    for (int k = 0; k < params.depth; k += Traits::kBlockK, ++slot) {
      producer_acquire<Traits>(shared, slot);
      load_weights<Traits>(params, shared, tile, slot.stage, k, rank, Traits::kWeightsBytes + Traits::kRowsBytes);
      hopper::load_box(&params.rows, &shared.full[slot.stage], &shared.rows[slot.stage][0], k, tile.row0);
    }
  }
  if constexpr (Traits::kCluster > 1) producer_tail<Traits>(shared, slot);
}

// By the warps that wrote a stage's rows, when at most `kPending` of their newer groups of copies may be on their way.
template <class Traits, int kPending>
__device__ __forceinline__ void producer_commit(typename Traits::Shared& shared, int stage) {
  hopper::wait_for_copies<kPending>();
  hopper::fence_proxies();
  __syncwarp();
  if (threadIdx.x % 32 == 0) hopper::arrive(&shared.full[stage]);
}

// By the 128 threads of the producer: rows in token order. Eight lanes read 128 adjacent bytes of a row, a warp four
// rows, a thread every 16th row; 16-byte piece c of row r lies at c ^ (r % 8), as the 128-byte swizzle has it.
template <class Traits, class Params>
__device__ __forceinline__ void produce_gathered(const Params& params, typename Traits::Shared& shared, int rank) {
  constexpr int kPieces = Traits::kBlockK / 8, kRowStep = 128 / kPieces, kRows = Traits::kBlockM / kRowStep;
  const int thread = static_cast<int>(threadIdx.x), piece = thread % kPieces, row_in_tile = thread / kPieces;
  const int target = row_in_tile * kPieces + (piece ^ (row_in_tile % 8));
  auto scheduler = make_scheduler<Traits>(params.offsets, params.num_experts, params.num_rows, params.tiles_n, rank);
  typename Traits::Slot slot, written;
  int pending = 0;
  ExpertTile tile;
  while (scheduler.next(tile)) {
    if (tile.expert == params.num_experts) continue;
    int source_row[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = tile.row0 + row_in_tile + i * kRowStep;
      source_row[i] = row < tile.row_end ? params.epilogue.row_to_assignment[row] / params.top_k : -1;
    }
    for (int k = 0; k < params.depth; k += Traits::kBlockK, ++slot) {
      producer_acquire<Traits>(shared, slot);
      if (thread == 0) load_weights<Traits>(params, shared, tile, slot.stage, k, rank, Traits::kWeightsBytes);
      const int column = k + piece * 8;
      auto* targets = reinterpret_cast<hopper::Bytes16*>(&shared.rows[slot.stage][0]) + target;
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool inside = source_row[i] >= 0 && column < params.depth;
        const int64_t source = inside ? static_cast<int64_t>(source_row[i]) * params.a_row_stride + column : 0;
        hopper::copy_or_zero(targets + i * kRowStep * kPieces, params.a + source, inside);
      }
      hopper::commit_copies();
      if (pending == Traits::kLag) {
        producer_commit<Traits, Traits::kLag>(shared, written.stage);
        ++written;
      } else {
        ++pending;
      }
    }
  }
  hopper::wait_for_copies<0>();
  for (; pending > 0; --pending, ++written) producer_commit<Traits, 0>(shared, written.stage);
  if constexpr (Traits::kCluster > 1) producer_tail<Traits>(shared, slot);
}

// By a consumer's warp, to the producers of the `ranks` CTAs that write into the stage: all of the cluster.
template <class Traits>
__device__ __forceinline__ void consumer_release(typename Traits::Shared& shared, int stage, int ranks) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < ranks) hopper::arrive_at(&shared.empty[stage], lane);
}

// acc = the tile's rows times its weights. Returns with the last product on its way, and its stage.
template <class Traits, class Rows, class Weights, class Accumulators>
__device__ __forceinline__ int multiply(typename Traits::Shared& shared, const Rows& rows, const Weights& weights,
                                        int steps, typename Traits::Slot& slot, Accumulators& acc, int ranks) {
  using Product = typename Traits::Product;
  auto mma = Product::begin();
  int last = 0;
  const auto multiply_stage = [&] {
    hopper::wait(&shared.full[slot.stage], slot.phase);
    Product::start(mma, rows, weights, acc, slot.stage);
    last = slot.stage;
    ++slot;
  };
  multiply_stage();
  for (int step = 1; step < steps; ++step) {
    const int read = last;
    multiply_stage();
    Product::template wait<1>(acc);
    consumer_release<Traits>(shared, read, ranks);
  }
  return last;
}

// A tile from its first stage to its stores. `after_products()` runs when the last product has been issued.
template <class Traits, ActivationForm kForm, class Params, class Rows, class Weights, class Accumulators,
          class AfterProducts>
__device__ __forceinline__ void compute_tile(const Params& params, typename Traits::Shared& shared, ExpertTile tile,
                                             int group, const Rows& rows, const Weights& weights, int steps,
                                             typename Traits::Slot& slot, Accumulators& acc,
                                             AfterProducts after_products) {
  using Product = typename Traits::Product;
  const int thread = static_cast<int>(threadIdx.x) % 128;
  if constexpr (Traits::kGroups > 1) tile.row0 += group * Traits::kGroupRows;
  if (tile.expert < params.num_experts) {
    const int last = multiply<Traits>(shared, rows, weights, steps, slot, acc, Traits::kCluster);
    after_products();
    Product::template wait<0>(acc);
    consumer_release<Traits>(shared, last, Traits::kCluster);
    const auto accumulator = [&](int j, int v, int m, int c) -> float& { return Product::at(acc, j, v, m, c); };
    store_tile<typename Traits::Element, kForm, Traits::kGroupRows, Traits::kBlockN>(params.epilogue, tile, thread,
                                                                                   accumulator);
  } else {
    after_products();
    store_zeros<typename Traits::Element, Traits::kGroupRows, Traits::kBlockN>(params.epilogue, tile, thread);
  }
}

// Two consumer groups in turns: of the tiles of a CTA group 0 takes the first, third, ... Each is put into `tile` for
// `compute(after_products)`.
template <class Traits, class Compute>
__device__ __forceinline__ void in_turns(typename Traits::Scheduler& scheduler, int num_experts, int group, int steps,
                                         typename Traits::Slot& slot, ExpertTile& tile, const Compute& compute) {
  ExpertTile skipped;
  bool has_tile = scheduler.next(tile), is_first = group == 0;
  if (group == 1 && has_tile) {
    if (tile.expert < num_experts) slot.advance(steps);
    has_tile = scheduler.next(tile);
  }
  while (has_tile) {
    const bool other_has_tile = scheduler.next(skipped);
    if (!is_first) hopper::sync_named(256, group);
    is_first = false;
    compute([&] {
      if (other_has_tile) hopper::arrive_named(256, 1 - group);
    });
    if (other_has_tile && skipped.expert < num_experts) slot.advance(steps);
    has_tile = other_has_tile && scheduler.next(tile);
  }
}

template <class Traits, ActivationForm kForm, class Params>
__device__ __forceinline__ void consume(const Params& params, typename Traits::Shared& shared, int rank, int group) {
  using Product = typename Traits::Product;
  const int thread = Traits::kGroups > 1 ? group * 128 : static_cast<int>(threadIdx.x) % 128;
  const auto rows = Product::rows(&shared.rows[0][0], thread);
  const auto weights = Product::weights(&shared.weights[0][0], thread);
  auto acc = Product::accumulators();
  auto scheduler = make_scheduler<Traits>(params.offsets, params.num_experts, params.num_rows, params.tiles_n, rank);
  const int steps = (params.depth + Traits::kBlockK - 1) / Traits::kBlockK;
  typename Traits::Slot slot;
  ExpertTile tile;
  const auto compute = [&](auto after_products) {
    compute_tile<Traits, kForm>(params, shared, tile, group, rows, weights, steps, slot, acc, after_products);
  };
  if constexpr (Traits::kGroups > 1) {
    while (scheduler.next(tile)) compute([] {});
  } else {
    in_turns<Traits>(scheduler, params.num_experts, group, steps, slot, tile, compute);
  }
}

template <class Traits, ActivationForm kForm, class Params>
__global__ void __launch_bounds__(kExpertGemmThreads, 1) expert_gemm_kernel(const __grid_constant__ Params params) {
#ifdef MBK_HAS_WGMMA
  allow_next_kernel();
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(hopper::swizzled_shared());
  const int warp_group = hopper::warp_group_index();
  const int rank = Traits::kCluster == 1 ? 0 : hopper::rank_in_cluster();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      hopper::init_barrier(&shared.full[stage], params.gather ? 1 + kProducerWarps : 1);
      hopper::init_barrier(&shared.empty[stage], kConsumerWarps * Traits::kGroups * Traits::kCluster);
    }
    hopper::publish_barriers();
    hopper::prefetch_map(&params.weights);
    if (!params.gather) hopper::prefetch_map(&params.rows);
  }
  __syncwarp();
  if constexpr (Traits::kCluster == 1) {
    __syncthreads();
  } else {
    hopper::sync_cluster();
  }
  wait_for_previous_kernel();

  if (warp_group == 0) {
    hopper::give_registers_up<Traits::kProducerRegisters>();
    if (params.gather) {
      produce_gathered<Traits>(params, shared, rank);
    } else if (threadIdx.x == 0) {
      produce<Traits>(params, shared, rank);
    }
  } else {
    hopper::take_registers<Traits::kConsumerRegisters>();
    consume<Traits, kForm>(params, shared, rank, warp_group - 1);
  }
#endif
}

}  // namespace mbk
