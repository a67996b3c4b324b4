// Mathematics of 16 numbers at once, and how they lie in memory.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mbk {

// In the order of moebert_kernels.activation.ACTIVATIONS; the last four are gated.
enum class Activation : int { kGelu, kGeluTanh, kRelu, kRelu2, kSilu, kIdentity, kSwiGlu, kGeGlu, kGeGluTanh, kReGlu };

inline bool is_gated(Activation activation) { return activation >= Activation::kSwiGlu; }

using Floats = __m512;

inline Floats all(float x) { return _mm512_set1_ps(x); }
// Minimum and maximum are x if that is NaN, their second operand.
inline Floats positive(Floats x) { return _mm512_max_ps(_mm512_setzero_ps(), x); }

// 2^x, at most 2^126, whose reciprocal is a number, with a relative error of 8e-8
inline Floats exp2(Floats x) {
  x = _mm512_min_ps(all(126.0f), _mm512_max_ps(all(-150.0f), x));
  const Floats whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Floats part = x - whole;
  Floats y = all(1.5353361960e-4f);
  y = _mm512_fmadd_ps(y, part, all(1.3398875017e-3f));
  y = _mm512_fmadd_ps(y, part, all(9.6184369177e-3f));
  y = _mm512_fmadd_ps(y, part, all(5.5503323674e-2f));
  y = _mm512_fmadd_ps(y, part, all(2.4022647738e-1f));
  y = _mm512_fmadd_ps(y, part, all(6.9314718246e-1f));
  return _mm512_scalef_ps(_mm512_fmadd_ps(y, part, all(1.0f)), whole);
}

inline Floats reciprocal(Floats x) {
  const Floats y = _mm512_rcp14_ps(x);
  return y * _mm512_fnmadd_ps(x, y, all(2.0f));
}

inline Floats sigmoid(Floats x) { return reciprocal(all(1.0f) + exp2(x * all(-1.4426950408889634f))); }

// As moebert_kernels/kernels/activation.py has it where results are rounded to 16 bits.
inline Floats gelu(Floats x) {
  const Floats a = _mm512_min_ps(all(16.0f), _mm512_abs_ps(x));
  const Floats t = reciprocal(_mm512_fmadd_ps(a, all(0.376f), all(1.0f)));
  Floats p = _mm512_fmadd_ps(t, all(-0.0908573932f), all(0.1987446318f));
  p = _mm512_fmadd_ps(p, t, all(0.0847112676f));
  p = _mm512_fmadd_ps(p, t, all(0.1579140741f));
  p = _mm512_fmadd_ps(p, t, all(0.1494775642f));
  return _mm512_fnmadd_ps(a, p * t * exp2(a * a * all(-0.7213475204444817f)), positive(x));
}

// The ungated part. A factor x is held where the other one is zero: -infinity times zero would be NaN.
inline Floats activate(Activation activation, Floats x) {
  switch (activation) {
    case Activation::kGelu:
    case Activation::kGeGlu:
      return gelu(x);
    case Activation::kGeluTanh:
    case Activation::kGeGluTanh:
      return _mm512_max_ps(all(-16.0f), x) *
             sigmoid(all(1.5957691216057308f) * _mm512_fmadd_ps(all(0.044715f) * x * x, x, x));
    case Activation::kSilu:
    case Activation::kSwiGlu:
      return _mm512_max_ps(all(-128.0f), x) * sigmoid(x);
    case Activation::kRelu:
    case Activation::kReGlu:
      return positive(x);
    case Activation::kRelu2:
      return positive(x) * positive(x);
    case Activation::kIdentity:
      break;
  }
  return x;
}

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// 64 integers as unsigned bytes, those outside of [0, 255] as the nearer end.
inline __m512i bytes_of(const __m512i* q) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  return _mm512_permutexvar_epi32(order, bytes);
}

// 16 numbers of float32 or bfloat16, of which `left` are there; the others are 0.
template <bool kFloat32>
Floats load(const void* data, int64_t index, int64_t left) {
  if (kFloat32) {
    const float* numbers = static_cast<const float*>(data) + index;
    return left >= 16 ? _mm512_loadu_ps(numbers) : _mm512_maskz_loadu_ps(first(left), numbers);
  }
  const uint16_t* numbers = static_cast<const uint16_t*>(data) + index;
  const __m256i bits = left >= 16 ? _mm256_loadu_epi16(numbers) : _mm256_maskz_loadu_epi16(first(left), numbers);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

template <bool kFloat32>
void store(void* data, int64_t index, int64_t left, Floats x) {
  if (kFloat32) {
    float* numbers = static_cast<float*>(data) + index;
    left >= 16 ? _mm512_storeu_ps(numbers, x) : _mm512_mask_storeu_ps(numbers, first(left), x);
  } else {
    uint16_t* numbers = static_cast<uint16_t*>(data) + index;
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    left >= 16 ? _mm256_storeu_epi16(numbers, bits) : _mm256_mask_storeu_epi16(numbers, first(left), bits);
  }
}

}  // namespace mbk
