// softmax(scale q k' + bias) v of every head of every sequence, for x86-64 CPUs with AMX or AVX-512.
//
// A thread takes a head: its keys and values become the tiles that products read (see `experts.cpp`), and then 32
// queries at once meet all keys, so that their scores stay in the cache and softmax needs no second visit. Scores, their
// maximum and the sums are in float32; the weights are rounded to the dtype of q, k and v, as torch has it.

#include <algorithm>
#include <cstdint>
#include <limits>

#include "chunks.h"
#include "threads.h"

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

namespace mbk {
namespace {

constexpr int kQueries = kBlock * kRows;  // at once

// 16 rows of 16 numbers of 4 bytes, the other way round.
inline void transpose(__m512i* rows) {
  __m512i pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  }
  // quads[4 i + j] has in lane l the numbers of rows 4 i .. 4 i + 3 in column 4 l + j
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x44);
    const __m512i high = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xee);
    const __m512i low2 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x44);
    const __m512i high2 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xee);
    rows[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    rows[8 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
    rows[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
}

template <bool kFloat32>
class Head {
 public:
  explicit Head(const Attention& of)
      : of(of),
        steps(static_cast<int>(ceil_div(of.size, kStep))),
        width(static_cast<int>(round_up(of.size, kColumns))),
        keys(static_cast<int>(round_up(of.keys, kColumns))),
        key_steps(keys / kStep) {}

  void run(int sequence, int head) {
    keys_tiles = scratch(bytes());
    values_tiles = keys_tiles + int64_t{keys} * steps * kRowBytes;
    queries = values_tiles + int64_t{width} * key_steps * kRowBytes;
    weights = queries + int64_t{kQueries} * steps * kRowBytes;
    scores = reinterpret_cast<float*>(weights + int64_t{kQueries} * key_steps * kRowBytes);
    pack_keys(at(of.k, of.k_strides, sequence, head));
    pack_values(at(of.v, of.v_strides, sequence, head));
    const char* q = at(of.q, of.q_strides, sequence, head);
    const uint8_t* mask = of.mask + sequence * of.mask_strides[0] + head * of.mask_strides[1];
    const int64_t bias = sequence * of.bias_strides[0] + head * of.bias_strides[1];
    for (int first_query = 0; first_query < of.queries; first_query += kQueries) {
      const int count = std::min(kQueries, of.queries - first_query);
      const int64_t y = ((int64_t{sequence} * of.queries + first_query) * of.heads + head) * of.size;
      attend(q + first_query * of.q_strides[2] * kBytes, count, y, [&](int row) {
        const int64_t query = first_query + row;
        return soften(row, mask + query * of.mask_strides[2], bias + query * of.bias_strides[2]);
      });
    }
  }

 private:
  static constexpr int kBytes = kFloat32 ? 4 : 2;
  static constexpr int kStep = kRowBytes / kBytes;  // numbers of a tile's row
  static constexpr Numbers kNumbers = kFloat32 ? Numbers::kFloat32 : Numbers::kBfloat16;

  int64_t bytes() const {
    return int64_t{keys + kQueries} * steps * kRowBytes + int64_t{width + kQueries} * key_steps * kRowBytes +
           int64_t{kQueries} * keys * sizeof(float);
  }

  static const char* at(const void* data, const int64_t* strides, int sequence, int head) {
    return static_cast<const char*>(data) + (sequence * strides[0] + head * strides[1]) * kBytes;
  }

  // 64 bytes of a row from number `start` on; zeros behind `size`, and where there is no row.
  __m512i row_part(const char* row, int start, bool there) const {
    // the next head's, which mostly lie there: rows are too far apart for the CPU to foresee
    __builtin_prefetch(row + int64_t{start + of.size} * kBytes, 0, 2);
    const int left = there ? std::min(of.size - start, kStep) : 0;
    if (kFloat32) return _mm512_maskz_loadu_epi32(first(left), row + int64_t{start} * 4);
    const __mmask32 mask = left >= 32 ? ~__mmask32{0} : left <= 0 ? 0 : (__mmask32{1} << left) - 1;
    return _mm512_maskz_loadu_epi16(mask, row + int64_t{start} * 2);
  }

  // As weights of a product with 16 outputs for each tile: its keys.
  void pack_keys(const char* k) const {
    const int64_t stride = of.k_strides[2] * kBytes;
    for (int key = 0; key < keys; key += kRows) {
      char* to = keys_tiles + int64_t{key} * steps * kRowBytes;
      for (int step = 0; step < steps; ++step, to += kTileBytes) {
        __m512i rows[16];
        for (int i = 0; i < 16; ++i) rows[i] = row_part(k + (key + i) * stride, step * kStep, key + i < of.keys);
        transpose(rows);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kRowBytes, rows[i]);
      }
    }
  }

  // As weights of a product with 16 outputs for each tile: numbers of the values; of bfloat16 two keys in turns.
  void pack_values(const char* v) const {
    const int64_t stride = of.v_strides[2] * kBytes;
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int key = 0; key < keys; key += kStep / kRows) {
      for (int n = 0; n < of.size; n += kStep) {
        char* to = values_tiles + (int64_t{n} / kRows * key_steps + key / kStep) * kTileBytes +
                   key % kStep / (kStep / kRows) * kRowBytes;
        const __m512i row = row_part(v + key * stride, n, key < of.keys);
        if (kFloat32) {
          _mm512_store_si512(to, row);
          continue;
        }
        const __m512i after = row_part(v + (key + 1) * stride, n, key + 1 < of.keys);
        const __m512i left = _mm512_inserti64x4(row, _mm512_castsi512_si256(after), 1);
        const __m512i right = _mm512_shuffle_i64x2(row, after, 0xee);
        _mm512_store_si512(to, _mm512_permutexvar_epi16(turns, left));
        _mm512_store_si512(to + int64_t{key_steps} * kTileBytes, _mm512_permutexvar_epi16(turns, right));
      }
    }
  }

  void multiply(const char* a, const char* b, int of_steps, int count, float* c) const {
    const auto nothing = [] {};
    if (kFloat32 || !of.amx) {
      multiply_avx512<kNumbers>(a, b, of_steps, count, c, nothing);
    } else if (count > kRows) {
      multiply_amx<false, 2>(a, b, of_steps, c, nothing);
    } else {
      multiply_amx<false, 1>(a, b, of_steps, c, nothing);
    }
  }

  static char* row_of(char* tiles, int of_steps, int row) {
    return tiles + int64_t{row / kRows} * of_steps * kTileBytes + row % kRows * kRowBytes;
  }

  // `count` queries, whose outputs begin at number `y`; `soften_row` is what `soften` does with a row.
  template <typename Soften>
  void attend(const char* q, int count, int64_t y, const Soften& soften_row) const {
    for (int r = 0; r < round_up(count, kRows); ++r) {
      char* to = row_of(queries, steps, r);
      for (int k = 0; k < steps; ++k) {
        _mm512_store_si512(to + k * kTileBytes, row_part(q + r * of.q_strides[2] * kBytes, k * kStep, r < count));
      }
    }
    for (int n = 0; n < keys; n += kColumns) {
      multiply(queries, keys_tiles + int64_t{n} * steps * kRowBytes, steps, count, scores + n * kQueries);
    }
    float inverse[kQueries];
    for (int r = 0; r < count; ++r) inverse[r] = soften_row(r);
    alignas(64) float sums[kQueries * kColumns];
    for (int n = 0; n < width; n += kColumns) {
      multiply(weights, values_tiles + int64_t{n} * key_steps * kRowBytes, key_steps, count, sums);
      for (int r = 0; r < count; ++r) {
        const int64_t to = y + int64_t{r} * of.heads * of.size + n;
        for (int j = 0; j < kColumns && n + j < of.size; j += 16) {
          store<kFloat32>(of.y, to + j, of.size - n - j, _mm512_load_ps(sums + r * kColumns + j) * all(inverse[r]));
        }
      }
    }
  }

  // The row's scores become weights, which are to be multiplied by what is returned. A row that no key counts for is 0.
  // Its mask, and the number at which its bias begins, count where the call has them.
  float soften(int row, const uint8_t* mask, int64_t bias) const {
    const auto place = [&](int n) { return scores + n / kColumns * kQueries * kColumns + row * kColumns + n % kColumns; };
    const Floats scale = all(of.scale), none = all(-std::numeric_limits<float>::infinity());
    Floats highest = none, sum = _mm512_setzero_ps();
    bool any = false;
    for (int n = 0; n < keys; n += 16) {
      __mmask16 counted = first(of.keys - n);
      if (of.mask != nullptr) {
        const __m128i bytes = _mm_maskz_loadu_epi8(counted, mask + n);
        counted = _mm_test_epi8_mask(bytes, bytes);
      }
      Floats score = _mm512_load_ps(place(n)) * scale;
      if (of.bias != nullptr) score = score + load<kFloat32>(of.bias, bias + n, of.keys - n);
      score = _mm512_mask_mov_ps(none, counted, score);
      _mm512_store_ps(place(n), score);
      highest = _mm512_max_ps(highest, score);
      any |= _mm512_cmp_ps_mask(score, none, _CMP_NEQ_UQ) != 0;  // NaN too, which the maximum may forget
    }
    const Floats most = all(any ? _mm512_reduce_max_ps(highest) : 0.0f);
    char* to = row_of(weights, key_steps, row);
    for (int n = 0; n < keys; n += 16) {
      const Floats score = _mm512_load_ps(place(n));
      // exp2 is of at least 2^-150
      const __mmask16 counted = _mm512_cmp_ps_mask(score, none, _CMP_NEQ_UQ);
      const Floats weight = _mm512_maskz_mov_ps(counted, exp2((score - most) * all(1.4426950408889634f)));
      sum = sum + weight;
      store<kFloat32>(to + n / kStep * kTileBytes, n % kStep, 16, weight);
    }
    return any ? 1.0f / _mm512_reduce_add_ps(sum) : 0.0f;
  }

  const Attention& of;
  const int steps, width, keys, key_steps;  // tiles along a head's numbers; those and the keys up to whole blocks
  char *keys_tiles, *values_tiles, *queries, *weights;
  float* scores;  // blocks of 32 queries and 32 keys
};

template <bool kFloat32>
void run(const Attention& of) {
  parallel(of.threads, of.sequences * of.heads, [&](int i) {
    if (of.amx) configure();
    Head<kFloat32>(of).run(i / of.heads, i % of.heads);
    if (of.amx) _tile_release();
  });
}

}  // namespace
}  // namespace mbk

extern "C" __attribute__((visibility("default"))) void mbk_attention(const Attention* of) {
  (of->is_float32 ? mbk::run<true> : mbk::run<false>)(*of);
}
