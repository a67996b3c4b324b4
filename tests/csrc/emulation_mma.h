// What tiny_ffn.cuh takes from PTX: tensor cores, whose lanes exchange their fragments, and copies.
#pragma once

#include <type_traits>

#include "emulation_copies.h"

namespace mbk {
namespace tiny {

inline void copy_async(void* shared, const void* global, int bytes) { emulation::copy_async(shared, global, bytes); }
inline void copy_commit() { emulation::commit_copies(); }

template <int kPending>
void copy_wait() {
  emulation::wait_for_copies(kPending);
}

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
