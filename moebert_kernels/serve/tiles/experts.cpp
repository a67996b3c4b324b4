// All experts of a layer in one call, for x86-64 CPUs with AMX or AVX-512. `__init__.py` compiles it where it runs.
//
//   y[a] = p[a] LayerNorm_e(x[t] + w2[e] act(w1[e] x[t] + b1[e]) + b2[e]), or without the norm and the residual
//
// for each assignment a = t top_k + j of a token t to an expert e. Weights are bfloat16, with x and y in bfloat16; or
// int8 with a scale for each output, with x and y in float32 or bfloat16 and the inputs of both products quantised to
// eight bits, with a scale and a zero point for each row. Sums are in float32 or int32, all else in float32.
//
// Operands lie in tiles of 16 x 64 bytes, as AMX loads them: of an input 16 rows of 32 bfloat16 or 64 int8 numbers; of
// a weight 16 outputs, in row i the 2 or 4 numbers 2i.. or 4i.. of each output. Behind one another lie the tiles along
// K. Of a gated expert 16 gates and their 16 factors are in turns.
//
// The rows of an expert are cut into chunks whose operands stay in the cache, and each chunk goes through five steps:
// inputs, first product and activation, quantised activations, second product, and what is behind it. With fewer chunks
// than threads the steps are shared out instead, so that each thread reads a part of an expert's weights.

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "products.h"
#include "threads.h"

#define MBK_VISIBLE __attribute__((visibility("default")))

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
namespace {

constexpr int64_t kChunkBytes = 3 << 19;  // of all operands of a chunk but the weights: most of a core's cache
constexpr int kLeastRows = kBlock * kRows, kMostRows = 512;

int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t round_up(int64_t count, int64_t multiple) { return ceil_div(count, multiple) * multiple; }

// An int8 layer's input is scale * (q - zero).
struct Quantised {
  float scale;
  int32_t zero;
};

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

// Part `part` of `parts` of [0, count), in units.
struct Range {
  int begin, end;

  Range(int64_t count, int unit, int part, int parts) {
    const int64_t units = ceil_div(count, unit);
    begin = static_cast<int>(std::min<int64_t>(units * part / parts * unit, count));
    end = static_cast<int>(std::min<int64_t>(units * (part + 1) / parts * unit, count));
  }
};

template <bool kInt8, bool kFloat32>
class Runner {
 public:
  Runner(const Layer& layer, const Call& call, const Sizes& sizes) : layer(layer), call(call), sizes(sizes) {}

  void inputs(Chunk& chunk, int part, int parts) const {
    const Range rows(chunk.tiles * kRows, 1, part, parts);
    for (int r = rows.begin; r < rows.end; ++r) {
      char* to = row_of(chunk.inputs, sizes.steps1, r);
      if (r >= chunk.count) {
        for (int k = 0; k < sizes.steps1; ++k) std::memset(to + k * kTileBytes, 0, kRowBytes);
        if (kInt8) chunk.inputs_scale[r] = {0, 0};
        continue;
      }
      const int64_t start = token(chunk, r) * call.x_stride;
      if (kInt8) {
        chunk.inputs_scale[r] = quantise<kFloat32>(call.x, start, layer.hidden, to, sizes.steps1);
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(call.x) + start;
        for (int k = 0; k < sizes.steps1; ++k) {
          const int left = layer.hidden - 32 * k;
          const __mmask32 mask = left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
          _mm512_store_si512(to + k * kTileBytes, _mm512_maskz_loadu_epi16(mask, from + 32 * k));
        }
      }
    }
  }

  void first_product(Chunk& chunk, int part, int parts) const {
    const auto activation = static_cast<Activation>(layer.activation);
    const bool gated = is_gated(activation);
    const Range columns(sizes.outputs1, kColumns, part, parts);
    const int64_t expert = int64_t{chunk.expert} * sizes.outputs1;
    const auto use = [&](int row, int n, const float* sums) {
      Floats h[kBlock];
      for (int j = 0; j < kBlock; ++j) {
        const int64_t at = expert + n + j * kRows;
        h[j] = finished(sums + j * kRows, chunk.inputs_scale, row, layer.scale1, layer.sum1, layer.b1, at);
      }
      if (layer.w2 == nullptr) {
        const int64_t y = int64_t{chunk.start + row} * layer.width;
        for (int j = 0; j < kBlock; ++j) {
          const int column = n + j * kRows;
          store<kFloat32>(call.y, y + column, first(layer.width - column), h[j]);
        }
      } else if (gated) {
        put(chunk, row, n / 2, activate(activation, h[0]) * h[1]);
      } else {
        for (int j = 0; j < kBlock; ++j) put(chunk, row, n + j * kRows, activate(activation, h[j]));
      }
    };
    product(chunk, chunk.inputs, layer.w1, sizes.steps1, sizes.outputs1, columns, use);
    // the last tile's other half, which weights of 0 meet
    if (!kInt8 && layer.w2 != nullptr && part == parts - 1 && sizes.width % 32) {
      for (int r = 0; r < chunk.count; ++r) put(chunk, r, sizes.width, _mm512_setzero_ps());
    }
  }

  void activations(Chunk& chunk, int part, int parts) const {
    if (!kInt8) return;
    const Range rows(chunk.count, 1, part, parts);
    for (int r = rows.begin; r < rows.end; ++r) {
      const int64_t start = int64_t{r} * sizes.width;
      char* to = row_of(chunk.activations, sizes.steps2, r);
      chunk.activations_scale[r] = quantise<true>(chunk.hidden, start, sizes.width, to, sizes.steps2);
    }
  }

  void second_product(Chunk& chunk, int part, int parts) const {
    const Range columns(sizes.outputs2, kColumns, part, parts);
    const int64_t expert = int64_t{chunk.expert} * sizes.outputs2;
    const auto use = [&](int row, int n, const float* sums) {
      float* to = chunk.outputs + int64_t{row} * sizes.outputs2 + n;
      for (int j = 0; j < kBlock; ++j) {
        const int64_t at = expert + n + j * kRows;
        const float* own = sums + j * kRows;
        const Floats z = finished(own, chunk.activations_scale, row, layer.scale2, layer.sum2, layer.b2, at);
        _mm512_store_ps(to + j * kRows, z);
      }
    };
    product(chunk, chunk.activations, layer.w2, sizes.steps2, sizes.outputs2, columns, use);
  }

  void outputs(Chunk& chunk, int part, int parts) const {
    const Range rows(chunk.count, 1, part, parts);
    const int H = layer.hidden;
    for (int r = rows.begin; r < rows.end; ++r) {
      const int64_t assignment = call.assignments[chunk.start + r], y = assignment * H;
      const Floats p = all(call.weights == nullptr ? 1.0f : call.weights[assignment]);
      float* z = chunk.outputs + int64_t{r} * sizes.outputs2;
      if (layer.norm_weight == nullptr) {
        for (int n = 0; n < H; n += 16) store<kFloat32>(call.y, y + n, first(H - n), _mm512_load_ps(z + n) * p);
        continue;
      }
      const int64_t x = token(chunk, r) * call.x_stride, expert = int64_t{chunk.expert} * H;
      Floats sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
      for (int n = 0; n < H; n += 16) {
        const Floats value = _mm512_load_ps(z + n) + load<kFloat32>(call.x, x + n, first(H - n));
        _mm512_store_ps(z + n, value);
        sum = _mm512_mask_add_ps(sum, first(H - n), sum, value);
      }
      const Floats mean = all(_mm512_reduce_add_ps(sum) / H);
      for (int n = 0; n < H; n += 16) {
        const Floats apart = _mm512_maskz_sub_ps(first(H - n), _mm512_load_ps(z + n), mean);
        squares = _mm512_fmadd_ps(apart, apart, squares);
      }
      const Floats inverse = all(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / H + layer.eps));
      for (int n = 0; n < H; n += 16) {
        const __mmask16 mask = first(H - n);
        const Floats weight = _mm512_maskz_loadu_ps(mask, layer.norm_weight + expert + n);
        const Floats bias = _mm512_maskz_loadu_ps(mask, layer.norm_bias + expert + n);
        const Floats normed = _mm512_fmadd_ps((_mm512_load_ps(z + n) - mean) * inverse, weight, bias);
        store<kFloat32>(call.y, y + n, mask, normed * p);
      }
    }
  }

 private:
  int64_t token(const Chunk& chunk, int row) const {
    const int start = chunk.start + row;
    return call.assignments == nullptr ? start : call.assignments[start] / call.top_k;
  }

  static char* row_of(char* tiles, int steps, int row) {
    return tiles + int64_t{row / kRows} * steps * kTileBytes + row % kRows * kRowBytes;
  }

  // Every number of the chunk's rows and these columns, as `use(row, column, 32 sums)`.
  template <typename Use>
  void product(const Chunk& chunk, const char* a, const char* weights, int steps, int outputs, Range columns,
               const Use& use) const {
    alignas(64) float sums[kBlock * kRows * kColumns];
    const char* expert = weights + int64_t{chunk.expert} * outputs * steps * kRowBytes;
    if (layer.amx) configure();
    for (int n = columns.begin; n < columns.end; n += kColumns) {
      const char* b = expert + int64_t{n} * steps * kRowBytes;
      for (int tile = 0; tile < chunk.tiles; tile += kBlock) {
        const bool two = tile + 1 < chunk.tiles;
        const char* rows = a + int64_t{tile} * steps * kTileBytes;
        if (layer.amx) {
          (two ? multiply_amx<kInt8, 2> : multiply_amx<kInt8, 1>)(rows, b, steps, sums);
        } else {
          (two ? multiply_avx512<2> : multiply_avx512<1>)(rows, b, steps, sums);
        }
        const int end = std::min((two ? 2 : 1) * kRows, chunk.count - tile * kRows);
        for (int r = 0; r < end; ++r) use(tile * kRows + r, n, sums + r * kColumns);
      }
    }
    if (layer.amx) _tile_release();
  }

  Floats finished(const float* sums, const Quantised* quantised, int row, const float* scale, const int32_t* sum,
                  const float* bias, int64_t at) const {
    Floats z = _mm512_load_ps(sums);
    if (kInt8) {
      const Quantised x = quantised[row];
      const __m512i zeros = _mm512_mullo_epi32(_mm512_set1_epi32(x.zero), _mm512_loadu_si512(sum + at));
      z = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(z), zeros));
      z = z * all(x.scale) * _mm512_loadu_ps(scale + at);
    }
    return bias == nullptr ? z : z + _mm512_loadu_ps(bias + at);
  }

  void put(const Chunk& chunk, int row, int column, Floats h) const {
    if (kInt8) {
      _mm512_storeu_ps(chunk.hidden + int64_t{row} * sizes.width + column, h);
    } else {
      char* to = row_of(chunk.activations, sizes.steps2, row) + column / 32 * kTileBytes + column % 32 * 2;
      store<false>(to, 0, 0xffff, h);
    }
  }

  // `count` numbers of x from `start` on, as eight bits in a row of tiles.
  template <bool kOfFloats>
  static Quantised quantise(const void* x, int64_t start, int count, char* to, int steps) {
    Floats low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) {
      const Floats value = load<kOfFloats>(x, start + i, first(count - i));
      low = _mm512_min_ps(low, value);
      high = _mm512_max_ps(high, value);
    }
    const float smallest = _mm512_reduce_min_ps(low);
    const float scale = std::max((_mm512_reduce_max_ps(high) - smallest) / 255.0f, 1e-30f);
    const auto zero = static_cast<int32_t>(std::nearbyint(-smallest / scale));
    const Floats inverse = all(1.0f / scale);
    const __m512i zeros = _mm512_set1_epi32(zero), most = _mm512_set1_epi32(255);
    for (int i = 0; i < steps * kRowBytes; i += 16) {
      const Floats value = load<kOfFloats>(x, start + i, first(count - i));
      __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(value * inverse), zeros);
      q = _mm512_min_epi32(_mm512_max_epi32(q, _mm512_setzero_si512()), most);
      char* part = to + i / kRowBytes * kTileBytes + i % kRowBytes;
      _mm_store_si128(reinterpret_cast<__m128i*>(part), _mm512_cvtepi32_epi8(q));
    }
    return {scale, zero};
  }

  const Layer& layer;
  const Call& call;
  const Sizes& sizes;
};

std::vector<Chunk> chunks_of(const Layer& layer, const Call& call, const Sizes& sizes) {
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

template <bool kInt8, bool kFloat32>
void run(const Layer& layer, const Call& call) {
  using Runs = Runner<kInt8, kFloat32>;
  using Step = void (Runs::*)(Chunk&, int, int) const;
  const Sizes sizes(layer);
  const Runs runner(layer, call, sizes);
  std::vector<Step> steps = {&Runs::inputs, &Runs::first_product};
  if (layer.w2 != nullptr) steps.insert(steps.end(), {&Runs::activations, &Runs::second_product, &Runs::outputs});
  std::vector<Chunk> chunks = chunks_of(layer, call, sizes);
  const int count = static_cast<int>(chunks.size());
  if (count >= call.threads) {
    parallel(call.threads, count, [&](int i) {
      chunks[i].place(layer, sizes, scratch(chunks[i].bytes(layer, sizes)));
      for (const Step step : steps) (runner.*step)(chunks[i], 0, 1);
    });
    return;
  }
  int64_t bytes = 0;
  for (const Chunk& chunk : chunks) bytes += chunk.bytes(layer, sizes);
  char* memory = scratch(bytes);
  for (Chunk& chunk : chunks) {
    chunk.place(layer, sizes, memory);
    memory += chunk.bytes(layer, sizes);
  }
  const int parts = static_cast<int>(ceil_div(call.threads, std::max(count, 1)));
  for (const Step step : steps) {
    parallel(call.threads, count * parts, [&](int i) { (runner.*step)(chunks[i / parts], i % parts, parts); });
  }
}

}  // namespace
}  // namespace mbk

// Whether this process may use AMX, for which Linux wants to be asked.
extern "C" MBK_VISIBLE int mbk_tiles_amx() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

extern "C" MBK_VISIBLE void mbk_tiles_run(const Layer* layer, const Call* call) {
  using mbk::run;
  (layer->is_int8 ? layer->is_float32 ? run<true, true> : run<true, false> : run<false, false>)(*layer, *call);
}
