// A small CUDA on one host thread: kernels of csrc/ compile unchanged and run with real barriers between their threads.
//
// Every CUDA thread is a fiber. Several blocks are in flight at once; which blocks start first, which run, and in which
// order a block's warps and lanes run is drawn from `options().seed`, so that a missing barrier or a wait for a block
// that cannot start shows as a wrong result or as a deadlock, which ends the program with a message. Now and then, when
// a thread has told other blocks something, other warps of its block stand still: what they had yet to do is late.
// Not emulated: static __shared__ variables, memory ordering (stores are seen at once), tensor cores, clusters.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "emulation_numbers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kPatience = 20000;  // sweeps without progress, all threads waiting for memory, before it is a deadlock

struct Options {
  uint64_t seed = 0;
  unsigned resident_blocks = 4;
};

inline Options& options() {
  static Options value;
  return value;
}

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulation: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  std::abort();
}

// Lanes that meet; keyed by the lowest lane of their mask. A lane is at most one meeting ahead, so two buffers do.
struct Meeting {
  uint64_t generation = 0;
  unsigned arrived = 0;
  unsigned mask = 0;
  uint64_t values[2][kLanes];
};

struct Block {
  dim3 index;
  uint64_t barrier_generation = 0;
  unsigned barrier_arrived = 0;
  unsigned live_threads = 0;
  std::vector<uint4> shared;
  std::vector<Meeting> meetings;  // kLanes of each warp
  std::vector<unsigned> order;    // in which its threads run
  unsigned slow_warps = 0;        // stand still, so that others get as far ahead as barriers let them
  unsigned sweeps = 0;
  unsigned late_warps = 0;  // stand still for `late_sweeps` more
  unsigned late_sweeps = 0;
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

inline unsigned thread_index() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  Fiber& current() { return *current_; }

  // Lets others run until *generation differs from `seen`; with nullptr, once.
  void wait(const uint64_t* generation, uint64_t seen) {
    current_->waiting_for = generation;
    current_->seen = seen;
    if (generation != nullptr) progress_ = true;
    if (_setjmp(current_->state) == 0) _longjmp(scheduler_, 1);
  }

  void run(std::function<void()> body, dim3 grid, dim3 block, size_t shared_bytes) {
    body_ = std::move(body);
    gridDim = grid;
    blockDim = block;
    random_.seed(options().seed);
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024) fail("a block has 1 to 1024 threads");
    std::vector<unsigned> waiting(grid.x * grid.y * grid.z);
    std::iota(waiting.begin(), waiting.end(), 0u);
    if (options().seed != 0) std::shuffle(waiting.begin(), waiting.end(), random_);
    while (fibers_.size() < size_t{threads} * options().resident_blocks) fibers_.push_back(std::make_unique<Fiber>());

    std::vector<std::unique_ptr<Block>> resident(options().resident_blocks);
    int patience = kPatience;
    for (;;) {
      progress_ = false;
      bool any = false;
      for (unsigned i = 0; i < resident.size(); ++i) {
        if (resident[i] && resident[i]->live_threads == 0) resident[i].reset();
        if (!resident[i] && !waiting.empty()) {
          resident[i] = start(waiting.back(), threads, shared_bytes, i);
          waiting.pop_back();
          progress_ = true;
        }
        if (!resident[i]) continue;
        any = true;
        // a block that stands still for a while, as on a busy machine
        if (options().seed != 0 && resident.size() > 1 && random_() % 4 == 0) {
          progress_ = true;
          continue;
        }
        sweep(*resident[i], i * threads);
      }
      if (!any) return;
      patience = progress_ ? kPatience : patience - 1;
      if (patience == 0) fail("deadlock");
    }
  }

  // A thread has written where other blocks may look.
  void tell(const void* address) {
    Block& block = *current_->block;
    const auto* shared = reinterpret_cast<const char*>(block.shared.data());
    const auto* told = static_cast<const char*>(address);
    const bool inside = told >= shared && told < shared + block.shared.size() * sizeof(uint4);
    if (inside || options().seed == 0 || block.late_sweeps > 0 || random_() % 4 != 0) return;
    const unsigned some = random_() % 2 == 0 ? ~0u : 1u << random_() % kLanes;
    block.late_warps = some & ~(1u << (thread_index() / kLanes));
    block.late_sweeps = 200;
  }

  void finish_barrier(Block& block) {
    if (block.barrier_arrived == 0 || block.barrier_arrived < block.live_threads) return;
    block.barrier_arrived = 0;
    ++block.barrier_generation;
  }

 private:
  static void enter() { instance().loop(); }

  // A fiber serves one thread after another: making a context costs system calls.
  void loop() {
    for (;;) {
      body_();
      Fiber& fiber = *current_;
      fiber.done = true;
      --fiber.block->live_threads;
      finish_barrier(*fiber.block);
      progress_ = true;
      if (_setjmp(fiber.state) == 0) _longjmp(scheduler_, 1);
    }
  }

  std::unique_ptr<Block> start(unsigned index, unsigned threads, size_t shared_bytes, unsigned slot) {
    auto block = std::make_unique<Block>();
    block->index = dim3(index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y);
    block->live_threads = threads;
    block->shared.assign(shared_bytes / 16 + 1, uint4{0xdeadbeef, 0xdeadbeef, 0xdeadbeef, 0xdeadbeef});
    const unsigned warps = (threads + kLanes - 1) / kLanes;
    block->meetings.resize(warps * kLanes);
    std::vector<unsigned> order(warps);
    std::iota(order.begin(), order.end(), 0u);
    if (options().seed != 0) std::shuffle(order.begin(), order.end(), random_);
    for (unsigned warp : order) {
      const bool backwards = options().seed != 0 && random_() % 2 == 0;
      for (unsigned i = 0; i < kLanes; ++i) {
        const unsigned thread = warp * kLanes + (backwards ? kLanes - 1 - i : i);
        if (thread < threads) block->order.push_back(thread);
      }
    }
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = *fibers_[slot * threads + i];
      fiber.block = block.get();
      fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
      fiber.waiting_for = nullptr;
      fiber.done = false;
    }
    return block;
  }

  void sweep(Block& block, unsigned first_fiber) {
    blockIdx = {block.index.x, block.index.y, block.index.z};
    if (options().seed != 0 && block.sweeps++ % 32 == 0) {
      block.slow_warps = static_cast<unsigned>(random_() & random_());
    }
    if (block.late_sweeps > 0) {
      --block.late_sweeps;
      progress_ = true;
    }
    volatile bool ran = false;  // set between _setjmp and _longjmp
    for (unsigned thread : block.order) {
      Fiber& fiber = *fibers_[first_fiber + thread];
      const unsigned still = block.slow_warps | (block.late_sweeps > 0 ? block.late_warps : 0);
      if ((still >> (thread / kLanes)) & 1) continue;
      if (fiber.done || (fiber.waiting_for != nullptr && *fiber.waiting_for == fiber.seen)) continue;
      if (fiber.waiting_for != nullptr) progress_ = true;
      current_ = &fiber;
      threadIdx = fiber.thread;
      ran = true;
      if (_setjmp(scheduler_) == 0) resume(fiber);
    }
    if (!ran && block.slow_warps != 0) {
      block.slow_warps = 0;
      progress_ = true;
    }
  }

  void resume(Fiber& fiber) {
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
  }

  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::mt19937_64 random_;
  jmp_buf scheduler_;
  Fiber* current_ = nullptr;
  bool progress_ = false;
};

// Every lane of `mask` gives a value; all get all of them.
inline const uint64_t* meet(unsigned mask, uint64_t value) {
  Machine& machine = Machine::instance();
  const unsigned lane = thread_index() % kLanes;
  if (((mask >> lane) & 1) == 0) fail("a lane that is not in its own mask");
  const unsigned lowest = static_cast<unsigned>(__builtin_ctz(mask));
  Meeting& meeting = machine.current().block->meetings[thread_index() / kLanes * kLanes + lowest];
  if (meeting.arrived != 0 && meeting.mask != mask) fail("lanes that meet with different masks");
  meeting.mask = mask;
  uint64_t* values = meeting.values[meeting.generation % 2];
  values[lane] = value;
  if (++meeting.arrived == static_cast<unsigned>(__builtin_popcount(mask))) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    machine.wait(&meeting.generation, meeting.generation);
  }
  return values;
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::Machine& machine = emulation::Machine::instance();
  emulation::Block& block = *machine.current().block;
  const uint64_t generation = block.barrier_generation;
  ++block.barrier_arrived;
  machine.finish_barrier(block);
  if (block.barrier_generation == generation) machine.wait(&block.barrier_generation, generation);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::meet(mask, 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = emulation::meet(mask, predicate != 0);
  unsigned ballot = 0;
  for (unsigned i = 0; i < emulation::kLanes; ++i) {
    if ((mask >> i) & 1) ballot |= static_cast<unsigned>(values[i]) << i;
  }
  return ballot;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t mine = emulation::to_bits(value);
  const uint64_t* values = emulation::meet(mask, mine);
  unsigned same = 0;
  for (unsigned i = 0; i < emulation::kLanes; ++i) {
    if (((mask >> i) & 1) && values[i] == mine) same |= 1u << i;
  }
  return same;
}

namespace emulation {

// `source` may lie outside the segment of `width` lanes: then the own value, as the hardware does it.
template <typename T>
T shuffle(unsigned mask, T value, int source, int width) {
  const int lane = static_cast<int>(thread_index() % kLanes);
  const uint64_t* values = meet(mask, to_bits(value));
  const int first = lane / width * width;
  if (source < first || source >= first + width) return value;
  if (((mask >> source) & 1) == 0) fail("a shuffle from a lane that does not take part");
  return from_bits<T>(values[source]);
}

inline int lane() { return static_cast<int>(thread_index() % kLanes); }

}  // namespace emulation

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulation::shuffle(mask, value, emulation::lane() / width * width + (source & (width - 1)), width);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulation::shuffle(mask, value, emulation::lane() ^ bits, width);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return emulation::shuffle(mask, value, emulation::lane() - static_cast<int>(distance), width);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  return emulation::shuffle(mask, value, emulation::lane() + static_cast<int>(distance), width);
}

// One host thread: what is atomic on the GPU is plain here.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  emulation::Machine::instance().tell(address);
  return old;
}

inline void __threadfence() {}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(unsigned bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }

namespace mbk {

inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(emulation::Machine::instance().current().block->shared.data());
}

inline int64_t opaque(int64_t value) { return value; }
template <typename T>
void store_volatile(T* address, T value) {
  *static_cast<volatile T*>(address) = value;
  emulation::Machine::instance().tell(address);
}

inline void pause() { emulation::Machine::instance().wait(nullptr, 0); }

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  if (blocks <= 0 || threads % 32 != 0 || threads > 1024) return cudaErrorInvalidConfiguration;
  emulation::Machine::instance().run([=] { kernel(arguments...); }, dim3(static_cast<unsigned>(blocks)),
                                     dim3(static_cast<unsigned>(threads)), shared_bytes);
  return cudaSuccess;
}

}  // namespace mbk
