// What a block knows of its tokens: their experts, and stable ranks among those of one expert, without sorting.
//
// A warp owns 32 * ITEMS neighbouring tokens and walks them 32 at a time. Ballots over the bits of the expert's number
// say which lanes share an expert; a token's rank is what the warp counted for that expert before, plus its place
// among those lanes. Adding up what the warps before counted gives the rank in the block.
#pragma once

#include "device.cuh"
#include "group_tokens.h"
#include "token_lookup.cuh"

namespace mbk {

constexpr int kMaxTokensOfBlock = 16384;
constexpr int kTaskThreads = 1024;
constexpr int kTaskItems = 8;
constexpr int kTokensOfTask = kTaskThreads * kTaskItems;
constexpr int kMaxPackedExperts = 64;
constexpr int kExpertBits = 11;  // holds 0 .. kMaxGroupedExperts; the last one means "skipped"
constexpr int kMaxStagedVocabulary = 65536;

struct GroupTokensArguments {
  TokenLookup lookup;
  int32_t* offsets;
  int32_t* row_to_assignment;
  int32_t* assignment_to_row;
  unsigned* ticket;
  uint64_t* words;  // (L, blocks, E + 1)
  int64_t blocks;   // of a layer
  int64_t tokens;
  int num_experts;
  bool by_hash;
  bool stage_table;  // by hash, E <= 255 and V <= kMaxStagedVocabulary
};

// Dynamic shared memory of all kernels here, in this order; E + 1 counts the skipped tokens as an expert.
struct GroupTokensShared {
  int* starts;       // (E + 2) first row of each expert
  int* counts;       // (E + 2) of the block
  int* ticket;       // (1)
  uint8_t* table;    // (V) and up to 15 bytes before it, where it is staged
  uint16_t* before;  // (warps, E + 1) tokens of a warp, then of the warps before it
};

MBK_HOST_DEVICE int64_t shared_table_offset(int num_experts) { return round_up((2 * num_experts + 5) * 4, 16); }

// A table begins in shared memory where it does in its 16 bytes of device memory, so that pieces of 16 can be copied.
MBK_HOST_DEVICE int64_t staged_table_bytes(int64_t vocabulary) {
  return vocabulary == 0 ? 0 : round_up(vocabulary + 15, 16);
}

MBK_HOST_DEVICE int64_t group_tokens_shared_bytes(int num_experts, int warps, int64_t staged_vocabulary) {
  return shared_table_offset(num_experts) + staged_table_bytes(staged_vocabulary) +
         int64_t{warps} * (num_experts + 1) * 2;
}

__device__ __forceinline__ GroupTokensShared group_tokens_shared(const GroupTokensArguments& a) {
  unsigned char* memory = dynamic_shared();
  int* integers = reinterpret_cast<int*>(memory);
  unsigned char* table = memory + shared_table_offset(a.num_experts);
  const int64_t staged = staged_table_bytes(a.stage_table ? a.lookup.vocab_size : 0);
  return {integers, integers + a.num_experts + 2, integers + 2 * a.num_experts + 4, table,
          reinterpret_cast<uint16_t*>(table + staged)};
}

// The layer's table as bytes: lookups spread over 30 thousand bytes cost the L1 a pass for each line they touch. A table
// of bytes is copied 16 at a time, wherever it begins; what lies outside its whole pieces, and other tables, by element.
// Returns where the table begins in `memory`, which is aligned to 16 bytes.
__device__ __forceinline__ uint8_t* stage_table(const GroupTokensArguments& a, int64_t layer, uint8_t* memory) {
  const Integers& tables = a.lookup.tables;
  const int vocab_size = static_cast<int>(a.lookup.vocab_size), threads = static_cast<int>(blockDim.x);
  const auto* bytes = static_cast<const uint8_t*>(tables.data) + layer * tables.stride_layer;
  int shift = 0, head = vocab_size, tail = vocab_size;  // elements before the whole pieces, and where these end
  if (tables.type == IntType::kUInt8 && tables.stride == 1) {
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(bytes) % 16);
    head = min((16 - shift) % 16, vocab_size);
    tail = head + (vocab_size - head) / 16 * 16;
  }
  uint8_t* staged = memory + shift;
  for (int i = head + 16 * threadIdx.x; i < tail; i += 16 * threads) {
    *reinterpret_cast<uint4*>(staged + i) = *reinterpret_cast<const uint4*>(bytes + i);
  }
  const int left = head + vocab_size - tail;
  for (int first = threadIdx.x; first < left; first += 4 * threads) {
    int places[4], values[4];  // token ids, then their experts
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int rest = first + i * threads;
      places[i] = values[i] = rest >= left ? -1 : rest < head ? rest : rest - head + tail;
    }
    look_up(tables, layer, values);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto expert = static_cast<unsigned>(values[i]);
      if (places[i] >= 0) staged[places[i]] = expert < 255 ? expert : 255;
    }
  }
  return staged;
}

// Experts of tokens `first + 32 * i`; E: skipped, E + 1: past the end.
template <int ITEMS>
__device__ __forceinline__ void load_experts(const GroupTokensArguments& a, int64_t layer, int64_t first,
                                             const uint8_t* staged, int (&experts)[ITEMS]) {
  const int64_t limit = a.by_hash ? a.lookup.vocab_size : a.num_experts;
  load_below(a.lookup.token_ids, layer, first, kWarpSize, a.tokens, limit, experts);
  drop_masked(a.lookup.mask, first, kWarpSize, a.tokens, experts);
  if (a.stage_table) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      if (experts[i] >= 0) experts[i] = staged[experts[i]];
    }
  } else if (a.by_hash) {
    look_up(a.lookup.tables, layer, experts);
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    if (experts[i] < 0 || experts[i] > a.num_experts) experts[i] = a.num_experts;
    if (first + i * kWarpSize >= a.tokens) experts[i] = a.num_experts + 1;
  }
}

// For E <= 64: lane l keeps the warp's counts of experts l (low half) and l + 32 (high half) in one register.
// Replaces the experts by expert + (rank in the warp << kExpertBits); `counts` becomes the warp's counts.
template <int ITEMS>
__device__ __forceinline__ void rank_packed(int num_experts, int (&experts)[ITEMS], uint16_t* counts) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned lanes_before = (1u << lane) - 1;
  const int bits = 32 - __clz(static_cast<unsigned>(num_experts - 1));
  unsigned counted = 0;
  int skipped_before = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int expert = experts[i];
    const unsigned routed = __ballot_sync(kWholeWarp, expert < num_experts);
    const unsigned skipped = __ballot_sync(kWholeWarp, expert == num_experts);
    unsigned same = routed, low = routed, high = routed;
    for (int bit = 0; bit < bits; ++bit) {
      const unsigned set = __ballot_sync(kWholeWarp, (expert >> bit) & 1);
      same &= (expert >> bit) & 1 ? set : ~set;
      low &= (lane >> bit) & 1 ? set : ~set;
      high &= bit == 5 || ((lane >> bit) & 1) ? set : ~set;
    }
    const unsigned counter = __shfl_sync(kWholeWarp, counted, expert & 31);
    int rank = static_cast<int>(expert & 32 ? counter >> 16 : counter & 0xffff) + __popc(same & lanes_before);
    if (expert == num_experts) rank = skipped_before + __popc(skipped & lanes_before);
    experts[i] = expert + (rank << kExpertBits);
    counted += __popc(low) + (bits == 6 ? static_cast<unsigned>(__popc(high)) << 16 : 0u);
    skipped_before += __popc(skipped);
  }
  if (lane < num_experts) counts[lane] = static_cast<uint16_t>(counted & 0xffff);
  if (lane + 32 < num_experts) counts[lane + 32] = static_cast<uint16_t>(counted >> 16);
  if (lane == 0) counts[num_experts] = static_cast<uint16_t>(skipped_before);
}

// The same for any E: the warp's counts stay in shared memory.
template <int ITEMS>
__device__ __forceinline__ void rank_shared(int num_experts, int (&experts)[ITEMS], uint16_t* counts) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned lanes_before = (1u << lane) - 1;
  const int bits = 32 - __clz(static_cast<unsigned>(num_experts));
  for (int e = lane; e <= num_experts; e += kWarpSize) counts[e] = 0;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int expert = experts[i];
    const bool present = expert <= num_experts;
    unsigned same = __ballot_sync(kWholeWarp, present);
    for (int bit = 0; bit < bits; ++bit) {
      const unsigned set = __ballot_sync(kWholeWarp, (expert >> bit) & 1);
      same &= (expert >> bit) & 1 ? set : ~set;
    }
    const int before = present ? counts[expert] : 0;
    experts[i] = expert + ((before + __popc(same & lanes_before)) << kExpertBits);
    __syncwarp();
    if (present && (same & lanes_before) == 0) counts[expert] = static_cast<uint16_t>(before + __popc(same));
    __syncwarp();
  }
}

// What the warps before each warp counted, and the block's counts. Begins and ends with all threads together.
__device__ __forceinline__ void add_up_warps(int num_experts, uint16_t* before, int* counts) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  __syncthreads();
  for (int e = warp; e <= num_experts; e += warps) {
    uint16_t* entry = before + lane * (num_experts + 1) + e;
    const int own = lane < warps ? *entry : 0;
    int sum = own;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int other = __shfl_up_sync(kWholeWarp, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane < warps) *entry = static_cast<uint16_t>(sum - own);
    if (lane == kWarpSize - 1) counts[e] = sum;
  }
  __syncthreads();
}

// exclusive[e] = the sum of count(0) .. count(e - 1) for e <= `size`, by the first warp; all threads see it afterwards.
template <typename Count>
__device__ __forceinline__ void scan_experts(int size, int* exclusive, Count&& count) {
  if (threadIdx.x < kWarpSize) {
    const int lane = threadIdx.x;
    int carry = 0;
    for (int first = 0; first < size; first += kWarpSize) {
      const int own = first + lane < size ? count(first + lane) : 0;
      int sum = own;
#pragma unroll
      for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int other = __shfl_up_sync(kWholeWarp, sum, distance);
        if (lane >= distance) sum += other;
      }
      if (first + lane < size) exclusive[first + lane] = carry + sum - own;
      carry += __shfl_sync(kWholeWarp, sum, kWarpSize - 1);
    }
    if (lane == 0) exclusive[size] = carry;
  }
  __syncthreads();
}

// Experts and ranks in the warp of the block's tokens, what the warps before counted, and the block's counts.
template <int ITEMS, bool PACKED>
__device__ __forceinline__ void rank_block(const GroupTokensArguments& a, const GroupTokensShared& s, int64_t layer,
                                           int64_t first, int (&experts)[ITEMS]) {
  const uint8_t* table = nullptr;
  if (a.stage_table) {
    table = stage_table(a, layer, s.table);
    __syncthreads();
  }
  load_experts(a, layer, first, table, experts);
  uint16_t* counts = s.before + static_cast<int>(threadIdx.x) / kWarpSize * (a.num_experts + 1);
  if constexpr (PACKED) {
    rank_packed(a.num_experts, experts, counts);
  } else {
    rank_shared(a.num_experts, experts, counts);
  }
  add_up_warps(a.num_experts, s.before, s.counts);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {  // the rank in the warp becomes that in the block
    const int expert = experts[i] & ((1 << kExpertBits) - 1);
    if (expert <= a.num_experts) experts[i] += counts[expert] << kExpertBits;
  }
}

__device__ __forceinline__ int64_t first_token_of_thread(int64_t first_of_block, int items) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  return first_of_block + int64_t{warp} * kWarpSize * items + lane;
}

}  // namespace mbk
