// The expert GEMM with a LayerNorm in emulation, as its op calls it: every tile and cluster, both types, rows that end
// in the middle of a cluster, and a launch that starts while the one that it reads from runs.
#include <algorithm>
#include <cmath>
#include <vector>

#include "expert_gemm_norm.cu"
#include "random_experts.h"
#include "testing.h"

namespace {

using cases::at, cases::deal, cases::draw, cases::fill, cases::random_numbers, cases::rounded, cases::size;

struct Case {
  int tokens, experts, columns, depth, block_n, cluster;
  bool x_by_row, has_bias, has_weights;
  float eps;

  std::string text() const {
    return "T=" + std::to_string(tokens) + " E=" + std::to_string(experts) + " N=" + std::to_string(columns) +
           " K=" + std::to_string(depth) + " tile " + std::to_string(block_n) + " cluster " + std::to_string(cluster) +
           (x_by_row ? " x by row" : "") + " seed " + std::to_string(emulation::options().seed);
  }
};

Case draw_case(int block_n, int cluster) {
  Case c{};
  c.tokens = draw(1, draw(0, 2) == 0 ? 900 : 200);
  c.experts = draw(1, 4);
  c.columns = draw(0, 1) == 0 ? block_n * cluster : 32 * draw(1, block_n * cluster / 32);
  c.depth = 8 * draw(1, draw(0, 2) == 0 ? 60 : 8);  // mostly a step or two: the CTAs can get apart
  c.block_n = block_n;
  c.cluster = cluster;
  c.x_by_row = draw(0, 1) == 1;
  c.has_bias = draw(0, 2) > 0;
  c.has_weights = draw(0, 1) == 1;
  c.eps = draw(0, 1) == 0 ? 1e-5f : 0.5f;
  emulation::options().seed = random_numbers();
  emulation::options().resident_blocks = static_cast<unsigned>(draw(1, 4));
  return c;
}

template <typename T>
class Problem {
 public:
  explicit Problem(const Case& c)
      : c_(c),
        x_stride_(c.columns + 8 * draw(0, 1)),
        a_(size(c.tokens, c.depth)),
        w_(size(c.experts * c.columns, c.depth)),
        bias_(size(c.experts, c.columns)),
        x_(size(c.tokens - 1, x_stride_) + at(c.columns)),
        norm_weight_(size(c.experts, c.columns)),
        norm_bias_(size(c.experts, c.columns)),
        weights_(at(c.tokens)),
        y_(size(c.tokens, c.columns)),
        offsets_(at(c.experts + 1)),
        row_to_token_(at(c.tokens)) {
    for (auto* array : {&a_, &w_, &bias_, &x_, &norm_weight_, &norm_bias_, &weights_}) fill(*array);
    for (int row = 0; row < c.tokens; ++row) {  // a mean that is large beside the deviation
      if (draw(0, 7) != 0) continue;
      for (int n = 0; n < c.columns; ++n) {
        x_[size(row, x_stride_) + at(n)] = rounded<T>(4096.0f + 32.0f * static_cast<float>(draw(0, 3)));
      }
    }
    deal(c.experts, row_to_token_, offsets_);
  }

  mbk::ExpertGemmParams gemm() {
    mbk::ExpertGemmParams params{};
    params.a = a_.data();
    params.a_row_stride = params.w_row_stride = c_.depth;
    params.w = w_.data();
    params.w_expert_stride = int64_t{c_.columns} * c_.depth;
    params.y = y_.data();
    params.bias = c_.has_bias ? bias_.data() : nullptr;
    params.weights = c_.has_weights ? weights_.data() : nullptr;
    params.offsets = offsets_.data();
    params.row_to_assignment = row_to_token_.data();
    params.rows = c_.tokens;
    params.num_experts = c_.experts;
    params.columns = c_.columns;
    params.depth = c_.depth;
    params.top_k = 1;
    params.dtype = std::is_same_v<T, __half> ? mbk::DType::kFloat16 : mbk::DType::kBFloat16;
    params.activation = mbk::Activation::kIdentity;
    params.block_n = c_.block_n;
    params.cluster = c_.cluster;
    return params;
  }

  mbk::ExpertGemmNorm norm() {
    return {x_.data(), x_stride_, norm_weight_.data(), norm_bias_.data(), c_.eps, c_.x_by_row};
  }

  T* y() { return y_.data(); }

  // What stands at the operand `a` of a launch from now on.
  void take_rows(const T* rows) { std::copy(rows, rows + a_.size(), a_.begin()); }

  void check() {
    const double epsilon = std::is_same_v<T, __half> ? 0x1p-10 : 0x1p-7;
    std::vector<float> w(w_.size());
    std::vector<double> z(at(c_.columns));
    for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(w_[i]);
    int expert = 0;
    for (int row = 0; row < c_.tokens; ++row) {
      while (expert < c_.experts && row >= offsets_[at(expert + 1)]) ++expert;
      const int token = row_to_token_[at(row)];
      const T* x = &x_[size(c_.x_by_row ? row : token, x_stride_)];
      const T* y = &y_[size(token, c_.columns)];
      if (expert == c_.experts) {
        for (int n = 0; n < c_.columns; ++n) {
          CHECK(y[n].bits == x[n].bits, "a row without an expert: %d; %s", row, c_.text().c_str());
        }
        continue;
      }
      std::vector<float> a(at(c_.depth));
      for (int k = 0; k < c_.depth; ++k) a[at(k)] = static_cast<float>(a_[size(row, c_.depth) + at(k)]);
      double mean = 0.0, variance = 0.0;
      for (int n = 0; n < c_.columns; ++n) {
        const float* row_of_w = &w[size(expert * c_.columns + n, c_.depth)];
        float sum = 0.0f;
        for (int k = 0; k < c_.depth; ++k) sum += a[at(k)] * row_of_w[k];
        if (c_.has_bias) sum += static_cast<float>(bias_[size(expert, c_.columns) + at(n)]);
        z[at(n)] = double{sum} + static_cast<float>(x[n]);
        mean += z[at(n)] / c_.columns;
      }
      for (double value : z) variance += (value - mean) * (value - mean) / c_.columns;
      for (int n = 0; n < c_.columns; ++n) {
        const size_t i = size(expert, c_.columns) + at(n);
        const double normed = (z[at(n)] - mean) / std::sqrt(variance + double{c_.eps});
        const double p = c_.has_weights ? static_cast<float>(weights_[at(token)]) : 1.0f;
        const double exact = p * (normed * static_cast<float>(norm_weight_[i]) + static_cast<float>(norm_bias_[i]));
        const auto got = static_cast<double>(static_cast<float>(y[n]));
        CHECK(std::fabs(got - exact) <= 0.51 * epsilon * std::fabs(exact) + 2e-4, "row %d column %d: %g, not %g; %s",
              row, n, got, exact, c_.text().c_str());
      }
    }
  }

 private:
  Case c_;
  int x_stride_;
  Guarded<T> a_, w_, bias_, x_, norm_weight_, norm_bias_, weights_, y_;
  Guarded<int> offsets_, row_to_token_;
};

void launch(const mbk::ExpertGemmParams& gemm, const mbk::ExpertGemmNorm& norm, const Case& c) {
  const cudaError_t status = mbk::expert_gemm_norm(gemm, norm);
  CHECK(status == cudaSuccess, "status %d; %s", status, c.text().c_str());
}

template <typename T>
void check(const Case& c) {
  Problem<T> problem(c);
  launch(problem.gemm(), problem.norm(), c);
  cudaDeviceSynchronize();
  problem.check();
}

// The second launch reads what the first one writes, by token, as its rows, and may start beside it.
template <typename T>
void check_two(const Case& c) {
  Case second = c;
  second.depth = c.columns;
  Problem<T> before(c), after(second);
  launch(before.gemm(), before.norm(), c);
  auto gemm = after.gemm();
  gemm.a = before.y();
  gemm.after_previous = true;
  launch(gemm, after.norm(), second);
  cudaDeviceSynchronize();
  after.take_rows(before.y());
  after.check();
}

void test_refusals() {
  Problem<__half> problem(draw_case(128, 2));
  const auto refused = [&](auto change) {
    auto gemm = problem.gemm();
    auto norm = problem.norm();
    change(gemm, norm);
    return mbk::expert_gemm_norm(gemm, norm) == cudaErrorInvalidValue;
  };
  CHECK(refused([](auto& gemm, auto&) { gemm.columns = 24; }), "columns");
  CHECK(refused([](auto& gemm, auto&) { gemm.columns = 288; }), "more columns than the cluster has");
  CHECK(refused([](auto& gemm, auto&) { gemm.block_n = gemm.cluster = 0, gemm.columns = 1056; }), "too many columns");
  CHECK(refused([](auto& gemm, auto&) { gemm.cluster = 3; }), "a cluster that does not divide the rows");
  CHECK(refused([](auto& gemm, auto&) { gemm.block_n = 192, gemm.cluster = 8; }), "parts without room");
  CHECK(refused([](auto& gemm, auto&) { gemm.block_n = 256; }), "a tile that is not compiled");
  CHECK(refused([](auto& gemm, auto&) { gemm.activation = mbk::Activation::kGelu; }), "an activation");
  CHECK(refused([](auto& gemm, auto&) { gemm.pre = gemm.y; }), "what is not saved");
  CHECK(refused([](auto& gemm, auto&) { gemm.gather = true; }), "rows by token");
  CHECK(refused([](auto& gemm, auto&) { gemm.top_k = 2; }), "two experts for a token");
  CHECK(refused([](auto& gemm, auto&) { gemm.dtype = mbk::DType::kFloat32; }), "float32");
  CHECK(refused([](auto&, auto& norm) { norm.x_row_stride += 4; }), "a stride");
  CHECK(refused([](auto&, auto& norm) { norm.weight = nullptr; }), "no weight");
  auto none = problem.gemm();
  none.rows = 0;
  CHECK(mbk::expert_gemm_norm(none, problem.norm()) == cudaSuccess, "no rows");
}

}  // namespace

int main(int arguments, char** values) {
  const int rounds = arguments > 1 ? std::atoi(values[1]) : 3;
  test_refusals();
  int count = 0;
  for (int round = 0; round < rounds; ++round) {
    for (int cluster : {1, 2, 4, 8}) {
      for (int block_n : {128, 192}) {
        if (block_n * cluster > 1024) continue;
        Case c = draw_case(block_n, cluster);
        check<__nv_bfloat16>(c);
        c = draw_case(block_n, cluster);
        if (draw(0, 1) == 0) c.block_n = c.cluster = 0;
        check<__half>(c);
        if (cluster <= 4) check_two<__nv_bfloat16>(draw_case(block_n, cluster));
        count += 2 + (cluster <= 4);
      }
    }
  }
  std::printf("%d problems\n", count);
}
