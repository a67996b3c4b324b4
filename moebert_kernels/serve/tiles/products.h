// Products of tiles by AMX or AVX-512, and sums of bytes that both count in.
#pragma once

#include <algorithm>
#include <cstring>

#include "numbers.h"

namespace mbk {

constexpr int kRows = 16, kRowBytes = 64, kTileBytes = kRows * kRowBytes;
constexpr int kBlock = 2;                 // tiles of inputs and of weights that are multiplied together
constexpr int kColumns = kBlock * kRows;  // outputs of such a block

// Products of a block: c (kA * 16, 32) = a (kA * 16, K) b' (32, K), in float32 or int32

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void configure() {
  TileConfig config;
  std::fill_n(config.row_bytes, 8, static_cast<uint16_t>(kRowBytes));
  std::fill_n(config.rows, 8, static_cast<uint8_t>(kRows));
  _tile_loadconfig(&config);
}

// The numbers of tiles are part of an instruction, so that no function can have them as arguments.
#define MBK_PRODUCT(sum, a, b)      \
  do {                              \
    if (kInt8) {                    \
      _tile_dpbusd(sum, a, b);      \
    } else {                        \
      _tile_dpbf16ps(sum, a, b);    \
    }                               \
  } while (false)

// `between` is called after each of the steps.
template <bool kInt8, int kA, typename Between>
void multiply_amx(const char* a, const char* b, int steps, float* c, const Between& between) {
  const int64_t next = int64_t{steps} * kTileBytes;
  _tile_zero(0);
  _tile_zero(1);
  if (kA == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < steps; ++k, a += kTileBytes, b += kTileBytes) {
    _tile_loadd(6, b, kRowBytes);
    _tile_loadd(7, b + next, kRowBytes);
    _tile_loadd(4, a, kRowBytes);
    MBK_PRODUCT(0, 4, 6);
    MBK_PRODUCT(1, 4, 7);
    if (kA == 2) {
      _tile_loadd(5, a + next, kRowBytes);
      MBK_PRODUCT(2, 5, 6);
      MBK_PRODUCT(3, 5, 7);
    }
    between();
  }
  constexpr int kPitch = kColumns * sizeof(float);
  _tile_stored(0, c, kPitch);
  _tile_stored(1, c + kRows, kPitch);
  if (kA == 2) {
    _tile_stored(2, c + kRows * kColumns, kPitch);
    _tile_stored(3, c + kRows * kColumns + kRows, kPitch);
  }
}

#undef MBK_PRODUCT

// What lies in the 4 bytes of an operand's row: a product's sums are in int32 or float32.
enum class Numbers { kInt8, kBfloat16, kFloat32 };

template <Numbers kNumbers>
Floats add_product(Floats sum, __m512i a, __m512i b) {
  if (kNumbers == Numbers::kInt8) return _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sum), a, b));
  if (kNumbers == Numbers::kBfloat16) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

constexpr int kTogether = 8;  // rows of AVX-512: 16 sums, two rows of weights and a number are in registers

// The first `count` rows of the product, up to a multiple of kTogether; `between` is called after each of their steps.
template <Numbers kNumbers, typename Between>
void multiply_avx512(const char* a, const char* b, int steps, int count, float* c, const Between& between) {
  const int64_t next = int64_t{steps} * kTileBytes;
  for (int row = 0; row < count; row += kTogether) {
    const char* rows = a + row / kRows * next + row % kRows * kRowBytes;
    Floats sums[kTogether][kBlock];
    for (auto& pair : sums) pair[0] = pair[1] = _mm512_setzero_ps();
    for (int k = 0; k < steps; ++k) {
      for (int i = 0; i < kRows; ++i) {
        const char* weights = b + int64_t{k} * kTileBytes + i * kRowBytes;
        const __m512i left = _mm512_load_si512(weights), right = _mm512_load_si512(weights + next);
        for (int r = 0; r < kTogether; ++r) {
          int32_t numbers;
          std::memcpy(&numbers, rows + int64_t{k} * kTileBytes + r * kRowBytes + i * 4, sizeof(numbers));
          sums[r][0] = add_product<kNumbers>(sums[r][0], _mm512_set1_epi32(numbers), left);
          sums[r][1] = add_product<kNumbers>(sums[r][1], _mm512_set1_epi32(numbers), right);
        }
      }
      between();
    }
    for (int r = 0; r < kTogether; ++r) {
      for (int j = 0; j < kBlock; ++j) _mm512_store_ps(c + (row + r) * kColumns + j * kRows, sums[r][j]);
    }
  }
}

}  // namespace mbk
