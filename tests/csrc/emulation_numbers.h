// Half, bfloat16 and vectors of CUDA's headers for the host, rounded as the hardware does it, and casts between bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

namespace emulation {

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8, "a register or two");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(emulation::to_bits(value)); }
inline float __uint_as_float(unsigned bits) { return emulation::from_bits<float>(bits); }

struct __half {
  uint16_t bits;
  explicit operator float() const;
};

struct __nv_bfloat16 {
  uint16_t bits;
  explicit operator float() const { return __uint_as_float(unsigned{bits} << 16); }
};

struct __half2 {
  __half x, y;
};

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) { return static_cast<float>(value); }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = __float_as_uint(value);
  if (std::isnan(value)) return {static_cast<uint16_t>(0x7fff)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half value) {
  const int exponent = (value.bits >> 10) & 31, fraction = value.bits & 1023;
  const float sign = (value.bits >> 15) != 0 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

inline __half __float2half_rn(float value) {
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const float size = std::fabs(value);
  if (std::isnan(value)) return {static_cast<uint16_t>(0x7fff)};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  const int exponent = size < std::ldexp(1.0f, -14) ? -14 : std::ilogb(size);
  const auto units = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // to even
  return {static_cast<uint16_t>(sign | (units + (static_cast<unsigned>(exponent + 14) << 10)))};
}

inline __half::operator float() const { return __half2float(*this); }

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
