// The kernels: one block does a layer of up to kMaxTokensOfBlock tokens:
//
//     row = tokens of experts before + rank in the block
//
// For longer layers blocks of kTokensOfTask tokens take tickets. The first half of the tickets counts and finds what
// the blocks before it counted by decoupled look-back (Merrill and Garland, NVR-2016-002); the second half places. A
// block waits for lower tickets only, whose blocks run already, so nothing depends on how many blocks fit the GPU.
#pragma once

#include "device.cuh"
#include "group_tokens_ranks.cuh"

namespace mbk {

// A word of the look-back: what a block, or it and all before it, counted for one expert.
constexpr uint64_t kOfThisBlock = uint64_t{1} << 62;
constexpr uint64_t kUpToThisBlock = uint64_t{1} << 63;

// The first rows of a layer's experts.
__device__ __forceinline__ void write_offsets(const GroupTokensArguments& a, int64_t layer, const int* starts) {
  for (int e = threadIdx.x; e <= a.num_experts; e += blockDim.x) {
    a.offsets[layer * (a.num_experts + 1) + e] = starts[e];
  }
}

// One block does a layer.
template <int ITEMS, bool PACKED>
__global__ void __launch_bounds__(1024, 1) group_layer_kernel(GroupTokensArguments a) {
  const GroupTokensShared s = group_tokens_shared(a);
  const int64_t layer = blockIdx.x, first = first_token_of_thread(0, ITEMS);
  int experts[ITEMS];
  rank_block<ITEMS, PACKED>(a, s, layer, first, experts);
  scan_experts(a.num_experts + 1, s.starts, [&](int e) { return s.counts[e]; });
  int32_t* assignment_to_row = a.assignment_to_row + layer * a.tokens;
  int32_t* row_to_assignment = a.row_to_assignment + layer * a.tokens;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int64_t token = first + i * kWarpSize;
    if (token >= a.tokens) break;
    const int row = s.starts[experts[i] & ((1 << kExpertBits) - 1)] + (experts[i] >> kExpertBits);
    assignment_to_row[token] = row;
    row_to_assignment[row] = static_cast<int32_t>(token);
  }
  write_offsets(a, layer, s.starts);
}

// The sum of what the blocks before counted for an expert, by one warp, 32 blocks at a time.
__device__ __forceinline__ unsigned look_back(const uint64_t* words, int64_t block, int64_t stride) {
  const int lane = threadIdx.x % kWarpSize;
  unsigned sum = 0;
  for (int64_t nearest = block - 1;; nearest -= kWarpSize) {
    const int64_t other = nearest - lane;
    uint64_t word = kUpToThisBlock;
    if (other >= 0) {
      while ((word = load_volatile(words + other * stride)) == 0) pause();
    }
    const unsigned complete = __ballot_sync(kWholeWarp, word >= kUpToThisBlock);
    const unsigned up_to_first = complete == 0 ? kWholeWarp : complete ^ (complete - 1);
    unsigned part = (up_to_first >> lane) & 1 ? static_cast<unsigned>(word) : 0u;
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      part += __shfl_xor_sync(kWholeWarp, part, distance);
    }
    sum += part;
    if (complete != 0) return sum;
  }
}

// Leaves expert + (rank in the block << kExpertBits) in assignment_to_row for the task that places, then publishes.
template <bool PACKED>
__device__ __forceinline__ void count_task(const GroupTokensArguments& a, const GroupTokensShared& s, int64_t layer,
                                           int64_t block) {
  const int64_t first = first_token_of_thread(block * kTokensOfTask, kTaskItems);
  int experts[kTaskItems];
  rank_block<kTaskItems, PACKED>(a, s, layer, first, experts);
  int32_t* scratch = a.assignment_to_row + layer * a.tokens;
#pragma unroll
  for (int i = 0; i < kTaskItems; ++i) {
    if (first + i * kWarpSize < a.tokens) scratch[first + i * kWarpSize] = experts[i];
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize, stride = a.num_experts + 1;
  uint64_t* words = a.words + layer * a.blocks * stride;
  for (int e = threadIdx.x / kWarpSize; e <= a.num_experts; e += kTaskThreads / kWarpSize) {
    const auto own = static_cast<unsigned>(s.counts[e]);
    if (lane == 0 && block > 0) store_volatile(words + block * stride + e, kOfThisBlock | own);
    const unsigned before = block > 0 ? look_back(words + e, block, stride) : 0u;
    if (lane == 0) {
      __threadfence();  // with the barrier before it: the scratch of all threads
      store_volatile(words + block * stride + e, kUpToThisBlock | uint64_t{before + own});
    }
  }
}

__device__ __forceinline__ unsigned wait_for_sum(const uint64_t* word) {
  uint64_t value = 0;
  while ((value = load_volatile(word)) < kUpToThisBlock) pause();
  return static_cast<unsigned>(value);
}

__device__ __forceinline__ void place_task(const GroupTokensArguments& a, const GroupTokensShared& s, int64_t layer,
                                           int64_t block) {
  const int stride = a.num_experts + 1;
  const uint64_t* words = a.words + layer * a.blocks * stride;
  for (int e = threadIdx.x; e <= a.num_experts; e += kTaskThreads) {
    wait_for_sum(words + block * stride + e);  // this block's scratch is written
    s.counts[e] = static_cast<int>(wait_for_sum(words + (a.blocks - 1) * stride + e));
  }
  __threadfence();
  __syncthreads();
  scan_experts(a.num_experts + 1, s.starts, [&](int e) { return s.counts[e]; });
  if (block == 0) write_offsets(a, layer, s.starts);
  int* next_rows = s.counts;
  for (int e = threadIdx.x; e <= a.num_experts; e += kTaskThreads) {
    const unsigned before = block > 0 ? wait_for_sum(words + (block - 1) * stride + e) : 0u;
    next_rows[e] = s.starts[e] + static_cast<int>(before);
  }
  __syncthreads();
  const int64_t first = first_token_of_thread(block * kTokensOfTask, kTaskItems);
  int32_t* assignment_to_row = a.assignment_to_row + layer * a.tokens;
  int32_t* row_to_assignment = a.row_to_assignment + layer * a.tokens;
  int packed[kTaskItems];
#pragma unroll
  for (int i = 0; i < kTaskItems; ++i) {
    const int64_t token = first + i * kWarpSize;
    packed[i] = token < a.tokens ? load_volatile(assignment_to_row + token) : 0;
  }
#pragma unroll
  for (int i = 0; i < kTaskItems; ++i) {
    const int64_t token = first + i * kWarpSize;
    if (token >= a.tokens) break;
    const int row = next_rows[packed[i] & ((1 << kExpertBits) - 1)] + (packed[i] >> kExpertBits);
    assignment_to_row[token] = row;
    row_to_assignment[row] = static_cast<int32_t>(token);
  }
}

template <bool PACKED>
__global__ void __launch_bounds__(kTaskThreads, 1) group_tasks_kernel(GroupTokensArguments a, int64_t layers) {
  const GroupTokensShared s = group_tokens_shared(a);
  if (threadIdx.x == 0) *s.ticket = static_cast<int>(atomicAdd(a.ticket, 1u));
  __syncthreads();
  const int64_t ticket = *s.ticket, tasks = layers * a.blocks;
  if (ticket < tasks) {
    count_task<PACKED>(a, s, ticket / a.blocks, ticket % a.blocks);
  } else {
    place_task(a, s, (ticket - tasks) / a.blocks, (ticket - tasks) % a.blocks);
  }
}

}  // namespace mbk
