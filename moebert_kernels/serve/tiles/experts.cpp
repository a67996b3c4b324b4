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

#include "chunks.h"
#include "threads.h"

#define MBK_VISIBLE __attribute__((visibility("default")))

namespace mbk {
namespace {

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
    const Product of = {chunk.inputs, layer.w1, sizes.steps1, sizes.outputs1, chunk.inputs_scale,
                        layer.scale1, layer.sum1, layer.b1};
    product(chunk, of, columns, [&](int row, int n, const Floats* h) {
      if (layer.w2 == nullptr) {
        const int64_t y = int64_t{chunk.start + row} * layer.width;
        for (int j = 0; j < kBlock; ++j) {
          const int column = n + j * kRows;
          store<kFloat32>(call.y, y + column, layer.width - column, h[j]);
        }
      } else if (gated) {
        put(chunk, row, n / 2, activate(activation, h[0]) * h[1]);
      } else {
        for (int j = 0; j < kBlock; ++j) put(chunk, row, n + j * kRows, activate(activation, h[j]));
      }
    });
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
    const Product of = {chunk.activations, layer.w2, sizes.steps2, sizes.outputs2, chunk.activations_scale,
                        layer.scale2, layer.sum2, layer.b2};
    product(chunk, of, columns, [&](int row, int n, const Floats* z) {
      float* to = chunk.outputs + int64_t{row} * sizes.outputs2 + n;
      for (int j = 0; j < kBlock; ++j) _mm512_store_ps(to + j * kRows, z[j]);
    });
  }

  void outputs(Chunk& chunk, int part, int parts) const {
    const Range rows(chunk.count, 1, part, parts);
    const int H = layer.hidden;
    for (int r = rows.begin; r < rows.end; ++r) {
      const int64_t assignment = call.assignments[chunk.start + r], y = assignment * H;
      const Floats p = all(call.weights == nullptr ? 1.0f : call.weights[assignment]);
      float* z = chunk.outputs + int64_t{r} * sizes.outputs2;
      if (layer.norm_weight == nullptr) {
        for (int n = 0; n < H; n += 16) store<kFloat32>(call.y, y + n, H - n, _mm512_load_ps(z + n) * p);
        continue;
      }
      const int64_t x = token(chunk, r) * call.x_stride, expert = int64_t{chunk.expert} * H;
      Floats sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
      for (int n = 0; n < H; n += 16) {
        const Floats value = _mm512_load_ps(z + n) + load<kFloat32>(call.x, x + n, H - n);
        _mm512_store_ps(z + n, value);
        sum = sum + value;  // behind H there are zeros
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
        store<kFloat32>(call.y, y + n, H - n, normed * p);
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

  // Operands of a product; what belongs to weights is that of all experts.
  struct Product {
    const char *inputs, *weights;
    int steps, outputs;
    const Quantised* quantised;
    const float* scale;
    const int32_t* sum;
    const float* bias;
  };

  // A block's outputs from its sums: what its rows have in common is loaded once.
  struct Outputs {
    Floats scale[kBlock], bias[kBlock];
    __m512i sum[kBlock];

    Outputs(const Product& of, int64_t at) {
      for (int j = 0; j < kBlock; ++j, at += kRows) {
        bias[j] = of.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(of.bias + at);
        if (!kInt8) continue;
        scale[j] = _mm512_loadu_ps(of.scale + at);
        sum[j] = _mm512_loadu_si512(of.sum + at);
      }
    }

    Floats at(int j, const float* sums, const Quantised* quantised) const {
      const Floats z = _mm512_load_ps(sums + j * kRows);
      if (!kInt8) return z + bias[j];
      const __m512i zeros = _mm512_mullo_epi32(_mm512_set1_epi32(quantised->zero), sum[j]);
      const __m512i whole = _mm512_sub_epi32(_mm512_castps_si512(z), zeros);
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), all(quantised->scale) * scale[j], bias[j]);
    }
  };

  // Every number of the chunk's rows and these columns, as `use(row, column, 32 numbers)`.
  //
  // AMX multiplies beside the vector units, so between its instructions stands what becomes of the block before, and the
  // weights of the next columns are fetched.
  template <typename Use>
  void product(const Chunk& chunk, const Product& of, Range columns, const Use& use) const {
    if (columns.begin == columns.end) return;
    alignas(64) float sums[2][kBlock * kRows * kColumns];
    int turn = 0;
    // of the block before: its columns, and its rows from `row` up to `end`, whose sums lie at `from`
    int column = columns.begin, row = 0, end = 0;
    const int64_t expert = int64_t{chunk.expert} * of.outputs;
    Outputs outputs(of, expert + column);
    const float* from = nullptr;
    const auto use_rows = [&](int most) {
      for (const int last = std::min(row + most, end); row < last; ++row, from += kColumns) {
        Floats z[kBlock];
        for (int j = 0; j < kBlock; ++j) z[j] = outputs.at(j, from, of.quantised + row);
        use(row, column, z);
      }
    };
    const int64_t panel = int64_t{of.steps} * kBlock * kTileBytes;
    const int64_t steps = ceil_div(chunk.count, layer.amx ? kBlock * kRows : kTogether) * of.steps;
    const char *ahead = of.weights, *ahead_end = ahead;
    const int rows_in_step = static_cast<int>(ceil_div(kBlock * kRows, of.steps));
    const int64_t ahead_in_step = round_up(ceil_div(panel, steps), kRowBytes);
    const auto fetch = [&] {
      const char* last = ahead + std::min<int64_t>(ahead_in_step, ahead_end - ahead);
      for (; ahead < last; ahead += kRowBytes) __builtin_prefetch(ahead, 0, 2);
    };
    const auto between = [&] {
      fetch();
      use_rows(rows_in_step);
    };
    if (layer.amx) configure();
    for (int n = columns.begin; n < columns.end; n += kColumns) {
      const char* b = of.weights + (expert + n) * of.steps * kRowBytes;
      if (n + kColumns < columns.end) {
        ahead = b + panel;
        ahead_end = ahead + panel;
      }
      for (int tile = 0; tile < chunk.tiles; tile += kBlock, turn = 1 - turn) {
        const bool two = tile + 1 < chunk.tiles;
        const char* rows = of.inputs + int64_t{tile} * of.steps * kTileBytes;
        if (!layer.amx) {
          constexpr Numbers kNumbers = kInt8 ? Numbers::kInt8 : Numbers::kBfloat16;
          const int count = std::min(kBlock * kRows, chunk.count - tile * kRows);
          multiply_avx512<kNumbers>(rows, b, of.steps, count, sums[turn], fetch);
        } else if (two) {
          multiply_amx<kInt8, 2>(rows, b, of.steps, sums[turn], between);
        } else {
          multiply_amx<kInt8, 1>(rows, b, of.steps, sums[turn], between);
        }
        use_rows(kBlock * kRows);  // of AVX-512 all, of AMX none
        if (tile == 0) outputs = Outputs(of, expert + n);
        from = sums[turn];
        column = n;
        row = tile * kRows;
        end = std::min(row + kBlock * kRows, chunk.count);
      }
    }
    use_rows(kBlock * kRows);
    if (layer.amx) _tile_release();
  }

  void put(const Chunk& chunk, int row, int column, Floats h) const {
    if (kInt8) {
      _mm512_storeu_ps(chunk.hidden + int64_t{row} * sizes.width + column, h);
    } else {
      char* to = row_of(chunk.activations, sizes.steps2, row) + column / 32 * kTileBytes + column % 32 * 2;
      store<false>(to, 0, kRows, h);
    }
  }

  const Layer& layer;
  const Call& call;
  const Sizes& sizes;
};

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
