// The residual-and-LayerNorm pass of csrc/ in emulation, forward and backward, against loops in double precision.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulation.h"
#include "fused_moe_ffn_add_norm.cu"
#include "testing.h"

namespace {

using mbk::DType;

std::mt19937_64 random_numbers(77);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_numbers); }

double epsilon_of(DType type) {
  const double values[] = {std::ldexp(1.0, -23), std::ldexp(1.0, -10), std::ldexp(1.0, -7)};
  return values[static_cast<int>(type)];
}

// A matrix of a type, as wide as asked and laid out with gaps or transposed if asked.
class Array {
 public:
  enum class Layout { kContiguous, kGaps, kTransposed };

  Array(DType type, int64_t rows, int64_t columns, Layout layout = Layout::kContiguous) : type_(type) {
    view_ = {nullptr, columns, 1};
    int64_t size = rows * columns;
    if (layout == Layout::kGaps) {
      view_ = {nullptr, 2 * columns + 1, 2};
      size = rows * view_.stride_row;
    } else if (layout == Layout::kTransposed) {
      view_ = {nullptr, 1, rows};
    }
    bytes_ = std::make_unique<Guarded<unsigned char>>(static_cast<size_t>(size * mbk::size_of(type)));
    view_.data = bytes_->data();
  }

  void fill(double spread, double centre = 0.0) {
    std::normal_distribution<float> normal(static_cast<float>(centre), static_cast<float>(spread));
    const int64_t size = static_cast<int64_t>(bytes_->size()) / mbk::size_of(type_);
    for (int64_t i = 0; i < size; ++i) mbk::store_float(bytes_->data(), i, type_, normal(random_numbers));
  }

  double get(int64_t row, int64_t column) const {
    return mbk::load_float(view_.data, row * view_.stride_row + column * view_.stride_column, type_);
  }

  void* data() { return bytes_->data(); }
  const mbk::Matrix& view() const { return view_; }
  DType type() const { return type_; }

 private:
  DType type_;
  mbk::Matrix view_;
  std::unique_ptr<Guarded<unsigned char>> bytes_;
};

struct Case {
  int64_t tokens, columns;
  int num_experts;
  DType x_type, ffn_type;
  Array::Layout layout;
  bool dropout, weighted, want_dffn, want_dweights;
  double skipped;  // share of tokens without an expert
  float eps;

  std::string text() const {
    return "T=" + std::to_string(tokens) + " H=" + std::to_string(columns) + " E=" + std::to_string(num_experts) +
           " types " + std::to_string(static_cast<int>(x_type)) + "," + std::to_string(static_cast<int>(ffn_type)) +
           " layout " + std::to_string(static_cast<int>(layout)) + (dropout ? " dropout" : "") +
           (weighted ? " weighted" : "") + " seed " + std::to_string(emulation::options().seed);
  }
};

void check_close(const char* name, double wanted, double got, double size, double epsilon, const Case& c) {
  CHECK(std::fabs(wanted - got) <= epsilon * size, "%s: expected %.9g, got %.9g, allowed %.2g; %s", name, wanted, got,
        epsilon * size, c.text().c_str());
}

// Philox as moebert_kernels/dropout.py writes it down.
bool keeps(int64_t seed, int64_t row, int64_t column, unsigned threshold) {
  uint64_t c[4] = {static_cast<uint64_t>(column / 8), static_cast<uint64_t>(row) & 0xffffffff,
                   static_cast<uint64_t>(row) >> 32, 1};
  uint64_t k[2] = {static_cast<uint64_t>(seed) & 0xffffffff, static_cast<uint64_t>(seed) >> 32};
  for (int i = 0; i < 7; ++i) {
    const uint64_t p0 = c[0] * 0xD2511F53u, p1 = c[2] * 0xCD9E8D57u;
    const uint64_t next[4] = {(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xffffffff, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xffffffff};
    std::copy(next, next + 4, c);
    k[0] = (k[0] + 0x9E3779B9u) & 0xffffffff;
    k[1] = (k[1] + 0xBB67AE85u) & 0xffffffff;
  }
  return ((c[column % 8 / 2] >> (16 * (column % 2))) & 0xffff) >= threshold;
}

void run(const Case& c) {
  const int64_t tokens = c.tokens, columns = c.columns;
  const DType type = c.x_type;
  Array x(type, tokens, columns, c.layout), ffn(c.ffn_type, tokens, columns), dy(type, tokens, columns, c.layout);
  Array norm_weight(type, c.num_experts, columns, c.layout), norm_bias(type, c.num_experts, columns, c.layout);
  Array weights(type, tokens, 1), y(type, tokens, columns), dz(type, tokens, columns);
  Array dffn(c.ffn_type, tokens, columns), dweights(type, tokens, 1);
  Array dnorm_weight(type, c.num_experts, columns), dnorm_bias(type, c.num_experts, columns);
  x.fill(1.0, 0.5);
  ffn.fill(1.0);
  dy.fill(1.0);
  norm_weight.fill(0.5, 1.0);
  norm_bias.fill(0.5);
  weights.fill(0.3, 0.7);

  std::vector<std::vector<int32_t>> tokens_of(static_cast<size_t>(c.num_experts) + 1);
  const bool skewed = draw(0, 2) == 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const bool skip = std::uniform_real_distribution<double>(0, 1)(random_numbers) < c.skipped;
    const int64_t expert = skewed ? draw(0, draw(0, c.num_experts - 1)) : draw(0, c.num_experts - 1);
    tokens_of[static_cast<size_t>(skip ? c.num_experts : expert)].push_back(static_cast<int32_t>(t));
  }
  Guarded<int32_t> offsets(static_cast<size_t>(c.num_experts) + 1), row_to_assignment(static_cast<size_t>(tokens));
  Guarded<int32_t> assignment_to_row(static_cast<size_t>(tokens));
  int32_t row = 0;
  for (size_t e = 0; e < tokens_of.size(); ++e) {
    offsets[e] = row;
    for (int32_t token : tokens_of[e]) {
      row_to_assignment[static_cast<size_t>(row)] = token;
      assignment_to_row[static_cast<size_t>(token)] = row++;
    }
  }

  const int64_t seed = static_cast<int64_t>(random_numbers() >> 1);
  const unsigned threshold = static_cast<unsigned>(draw(1, 40000));
  mbk::AddNormInputs in = {};
  in.x = x.view();
  in.ffn = ffn.data();
  in.norm_weight = norm_weight.view();
  in.norm_bias = norm_bias.view();
  in.weights = c.weighted ? weights.data() : nullptr;
  in.seed = c.dropout ? &seed : nullptr;
  in.offsets = offsets.data();
  in.tokens = tokens;
  in.columns = static_cast<int>(columns);
  in.num_experts = c.num_experts;
  in.eps = c.eps;
  in.threshold = c.dropout ? threshold : 0;
  in.scale = c.dropout ? 65536.0f / static_cast<float>(65536 - threshold) : 1.0f;
  in.x_type = type;
  in.ffn_type = c.ffn_type;
  CHECK(mbk::fused_moe_ffn_add_norm({in, assignment_to_row.data(), y.data(), nullptr}) == cudaSuccess, "%s",
        c.text().c_str());
  cudaDeviceSynchronize();

  const auto partials = static_cast<size_t>(mbk::norm_chunks(tokens, c.num_experts) * columns);
  Guarded<float> weight_partials(partials), bias_partials(partials);
  mbk::FusedMoeFfnAddNormBackwardParams backward = {};
  backward.inputs = in;
  backward.dy = dy.view();
  backward.row_to_assignment = row_to_assignment.data();
  backward.dz = dz.data();
  backward.dffn = c.want_dffn ? dffn.data() : nullptr;
  backward.weight_partials = weight_partials.data();
  backward.bias_partials = bias_partials.data();
  backward.dnorm_weight = dnorm_weight.data();
  backward.dnorm_bias = dnorm_bias.data();
  backward.dweights = c.want_dweights ? dweights.data() : nullptr;
  CHECK(mbk::fused_moe_ffn_add_norm_backward(backward) == cudaSuccess, "%s", c.text().c_str());
  cudaDeviceSynchronize();

  // float32 sums over a row; a type's own rounding of what is stored
  const double rounding = 2e-5;
  const double x_rounding = rounding + epsilon_of(type), f_rounding = rounding + epsilon_of(c.ffn_type);
  std::vector<double> z(static_cast<size_t>(columns)), n(z.size()), dn(z.size());
  for (int e = 0; e <= c.num_experts; ++e) {
    std::vector<double> want_weight(z.size()), want_bias(z.size()), weight_size(z.size(), 1), bias_size(z.size(), 1);
    for (int32_t token : tokens_of[static_cast<size_t>(e)]) {
      const int64_t r = assignment_to_row[static_cast<size_t>(token)];
      if (e == c.num_experts) {
        for (int64_t h = 0; h < columns; ++h) check_close("skipped", x.get(token, h), y.get(token, h), 0, 0, c);
        continue;
      }
      double mean = 0, variance = 0, mean_dn = 0, along = 0, dp = 0;
      std::vector<double> kept(z.size(), 1.0);
      for (size_t h = 0; h < z.size(); ++h) {
        const auto column = static_cast<int64_t>(h);
        if (c.dropout) kept[h] = keeps(seed, token, column, threshold) ? 65536.0 / (65536 - threshold) : 0.0;
        z[h] = x.get(token, column) + kept[h] * ffn.get(r, column);
        mean += z[h] / static_cast<double>(columns);
      }
      for (double value : z) variance += (value - mean) * (value - mean) / static_cast<double>(columns);
      const double rstd = 1 / std::sqrt(variance + static_cast<double>(c.eps));
      const double p = c.weighted ? weights.get(token, 0) : 1.0;
      for (size_t h = 0; h < z.size(); ++h) {
        const auto column = static_cast<int64_t>(h);
        const double weight = norm_weight.get(e, column), bias = norm_bias.get(e, column), d = dy.get(token, column);
        n[h] = (z[h] - mean) * rstd;
        const double normed = n[h] * weight + bias;
        check_close("y", p * normed, y.get(token, column), 1 + std::fabs(p * normed), x_rounding, c);
        dp += d * normed;
        dn[h] = d * p * weight;
        mean_dn += dn[h] / static_cast<double>(columns);
        along += dn[h] * n[h] / static_cast<double>(columns);
        want_weight[h] += d * p * n[h];
        want_bias[h] += d * p;
        weight_size[h] += std::fabs(d * p * n[h]);
        bias_size[h] += std::fabs(d * p);
      }
      for (size_t h = 0; h < z.size(); ++h) {
        const auto column = static_cast<int64_t>(h);
        const double want = (dn[h] - mean_dn - n[h] * along) * rstd;
        const double size = (1 + std::fabs(dn[h])) * std::max(1.0, rstd);
        check_close("dz", want, dz.get(r, column), size, x_rounding, c);
        if (c.want_dffn) check_close("dffn", want * kept[h], dffn.get(r, column), 3 * size, f_rounding, c);
      }
      if (c.want_dweights) {
        check_close("dweights", dp, dweights.get(token, 0), 1 + static_cast<double>(columns), x_rounding, c);
      }
    }
    for (size_t h = 0; e < c.num_experts && h < z.size(); ++h) {
      const auto column = static_cast<int64_t>(h);
      check_close("dnorm_weight", want_weight[h], dnorm_weight.get(e, column), weight_size[h], x_rounding, c);
      check_close("dnorm_bias", want_bias[h], dnorm_bias.get(e, column), bias_size[h], x_rounding, c);
    }
  }
}

Case random_case(int64_t tokens, int64_t columns) {
  emulation::options().seed = random_numbers();
  const auto layout = draw(0, 2) == 0 ? static_cast<Array::Layout>(draw(0, 2)) : Array::Layout::kContiguous;
  return {draw(0, tokens), columns, static_cast<int>(draw(0, 30) == 0 ? draw(1, 80) : draw(1, 5)),
          static_cast<DType>(draw(0, 2)), static_cast<DType>(draw(0, 2)), layout, draw(0, 1) == 1, draw(0, 1) == 1,
          draw(0, 1) == 1, draw(0, 1) == 1, draw(0, 1) == 1 ? 0.3 : 0.0, columns < 8 ? 1.0f : 1e-5f};
}

// Bits that moebert_kernels.dropout.keep_mask gave.
void check_dropout_bits() {
  const int64_t seed = (int64_t{1} << 62) + (int64_t{1} << 40) + 17;
  const int64_t rows[] = {0, 5, (int64_t{1} << 33) + 7};
  const unsigned wanted[] = {0xbeab7f71u, 0xdfd8f3a7u, 0xf2eaf1bbu};
  for (int i = 0; i < 3; ++i) {
    unsigned got = 0;
    for (int block = 0; block < 4; ++block) got |= mbk::keep_bits(seed, rows[i], block, 1, 19661) << (8 * block);
    CHECK(got == wanted[i], "row %lld: expected %x, got %x", static_cast<long long>(rows[i]), wanted[i], got);
  }
}

}  // namespace

int main() {
  check_dropout_bits();
  int cases = 0;
  for (int i = 0; i < 1000; ++i, ++cases) run(random_case(12, draw(1, 5) == 1 ? 8 * draw(1, 12) : draw(1, 90)));
  for (int i = 0; i < 60; ++i, ++cases) run(random_case(300, i % 2 == 0 ? 16 : 9));  // several chunks of an expert
  for (int64_t columns : {767, 768, 769, 776, 1024, 1025, 1032, 2048, 2056, 3000, 4088, 4096}) {
    for (int i = 0; i < 5; ++i, ++cases) run(random_case(20, columns));
  }
  Case none = random_case(1, 64);
  none.tokens = 0;
  run(none);
  std::printf("%d cases\n", cases + 1);
  return 0;
}
