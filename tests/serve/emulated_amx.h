// AMX's instructions written out, to be included before the kernels are compiled: so they run by AMX's way of going
// through their operands on CPUs that have AVX-512 alone. A tile that is used before `_tile_loadconfig` ends the process.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

inline thread_local bool configured = false;
inline thread_local unsigned char tiles[8][16][64];

inline void load(int tile, const void* from, int64_t stride) {
  if (!configured) __builtin_trap();
  for (int i = 0; i < 16; ++i) std::memcpy(tiles[tile][i], static_cast<const char*>(from) + i * stride, 64);
}

inline void store(int tile, void* to, int64_t stride) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles[tile][i], 64);
}

inline float number(const unsigned char* bytes) {
  const uint32_t bits = (uint32_t{bytes[0]} | uint32_t{bytes[1]} << 8) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// sum (16, 16) += a (16 rows of 64 bytes) b, whose row k has the numbers of 16 columns that meet 4 bytes of a's rows
template <typename Sum, int kBytes, typename Multiply>
void add_product(int sum, int a, int b, const Multiply& multiply) {
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      unsigned char* place = tiles[sum][row] + 4 * column;
      Sum value;
      std::memcpy(&value, place, sizeof(value));
      for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 4; i += kBytes) value += multiply(tiles[a][row] + 4 * k + i, tiles[b][k] + 4 * column + i);
      }
      std::memcpy(place, &value, sizeof(value));
    }
  }
}

inline void add_bfloat16(int sum, int a, int b) {
  add_product<float, 2>(sum, a, b, [](const auto* x, const auto* y) { return number(x) * number(y); });
}

inline void add_bytes(int sum, int a, int b) {
  add_product<int32_t, 1>(sum, a, b, [](const auto* x, const auto* y) { return *x * static_cast<int8_t>(*y); });
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_zero(tile) std::memset(emulated::tiles[tile], 0, sizeof(emulated::tiles[tile]))
#define _tile_dpbf16ps(sum, a, b) emulated::add_bfloat16(sum, a, b)
#define _tile_dpbusd(sum, a, b) emulated::add_bytes(sum, a, b)
#define _tile_loadconfig(config) (static_cast<void>(config), emulated::configured = true)
#define _tile_release() (emulated::configured = false)
