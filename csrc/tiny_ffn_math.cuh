// Elements, activations and the PTX instructions of tiny_ffn. In host tests emulation_mma.h takes the place of the PTX.
#pragma once

#include <math.h>
#include <string.h>

#include "device.cuh"

#ifdef MBK_EMULATION
#include "emulation_mma.h"
#endif

namespace mbk {
namespace tiny {

struct alignas(16) Words {
  uint32_t word[4];
};
struct alignas(16) Floats {
  float value[4];
};

#ifndef MBK_EMULATION

// The first `bytes` of 16 from device memory, zeros for the rest. Nothing is read for 0 bytes.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <typename T>
__device__ __forceinline__ void multiply_16x8x16(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                 uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_16x8x16<__half>(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                       uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_16x8x16<__nv_bfloat16>(float* c, uint32_t a0, uint32_t a1, uint32_t a2,
                                                           uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#endif  // MBK_EMULATION

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void from_float(float value, float& to) { to = value; }
__device__ __forceinline__ void from_float(float value, __half& to) { to = __float2half_rn(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

template <typename T>
__device__ __forceinline__ uint32_t bits_from_float(float value) {
  T element;
  from_float(value, element);
  uint16_t bits;
  memcpy(&bits, &element, sizeof(bits));
  return bits;
}

// Element `index` of a tensor of T, or of float32 where it has not been cast.
template <typename T>
__device__ __forceinline__ float load(const void* data, int64_t index, bool is_float) {
  if (is_float) return static_cast<const float*>(data)[index];
  return to_float(static_cast<const T*>(data)[index]);
}

template <typename T>
__device__ __forceinline__ void store(void* data, int64_t index, bool is_float, float value) {
  if (is_float) {
    static_cast<float*>(data)[index] = value;
  } else {
    from_float(value, static_cast<T*>(data)[index]);
  }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The ungated part: of gated activations what the gate goes through. A factor x is held where the other one is zero:
// -infinity times zero would be NaN.
__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGelu:
    case Activation::kGeGlu:
      return 0.5f * fmaxf(x, -16.0f) * (1.0f + erff(x * 0.7071067811865476f));
    case Activation::kGeluTanh:
    case Activation::kGeGluTanh:
      // (1 + tanh(u)) / 2 = sigmoid(2u)
      return fmaxf(x, -16.0f) * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case Activation::kSilu:
    case Activation::kSwiGlu:
      return fmaxf(x, -128.0f) * sigmoid(x);
    case Activation::kRelu:
    case Activation::kReGlu:
      return x < 0.0f ? 0.0f : x;  // NaN stays NaN
    case Activation::kRelu2:
      return x < 0.0f ? 0.0f : x * x;
    case Activation::kIdentity:
      break;
  }
  return x;
}

}  // namespace tiny
}  // namespace mbk
