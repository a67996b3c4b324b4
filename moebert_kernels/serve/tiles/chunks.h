// What a call has to compute, and how it is cut.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "products.h"
#include "quantised.h"

// Both structs are those of `__init__.py`, field by field.
struct Layer {
  int is_int8, is_float32, activation, experts, hidden, width, amx;  // of weights, of x and y
  float eps;
  const char *w1, *w2;                      // (E, N1 / 16, K1, tile), (E, N2 / 16, K2, tile); w2 null: y = w1 x + b1
  const int32_t *sum1, *sum2;               // (E, N1), (E, N2) of int8 layers: of an output's weights
  const float *scale1, *scale2, *b1, *b2;   // as wide; scales of int8 layers, biases or null
  const float *norm_weight, *norm_bias;     // (E, H), or null: no norm and no residual
};

struct Call {
  const void* x;                // (T, H), of rows that are x_stride numbers apart
  void* y;                      // (T top_k, H)
  int64_t x_stride;
  const int32_t* offsets;       // (E + 1,), or null with one expert: it has all tokens, in their order
  const int32_t* assignments;   // of each row, or null with offsets
  const float* weights;         // (T top_k,), or null
  int tokens, top_k, threads;
};

namespace mbk {

constexpr int64_t kChunkBytes = 3 << 19;  // of all operands of a chunk but the weights: most of a core's cache
constexpr int kLeastRows = kBlock * kRows, kMostRows = 512;

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t round_up(int64_t count, int64_t multiple) { return ceil_div(count, multiple) * multiple; }

// What a layer's sizes decide.
struct Sizes {
  int steps1, steps2, outputs1, outputs2, width;  // tiles along K; N1, N2 and I, each a multiple of 16 or 32

  explicit Sizes(const Layer& layer) {
    const int step = layer.is_int8 ? kRowBytes : kRowBytes / 2;
    const bool gated = is_gated(static_cast<Activation>(layer.activation));
    width = round_up(layer.width, gated ? kRows : kColumns);
    outputs1 = gated ? 2 * width : width;
    outputs2 = layer.w2 == nullptr ? 0 : round_up(layer.hidden, kColumns);
    steps1 = ceil_div(layer.hidden, step);
    steps2 = layer.w2 == nullptr ? 0 : ceil_div(width, step);
  }
};

// Rows of one expert, and where their operands are.
struct Chunk {
  int expert, start, count, tiles;
  char *inputs, *activations;       // tiles
  float *hidden, *outputs;          // (16 tiles, I) of int8 layers, (16 tiles, N2)
  Quantised *inputs_scale, *activations_scale;

  Chunk(int expert, int start, int count)
      : expert(expert), start(start), count(count), tiles(static_cast<int>(ceil_div(count, kRows))) {}

  static int64_t bytes_of_row(const Layer& layer, const Sizes& sizes) {
    const int64_t hidden = layer.is_int8 ? sizes.steps2 * kRowBytes * sizeof(float) + 2 * sizeof(Quantised) : 0;
    return int64_t{sizes.steps1 + sizes.steps2} * kRowBytes + hidden + sizes.outputs2 * sizeof(float);
  }

  int64_t bytes(const Layer& layer, const Sizes& sizes) const {
    return round_up(tiles * kRows * bytes_of_row(layer, sizes), 64);
  }

  void place(const Layer& layer, const Sizes& sizes, char* memory) {
    const int64_t rows = tiles * kRows;
    inputs = memory;
    activations = inputs + rows * sizes.steps1 * kRowBytes;
    outputs = reinterpret_cast<float*>(activations + rows * sizes.steps2 * kRowBytes);
    if (!layer.is_int8) return;
    hidden = outputs + rows * sizes.outputs2;
    inputs_scale = reinterpret_cast<Quantised*>(hidden + rows * sizes.steps2 * kRowBytes);
    activations_scale = inputs_scale + rows;
  }
};

inline std::vector<Chunk> chunks_of(const Layer& layer, const Call& call, const Sizes& sizes) {
  const int64_t fitting = kChunkBytes / Chunk::bytes_of_row(layer, sizes) / kLeastRows * kLeastRows;
  const int64_t most = std::clamp<int64_t>(fitting, kLeastRows, kMostRows);
  std::vector<Chunk> chunks;
  for (int e = 0; e < layer.experts; ++e) {
    const int begin = call.offsets == nullptr ? 0 : call.offsets[e];
    const int count = call.offsets == nullptr ? call.tokens : call.offsets[e + 1] - begin;
    if (count == 0) continue;
    const int rows = static_cast<int>(round_up(ceil_div(count, ceil_div(count, most)), kLeastRows));
    for (int start = 0; start < count; start += rows) {
      chunks.emplace_back(e, begin + start, std::min(rows, count - start));
    }
  }
  return chunks;
}

}  // namespace mbk
