// What the threads of a block and of a warp do together, and what they do to memory that others see.
#pragma once

#include <cmath>

#include "emulation_machine.h"

namespace emulation {

// Every lane of `mask` gives a value; all get all of them.
inline const uint64_t* meet(unsigned mask, uint64_t value) {
  Machine& machine = Machine::instance();
  const unsigned lane = thread_index() % kLanes;
  if (((mask >> lane) & 1) == 0) fail("a lane that is not in its own mask");
  const auto lowest = static_cast<unsigned>(__builtin_ctz(mask));
  Meeting& meeting = machine.block().meetings[thread_index() / kLanes * kLanes + lowest];
  if (meeting.arrived != 0 && meeting.mask != mask) fail("lanes that meet with different masks");
  meeting.mask = mask;
  uint64_t* values = meeting.values[meeting.generation % 2];
  values[lane] = value;
  machine.arrive(meeting, static_cast<unsigned>(__builtin_popcount(mask)));
  return values;
}

}  // namespace emulation

inline void __syncthreads() {
  emulation::Machine& machine = emulation::Machine::instance();
  machine.arrive(machine.block().barrier, machine.block().live_threads);
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

namespace emulation {

// A store that all see at once.
template <typename T>
__attribute__((no_sanitize("thread"))) void store_for_all(T* address, T value) {
  Machine& machine = Machine::instance();
  if (is_shared_by_blocks(address)) {
    memory().settle(address, sizeof(T));
    memory().replace(address, sizeof(T));
  }
  *static_cast<volatile T*>(address) = value;
  machine.tell(address);
}

}  // namespace emulation

// One host thread: what is atomic on the GPU is plain here.
template <typename T>
T atomicAdd(T* address, T value) {
  if (emulation::is_shared_by_blocks(address)) emulation::memory().settle(address, sizeof(T));
  const T old = *static_cast<volatile const T*>(address);
  emulation::store_for_all(address, static_cast<T>(old + value));
  if (!emulation::Machine::instance().block().owns(address)) emulation::Machine::instance().stand_still_sometimes();
  return old;
}

inline void __threadfence() {
  emulation::Machine::instance().fence();
  emulation::Machine::instance().stand_still_sometimes();
}

using std::max;
using std::min;

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(unsigned bits) { return bits == 0 ? 32 : __builtin_clz(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}

namespace mbk {

inline unsigned char* dynamic_shared() { return emulation::Machine::instance().block().shared; }

inline float fast_reciprocal(float x) { return 1.0f / x; }
inline float fast_exp2(float x) { return std::exp2(x); }

template <typename T>
void store_volatile(T* address, T value) {
  emulation::store_for_all(address, value);
}

// It may see what was there before, unless it has seen what is there now; looking again helps in the end.
template <typename T>
T load_volatile(const T* address) {
  if (emulation::is_shared_by_blocks(address) && emulation::Machine::instance().draw(2) == 0) {
    emulation::memory().refresh(address, sizeof(T));
  }
  return *static_cast<const volatile T*>(address);
}

inline void pause() { emulation::Machine::instance().wait(nullptr, 0); }

inline void wait_for_previous_kernel() {
  emulation::Machine& machine = emulation::Machine::instance();
  const emulation::Grid* previous = machine.block().grid->previous;
  if (previous == nullptr) return;
  if (previous->ended == 0) machine.wait(&previous->ended, 0);
  machine.fence();
}

inline void allow_next_kernel() { emulation::Machine::instance().allow_next(); }

}  // namespace mbk
