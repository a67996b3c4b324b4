// Rows in eight bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "products.h"

namespace mbk {

// A row is scale * (q - zero); the scale of one with NaN is NaN.
struct Quantised {
  float scale;
  int32_t zero;
};

// `count` numbers of x from `start` on, as a row of `steps` tiles.
template <bool kFloat32>
Quantised quantise(const void* x, int64_t start, int count, char* to, int steps) {
  const int whole = count / kRowBytes;  // steps that have all numbers
  Floats low[4] = {}, high[4] = {};     // an instruction of each waits for none of the others
  __mmask16 nan[4] = {};                // which minimum and maximum forget
  const auto meet = [&](int i, int left, int j) {
    const Floats value = load<kFloat32>(x, start + i, left);
    low[j] = _mm512_min_ps(low[j], value);
    high[j] = _mm512_max_ps(high[j], value);
    nan[j] |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  };
  for (int k = 0; k < whole; ++k) {
    for (int j = 0; j < 4; ++j) meet(k * kRowBytes + 16 * j, 16, j);
  }
  for (int i = whole * kRowBytes; i < count; i += 16) meet(i, count - i, 0);
  const Floats lowest = _mm512_min_ps(_mm512_min_ps(low[0], low[1]), _mm512_min_ps(low[2], low[3]));
  const Floats highest = _mm512_max_ps(_mm512_max_ps(high[0], high[1]), _mm512_max_ps(high[2], high[3]));
  if (nan[0] | nan[1] | nan[2] | nan[3]) return {std::numeric_limits<float>::quiet_NaN(), 0};
  const float smallest = _mm512_reduce_min_ps(lowest);
  const float scale = std::max((_mm512_reduce_max_ps(highest) - smallest) / 255.0f, 1e-30f);
  const auto zero = static_cast<int32_t>(std::nearbyint(-smallest / scale));
  const Floats inverse = all(1.0f / scale), zeros = all(zero);
  const auto put = [&](int k, int left) {
    __m512i q[4];
    for (int j = 0; j < 4; ++j) {
      const Floats value = load<kFloat32>(x, start + k * kRowBytes + 16 * j, left - 16 * j);
      q[j] = _mm512_cvtps_epi32(_mm512_fmadd_ps(value, inverse, zeros));
    }
    _mm512_store_si512(to + k * kTileBytes, bytes_of(q));
  };
  for (int k = 0; k < whole; ++k) put(k, kRowBytes);
  for (int k = whole; k < steps; ++k) put(k, count - k * kRowBytes);
  return {scale, zero};
}

}  // namespace mbk
