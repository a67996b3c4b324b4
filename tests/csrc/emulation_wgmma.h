// wgmma: products of what the async proxy sees of shared memory, computed when they are issued or as late as when they
// are waited for, warp by warp.
#pragma once

#include "emulation_hopper.h"

namespace mbk {
namespace hopper {

template <class Element>
float float_of(uint16_t bits) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) return __bfloat162float({bits});
  static const std::vector<float> all = [] {
    std::vector<float> values(65536);
    for (unsigned i = 0; i < 65536; ++i) values[i] = __half2float({static_cast<uint16_t>(i)});
    return values;
  }();
  return all[bits];
}

template <class Element, int kM, int kN, int kK, int kStages, int kGroups>
struct Product {
  static_assert(kM == 128 && kK == 64 && (kGroups == 1 || kGroups == 2), "rows of 128 bytes");

  struct Mma {
    bool add = false;
  };

  struct Started {
    int stage;
    bool add;
    size_t rows, weights;  // where the stages begin
  };

  struct Accumulators {
    float value[2 / kGroups][kN / 8][2][2];  // m, j, v, c
    std::vector<Started> started;
  };

  static size_t rows(Element* data, int thread) {
    return emulation::offset_in_shared(data) + static_cast<size_t>(thread / 128) * 64 * 128;
  }
  static size_t weights(Element* data, int) { return emulation::offset_in_shared(data); }
  static Accumulators accumulators() { return {}; }
  static Mma begin() { return {}; }

  static void start(Mma& mma, size_t rows, size_t weights, Accumulators& acc, int stage) {
    acc.started.push_back({stage, mma.add, rows, weights});
    mma.add = true;
    if (emulation::Machine::instance().draw(2) == 1) finish(acc, 0);
  }

  template <int kPending>
  static void wait(Accumulators& acc) {
    finish(acc, kPending);
    emulation::meet(0xffffffffu, 0);  // a warp waits together
  }

  static float& at(Accumulators& acc, int j, int v, int m, int c) { return acc.value[m][j][v][c]; }

 private:
  typedef float Floats __attribute__((vector_size(32)));

  static void load_row(size_t stages, int stage, int rows_of_stage, int row, Floats (&to)[kK / 8]) {
    const auto& view = emulation::hopper(emulation::Machine::instance().block()).async_view;
    for (int piece = 0; piece < kK / 8; ++piece) {
      const size_t offset = static_cast<size_t>(stage * rows_of_stage + row) * 128 + static_cast<size_t>(piece) * 16;
      const size_t from = emulation::swizzled(stages + offset) / 2;
      for (size_t i = 0; i < 8; ++i) to[piece][static_cast<int>(i)] = float_of<Element>(view[from + i]);
    }
  }

  static void finish(Accumulators& acc, size_t pending) {
    while (acc.started.size() > pending) {
      multiply(acc, acc.started.front());
      acc.started.erase(acc.started.begin());
    }
  }

  static void multiply(Accumulators& acc, const Started& product) {
    const int lane = emulation::lane(), warp = static_cast<int>(threadIdx.x) % 128 / 32;
    Floats left[2 / kGroups][2][kK / 8], right[kK / 8];
    for (int m = 0; m < 2 / kGroups; ++m) {
      for (int v = 0; v < 2; ++v) {
        load_row(product.rows, product.stage, kM, 64 * m + 16 * warp + lane / 4 + 8 * v, left[m][v]);
      }
    }
    for (int j = 0; j < kN / 8; ++j) {
      for (int c = 0; c < 2; ++c) {
        load_row(product.weights, product.stage, kN, 8 * j + 2 * (lane % 4) + c, right);
        for (int m = 0; m < 2 / kGroups; ++m) {
          for (int v = 0; v < 2; ++v) {
            Floats sums = {};
            for (int piece = 0; piece < kK / 8; ++piece) sums += left[m][v][piece] * right[piece];
            float sum = product.add ? acc.value[m][j][v][c] : 0.0f;
            for (int i = 0; i < 8; ++i) sum += sums[i];
            acc.value[m][j][v][c] = sum;
          }
        }
      }
    }
  }
};

}  // namespace hopper
}  // namespace mbk
