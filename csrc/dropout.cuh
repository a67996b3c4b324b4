// The dropout masks of moebert_kernels/dropout.py: Philox4x32 with 7 rounds, one call for 8 neighbouring columns.
#pragma once

#include "device.cuh"

namespace mbk {

constexpr unsigned kOutputStream = 1;

// Bit i: column 8 * block + i of the row is kept.
__device__ __forceinline__ unsigned keep_bits(int64_t seed, int64_t row, int block, unsigned stream,
                                              unsigned threshold) {
  unsigned c0 = static_cast<unsigned>(block), c1 = static_cast<unsigned>(row);
  unsigned c2 = static_cast<unsigned>(row >> 32), c3 = stream;
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const unsigned high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const unsigned high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const unsigned words[4] = {c0, c1, c2, c3};
  unsigned kept = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    kept |= static_cast<unsigned>((words[i] & 0xffff) >= threshold) << (2 * i);
    kept |= static_cast<unsigned>((words[i] >> 16) >= threshold) << (2 * i + 1);
  }
  return kept;
}

}  // namespace mbk
