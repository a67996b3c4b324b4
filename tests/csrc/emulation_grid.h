// What runs: grids of clusters of blocks of threads, and what each of them has.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <functional>
#include <memory>

#include "emulation_memory.h"
#include "emulation_numbers.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Options {
  uint64_t seed = 0;
  unsigned resident_blocks = 4;  // of a grid; clusters count as one
};

inline Options& options() {
  static Options value;
  return value;
}

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  std::abort();
}

inline unsigned thread_index() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

struct Block;

// One launch.
struct Grid {
  std::function<void()> body;
  dim3 size, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;         // blocks
  bool beside_previous = false;  // may start once all blocks of the grid before it allow it, see `ended`
  Grid* previous = nullptr;

  std::vector<unsigned> waiting;  // clusters that have not started
  unsigned left = 0;              // blocks that have not ended
  unsigned allowing = 0;          // blocks that allow the next grid to start, or have ended
  uint64_t ended = 0;             // 1: all blocks have ended and what they stored is seen by all
  std::vector<std::unique_ptr<View>> views_of_ended;

  unsigned blocks() const { return size.x * size.y * size.z; }
};

// Threads that wait for each other. `arrived` of them are there.
struct Meeting {
  uint64_t generation = 0;
  unsigned arrived = 0;
  unsigned mask = 0;
  uint64_t values[2][kLanes];  // a lane is at most one meeting ahead
};

struct Cluster {
  std::vector<Block*> blocks;
  Meeting barrier;
  unsigned live_threads = 0;
};

struct Event {
  uint64_t due;
  std::function<void()> happen;
};

struct Fiber {
  ucontext_t context;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool started = false;
  bool done = true;
  const uint64_t* waiting_for = nullptr;  // blocked until it differs from `seen`
  uint64_t seen = 0;
  Block* block = nullptr;
  uint3 thread = {};
};

using Fibers = std::vector<std::unique_ptr<Fiber>>;

struct Block {
  Grid* grid = nullptr;
  dim3 index;
  std::shared_ptr<Cluster> cluster;
  unsigned rank = 0;  // in the cluster
  Fibers fibers;
  unsigned live_threads = 0;
  Meeting barrier;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::vector<Meeting> meetings;  // kLanes of each warp, keyed by the lowest lane of their mask
  std::vector<unsigned> order;    // in which its threads run
  std::unique_ptr<View> view;
  std::vector<Event> events;
  uint64_t number = 0;            // of the block since the program began
  unsigned copies_in_flight = 0;  // into its shared memory
  std::shared_ptr<void> more;  // what emulation_hopper.h keeps
  bool allows_next = false;
  unsigned slow_warps = 0;  // stand still, so that others get as far ahead as barriers let them
  uint64_t sweeps = 0;
  unsigned late_warps = 0;  // stand still for `late_sweeps` more
  unsigned late_sweeps = 0;

  bool owns(const void* address) const {
    return static_cast<size_t>(static_cast<const unsigned char*>(address) - shared) < grid->shared_bytes;
  }
};

}  // namespace emulation
