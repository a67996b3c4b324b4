// What expert_gemm.cuh takes from Hopper: mbarriers, clusters, TMA and the two proxies to shared memory.
//
// - mbarriers count arrivals and bytes; one that gets more arrivals than a phase has ends the program.
// - TMA copies arrive in pieces, each at a sweep of its own, and complete their bytes then. What they write is seen by
//   the async proxy.
// - What cp.async writes is seen by the async proxy once it has arrived and the thread that copied it has fenced.
// - What is sent to other blocks, arrivals at their barriers included, is late.
// The async proxy's view of shared memory is a second copy of it, which begins as NaN.
#pragma once

#include <map>

#include "emulation_copies.h"

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

struct alignas(64) CUtensorMap {
  const unsigned char* data;
  uint64_t sizes[3], strides[3];  // of elements; in bytes
  uint32_t box[3];
};

// As the driver's: elements of two bytes, boxes of 128 bytes by some rows.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank < 2 || rank > 3 || reinterpret_cast<uintptr_t>(data) % 16 != 0 || swizzle != CU_TENSOR_MAP_SWIZZLE_128B ||
      box[0] != 64 || box[1] > 256) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {static_cast<const unsigned char*>(data), {1, 1, 1}, {2, 0, 0}, {1, 1, 1}};
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || steps[i] != 1 || (i > 0 && strides[i - 1] % 16 != 0)) return CUDA_ERROR_INVALID_VALUE;
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
    if (i > 0) map->strides[i] = strides[i - 1];
  }
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum cudaGetDriverEntryPointFlags { cudaEnableDefault };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

namespace emulation {

// A phase ends when its arrivals and its bytes are in; bytes may come before they are expected.
struct TransactionBarrier {
  unsigned arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;

  void arrive(int64_t expected) {
    if (arrivals == 0) fail("an arrival at a barrier that is not initialised");
    if (pending == 0) fail("more arrivals than a phase of the barrier has");
    bytes += expected;
    --pending;
    end_phase_if_complete();
  }

  void complete(int64_t arrived) {
    if (arrivals == 0) fail("a copy for a barrier that is not initialised");
    bytes -= arrived;
    end_phase_if_complete();
  }

 private:
  void end_phase_if_complete() {
    if (pending != 0 || bytes != 0) return;
    pending = arrivals;
    ++phase;
  }
};

// What a block has beyond that of emulation_machine.h.
struct HopperBlock {
  std::map<size_t, TransactionBarrier> barriers;  // by offset in shared memory
  std::vector<uint16_t> async_view;
  Meeting named[16];
  std::map<unsigned, unsigned> registers;  // of a thread of each warp that has changed them
  int spare_registers = 0;
  uint64_t registers_given = 0;
};

inline HopperBlock& hopper(Block& block) {
  if (!block.more) {
    auto more = std::make_shared<HopperBlock>();
    more->async_view.assign(block.grid->shared_bytes / 2, 0xffff);
    block.more = more;
  }
  return *static_cast<HopperBlock*>(block.more.get());
}

inline size_t offset_in_shared(const void* address) {
  Block& block = Machine::instance().block();
  if (!block.owns(address)) fail("an address outside this block's shared memory");
  return static_cast<size_t>(static_cast<const unsigned char*>(address) - block.shared);
}

inline TransactionBarrier& barrier_of(const uint64_t* barrier) {
  return hopper(Machine::instance().block()).barriers[offset_in_shared(barrier)];
}

// Where a swizzle over 128 bytes puts byte `offset`, which is counted from a multiple of 1024.
inline size_t swizzled(size_t offset) { return offset ^ ((offset >> 3) & 0x70); }

// Rows [first, first + rows) of a box into the blocks of a cluster, zeros for what lies outside of the tensor.
inline void land(const CUtensorMap& map, const std::vector<Block*>& targets, size_t target, size_t barrier, int k,
                 int row, int expert, uint32_t first, uint32_t rows) {
  for (Block* block : targets) {
    if (block->live_threads == 0) fail("a copy into a block that has ended");
    HopperBlock& more = hopper(*block);
    for (uint32_t i = first; i < first + rows; ++i) {
      const auto y = static_cast<uint64_t>(row) + i;
      const bool inside = y < map.sizes[1] && static_cast<uint64_t>(expert) < map.sizes[2];
      const unsigned char* from =
          map.data + (inside ? static_cast<uint64_t>(expert) * map.strides[2] + y * map.strides[1] : 0);
      for (uint32_t piece = 0; piece < 8; ++piece) {
        unsigned char bytes[16] = {};
        for (uint32_t element = 0; element < 8; ++element) {
          const uint64_t x = static_cast<uint64_t>(k) + 8 * piece + element;
          if (inside && x < map.sizes[0]) std::memcpy(bytes + 2 * element, from + 2 * x, 2);
        }
        const size_t to = swizzled(target + i * 128 + piece * 16);
        std::memcpy(block->shared + to, bytes, 16);
        std::memcpy(&more.async_view[to / 2], bytes, 16);
      }
    }
    more.barriers[barrier].complete(rows * 128);
    --block->copies_in_flight;
  }
}

// Eight bytes into the same place of another block of the cluster, late, and their arrival on its barrier.
inline void send(const void* shared, const uint64_t* barrier, int rank, uint64_t bytes) {
  Machine& machine = Machine::instance();
  const size_t target = offset_in_shared(shared), full = offset_in_shared(barrier);
  auto& blocks = machine.block().cluster->blocks;
  if (target % 8 != 0 || static_cast<size_t>(rank) >= blocks.size()) fail("bytes sent unaligned or out of the cluster");
  Block* block = blocks[static_cast<size_t>(rank)];
  ++block->copies_in_flight;
  machine.later(24, [=] {
    if (block->live_threads == 0) fail("bytes sent to a block that has ended");
    std::memcpy(block->shared + target, &bytes, 8);
    hopper(*block).barriers[full].complete(8);
    --block->copies_in_flight;
  });
}

inline void load_box(const CUtensorMap* map, unsigned ranks, const uint64_t* full, const void* shared, int k, int row,
                     int expert) {
  Machine& machine = Machine::instance();
  const size_t target = offset_in_shared(shared), barrier = offset_in_shared(full);
  if (target % 1024 != 0 || reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("a copy to or from a place unaligned");
  std::vector<Block*> targets;
  for (Block* block : machine.block().cluster->blocks) {
    if ((ranks >> block->rank) & 1) targets.push_back(block);
  }
  const CUtensorMap copy = *map;
  const uint32_t rows = map->box[1], cut = 1 + static_cast<uint32_t>(machine.draw(rows - 1));
  for (const auto& [first, count] : {std::pair{0u, cut}, std::pair{cut, rows - cut}}) {
    if (count == 0) continue;
    for (Block* block : targets) ++block->copies_in_flight;
    machine.later(24, [=, first = first, count = count] {
      land(copy, targets, target, barrier, k, row, expert, first, count);
    });
  }
}

}  // namespace emulation

namespace mbk {
namespace hopper {

inline unsigned char* swizzled_shared() { return dynamic_shared(); }
inline int warp_group_index() { return static_cast<int>(threadIdx.x) / 128; }
inline int rank_in_cluster() { return static_cast<int>(emulation::Machine::instance().block().rank); }

inline void sync_cluster() {
  emulation::Machine& machine = emulation::Machine::instance();
  emulation::Cluster& cluster = *machine.block().cluster;
  machine.arrive(cluster.barrier, cluster.live_threads);
}

// Each thread of the launch has this many of an SM's 65,536, in steps of 8.
inline int registers_at_launch() { return 65536 / static_cast<int>(blockDim.x) / 8 * 8; }

template <uint32_t kRegisters>
void give_registers_up() {
  emulation::meet(0xffffffffu, 0);
  if (emulation::lane() != 0) return;
  auto& more = emulation::hopper(emulation::Machine::instance().block());
  more.spare_registers += registers_at_launch() - static_cast<int>(kRegisters);
  ++more.registers_given;
}

// Waits until other warps have given up enough.
template <uint32_t kRegisters>
void take_registers() {
  emulation::meet(0xffffffffu, 0);
  auto& more = emulation::hopper(emulation::Machine::instance().block());
  const int wanted = static_cast<int>(kRegisters) - registers_at_launch();
  if (emulation::lane() == 0) {
    while (more.spare_registers < wanted) {
      emulation::Machine::instance().wait(&more.registers_given, more.registers_given);
    }
    more.spare_registers -= wanted;
  }
  emulation::meet(0xffffffffu, 0);
}

inline void init_barrier(uint64_t* barrier, int arrivals) {
  auto& state = emulation::barrier_of(barrier);
  state.arrivals = state.pending = static_cast<unsigned>(arrivals);
}

inline void publish_barriers() {}
inline void arrive(uint64_t* barrier) { emulation::barrier_of(barrier).arrive(0); }

// At another block it is late, as all that goes there.
inline void arrive_at(uint64_t* barrier, int rank) {
  emulation::Machine& machine = emulation::Machine::instance();
  auto& blocks = machine.block().cluster->blocks;
  if (static_cast<size_t>(rank) >= blocks.size()) emulation::fail("an arrival outside the cluster");
  const size_t offset = emulation::offset_in_shared(barrier);
  emulation::Block* block = blocks[static_cast<size_t>(rank)];
  ++block->copies_in_flight;
  const auto happen = [=] {
    if (block->live_threads == 0) emulation::fail("an arrival at a block that has ended");
    emulation::hopper(*block).barriers[offset].arrive(0);
    --block->copies_in_flight;
  };
  if (block == &machine.block()) return happen();
  machine.later(24, happen);
}

inline void arrive_and_expect(uint64_t* barrier, uint32_t bytes) { emulation::barrier_of(barrier).arrive(bytes); }

// True of the phase before this one, too: what makes a wait that is a round too early pass.
inline void wait(uint64_t* barrier, uint32_t parity) {
  auto& state = emulation::barrier_of(barrier);
  while ((state.phase & 1) == parity) emulation::Machine::instance().wait(&state.phase, state.phase);
}

inline void wait_for_cluster(uint64_t* barrier, uint32_t parity) {
  wait(barrier, parity);
  emulation::Machine::instance().warp_stands_still_sometimes();
}

inline void send(float2* shared, uint64_t* barrier, int rank, float2 value) {
  emulation::send(shared, barrier, rank, emulation::to_bits(value));
}

inline float2 received(const float2* shared) { return *shared; }

inline void sync_named(int threads, int name) {
  emulation::Machine& machine = emulation::Machine::instance();
  machine.arrive(emulation::hopper(machine.block()).named[name], static_cast<unsigned>(threads));
}

inline void arrive_named(int threads, int name) {
  emulation::Machine& machine = emulation::Machine::instance();
  machine.arrive(emulation::hopper(machine.block()).named[name], static_cast<unsigned>(threads), 1, true);
}

inline void prefetch_map(const CUtensorMap*) {}

inline void load_box(const CUtensorMap* map, uint64_t* full, void* shared, int k, int row, int expert = 0) {
  emulation::load_box(map, 1u << rank_in_cluster(), full, shared, k, row, expert);
}

inline void load_box_for(uint16_t ranks, const CUtensorMap* map, uint64_t* full, void* shared, int k, int row,
                         int expert) {
  emulation::load_box(map, ranks, full, shared, k, row, expert);
}

inline void load_box_for(uint16_t ranks, const CUtensorMap* map, uint64_t* full, void* shared, int k, int row) {
  emulation::load_box(map, ranks, full, shared, k, row, 0);
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

inline void copy_or_zero(Bytes16* shared, const void* global, bool inside) {
  emulation::copy_async(shared, global, inside ? 16 : 0);
}

inline void commit_copies() { emulation::commit_copies(); }

template <int kPending>
void wait_for_copies() {
  emulation::wait_for_copies(kPending);
}

inline void fence_proxies() {
  auto& written = emulation::copies_of_thread().written;
  auto& view = emulation::hopper(emulation::Machine::instance().block()).async_view;
  for (const auto& copy : written) {
    std::memcpy(&view[emulation::offset_in_shared(copy->target) / 2], copy->target, 16);
  }
  written.clear();
}

}  // namespace hopper
}  // namespace mbk
