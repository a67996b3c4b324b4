// What a call of attention has to compute.
#pragma once

#include <cstdint>

// The struct of `attention.py`, field by field. Strides are of a sequence, a head and a token, in numbers.
struct Attention {
  const void *q, *k, *v;   // (B, h, T, D), (B, h, S, D) twice
  void* y;                 // (B, T, h, D)
  const uint8_t* mask;     // (B, h, T, S), whether a key counts for a query; or null
  const void* bias;        // (B, h, T, S), added to the scores; or null
  int64_t q_strides[3], k_strides[3], v_strides[3], mask_strides[3], bias_strides[3];
  int sequences, heads, queries, keys, size, is_float32, amx, threads;
  float scale;
};
