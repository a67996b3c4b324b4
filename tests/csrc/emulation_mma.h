// Tensor cores and asynchronous copies for emulation.h: lanes exchange their fragments, copies happen when it hurts.
//
// Under odd seeds a copy is made when it is issued, under even ones when it is waited for.
#pragma once

#include <type_traits>
#include <unordered_map>

#include "emulation.h"

namespace mbk {
namespace tiny {

struct Copy {
  void* destination;
  const void* source;
  int bytes;
};

// Copies of one thread, by group; the last group is open.
struct Copies {
  std::vector<std::vector<Copy>> groups{1};
};

inline Copies& copies_of_thread() {
  static std::unordered_map<const void*, Copies> all;
  return all[&emulation::Machine::instance().current()];
}

inline void make_copy(const Copy& copy) {
  std::memset(copy.destination, 0, 16);
  if (copy.bytes > 0) std::memcpy(copy.destination, copy.source, static_cast<size_t>(copy.bytes));
}

inline void copy_async(void* shared, const void* global, int bytes) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(shared) % 16 == 0 && (bytes == 0 || reinterpret_cast<uintptr_t>(global) % 16 == 0);
  if (!aligned || bytes < 0 || bytes > 16) emulation::fail("an asynchronous copy that is not 16 aligned bytes");
  const Copy copy{shared, global, bytes};
  if (emulation::options().seed % 2 == 1) return make_copy(copy);
  copies_of_thread().groups.back().push_back(copy);
}

inline void copy_commit() {
  if (emulation::options().seed % 2 == 0) copies_of_thread().groups.emplace_back();
}

template <int kPending>
void copy_wait() {
  if (emulation::options().seed % 2 == 1) return;
  auto& groups = copies_of_thread().groups;
  const size_t open_or_pending = kPending + 1;
  const size_t done = groups.size() > open_or_pending ? groups.size() - open_or_pending : 0;
  for (size_t i = 0; i < done; ++i) {
    for (const Copy& copy : groups[i]) make_copy(copy);
  }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(done));
}

inline void wait_for_previous_kernel() {}
inline void allow_next_kernel() {}

template <typename T>
float element(uint32_t word, int index) {
  const T value{static_cast<uint16_t>(word >> (16 * index))};
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

// mma.sync.m16n8k16: register i of A holds row lane / 4 + 8 (i % 2), columns 2 (lane % 4) + 8 (i / 2) and the next one;
// register i of B the same columns as rows, and column lane / 4.
template <typename T>
void multiply_16x8x16(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  uint64_t a_low[32], a_high[32], b[32];
  std::memcpy(a_low, emulation::meet(0xffffffffu, a0 | uint64_t{a1} << 32), sizeof(a_low));
  std::memcpy(a_high, emulation::meet(0xffffffffu, a2 | uint64_t{a3} << 32), sizeof(a_high));
  std::memcpy(b, emulation::meet(0xffffffffu, b0 | uint64_t{b1} << 32), sizeof(b));
  const int group = emulation::lane() / 4, quad = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = group, lower = i / 2, column = 2 * quad + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint64_t left = (k < 8 ? a_low : a_high)[4 * row + k % 8 / 2];
      const uint64_t right = b[4 * column + k % 8 / 2];
      c[i] += element<T>(static_cast<uint32_t>(left >> (32 * lower)), k % 2) *
              element<T>(static_cast<uint32_t>(right >> (32 * (k / 8))), k % 2);
    }
  }
}

}  // namespace tiny
}  // namespace mbk
