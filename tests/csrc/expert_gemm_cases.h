// Problems for the expert GEMM, and what must come out: loops that anybody can read.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "emulation.h"
#include "expert_gemm.h"
#include "random_experts.h"
#include "testing.h"

namespace cases {

using mbk::Activation;
using mbk::DType;

// What the kernel is for.
constexpr Activation kActivations[] = {Activation::kGelu, Activation::kGeluTanh, Activation::kRelu, Activation::kSilu,
                                       Activation::kIdentity};

struct Case {
  int tokens, top_k, experts, columns, depth;
  Activation activation;
  bool gather, scatter, has_bias, has_weights, has_pre;
  int block_n, cluster;

  std::string text() const {
    return "T=" + std::to_string(tokens) + " top_k=" + std::to_string(top_k) + " E=" + std::to_string(experts) +
           " N=" + std::to_string(columns) + " K=" + std::to_string(depth) +
           " activation=" + std::to_string(static_cast<int>(activation)) + (gather ? " gather" : "") +
           (scatter ? " scatter" : "") + " tile " + std::to_string(block_n) + " cluster " + std::to_string(cluster) +
           " seed " + std::to_string(emulation::options().seed);
  }
};

inline Case draw_case(int block_n, int cluster) {
  Case c{};
  c.tokens = draw(1, draw(0, 3) == 0 ? 700 : 200);
  c.top_k = draw(0, 2) == 0 ? 2 : 1;
  c.experts = draw(1, 5);
  c.columns = 8 * draw(1, 50);
  c.depth = 8 * draw(1, draw(0, 2) == 0 ? 80 : 30);
  c.activation = kActivations[draw(0, 4)];
  c.gather = draw(0, 1) == 1;
  c.scatter = draw(0, 1) == 1;
  c.has_bias = draw(0, 1) == 1;
  c.has_weights = draw(0, 1) == 1;
  c.has_pre = draw(0, 1) == 1;
  c.block_n = block_n;
  c.cluster = cluster;
  emulation::options().seed = random_numbers();
  emulation::options().resident_blocks = static_cast<unsigned>(draw(1, 6));
  return c;
}

inline double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5 * x * (1.0 + std::erf(x * std::sqrt(0.5)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kRelu:
      return std::max(x, 0.0);
    default:
      return x;
  }
}

template <typename T>
class Problem {
 public:
  explicit Problem(const Case& c)
      : c_(c),
        rows_(c.tokens * c.top_k),
        a_(size(c.gather ? c.tokens : rows_, c.depth)),
        w_(size(c.experts, c.columns) * static_cast<size_t>(c.depth)),
        bias_(size(c.experts, c.columns)),
        weights_(size(rows_, 1)),
        y_(size(rows_, c.columns)),
        pre_(size(rows_, c.columns)),
        offsets_(static_cast<size_t>(c.experts) + 1),
        row_to_assignment_(static_cast<size_t>(rows_)) {
    for (auto* array : {&a_, &w_, &bias_, &weights_}) fill(*array);
    deal(c.experts, row_to_assignment_, offsets_);
  }

  mbk::ExpertGemmParams params() {
    mbk::ExpertGemmParams params{};
    params.a = a_.data();
    params.a_row_stride = params.w_row_stride = c_.depth;
    params.w = w_.data();
    params.w_expert_stride = int64_t{c_.columns} * c_.depth;
    params.y = y_.data();
    params.pre = c_.has_pre ? pre_.data() : nullptr;
    params.bias = c_.has_bias ? bias_.data() : nullptr;
    params.weights = c_.has_weights ? weights_.data() : nullptr;
    params.offsets = offsets_.data();
    params.row_to_assignment = row_to_assignment_.data();
    params.rows = rows_;
    params.num_experts = c_.experts;
    params.columns = c_.columns;
    params.depth = c_.depth;
    params.top_k = c_.top_k;
    params.dtype = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
    params.activation = c_.activation;
    params.gather = c_.gather;
    params.scatter = c_.scatter;
    params.block_n = c_.block_n;
    params.cluster = c_.cluster;
    return params;
  }

  // What stands at the operand `a` of a launch from now on.
  void take_rows(const T* rows) { std::copy(rows, rows + a_.size(), a_.begin()); }

  void check() {
    const double epsilon = std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7;
    std::vector<float> row_of_a(static_cast<size_t>(c_.depth)), w(w_.size());
    for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(w_[i]);
    int expert = 0;
    for (int row = 0; row < rows_; ++row) {
      while (expert < c_.experts && row >= offsets_[at(expert + 1)]) ++expert;
      const int assignment = row_to_assignment_[at(row)], source = c_.gather ? assignment / c_.top_k : row;
      const size_t to = size(c_.scatter ? assignment : row, c_.columns);
      for (int k = 0; k < c_.depth; ++k) row_of_a[at(k)] = static_cast<float>(a_[size(source, c_.depth) + at(k)]);
      for (int n = 0; n < c_.columns; ++n) {
        float sum = 0.0f;
        double exact = 0.0;
        if (expert < c_.experts) {
          const float* row_of_w = &w[(size(expert, c_.columns) + at(n)) * at(c_.depth)];
          for (int k = 0; k < c_.depth; ++k) sum += row_of_a[at(k)] * row_of_w[k];
          if (c_.has_bias) sum += static_cast<float>(bias_[size(expert, c_.columns) + at(n)]);
          exact = activate(c_.activation, sum);
          if (c_.has_weights) exact *= static_cast<float>(weights_[at(assignment)]);
        }
        const auto got = static_cast<float>(y_[to + at(n)]);
        CHECK(std::fabs(got - exact) <= 0.51 * epsilon * std::fabs(exact) + 2e-6, "row %d column %d: %g, not %g; %s",
              row, n, static_cast<double>(got), exact, c_.text().c_str());
        if (!c_.has_pre) continue;
        CHECK(pre_[to + at(n)].bits == rounded<T>(sum).bits, "before the activation, row %d column %d: %g, not %g; %s",
              row, n, static_cast<double>(static_cast<float>(pre_[to + at(n)])), static_cast<double>(sum),
              c_.text().c_str());
      }
    }
  }

 private:

  Case c_;
  int rows_;
  Guarded<T> a_, w_, bias_, weights_, y_, pre_;
  Guarded<int> offsets_, row_to_assignment_;
};

}  // namespace cases
