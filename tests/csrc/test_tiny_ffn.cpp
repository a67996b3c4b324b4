// The two kernels of tiny_ffn in emulation, launcher included, against loops in double precision.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "emulation_hooks.h"
#include "testing.h"
#include "tiny_ffn.cu"

namespace {

using mbk::Activation;
using mbk::DType;
using mbk::IntType;

std::mt19937_64 random_numbers(77);

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_numbers); }

float to_float(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

void from_float(DType dtype, void* data, int64_t i, float value) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else if (dtype == DType::kFloat16) {
    static_cast<__half*>(data)[i] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
  }
}

double epsilon(DType dtype) {
  return std::ldexp(1.0, dtype == DType::kFloat32 ? -23 : dtype == DType::kFloat16 ? -10 : -7);
}

double rounded(DType dtype, double value) {
  float storage;
  from_float(dtype, &storage, 0, static_cast<float>(value));
  return to_float(dtype, &storage, 0);
}

// Elements of a dtype at any strides; those between them are NaN.
class Array {
 public:
  Array(DType dtype, int64_t size, int64_t stride, double scale, double middle = 0.0)
      : dtype_(dtype), stride_(stride), bytes_(static_cast<size_t>(size * stride * size_of(dtype))) {
    std::normal_distribution<float> normal(static_cast<float>(middle), static_cast<float>(scale));
    for (int64_t i = 0; i < size * stride; ++i) {
      from_float(dtype, bytes_.data(), i, i % stride == 0 ? normal(random_numbers) : NAN);
    }
  }

  double operator[](int64_t i) { return to_float(dtype_, bytes_.data(), i * stride_); }
  void* data() { return bytes_.data(); }

 private:
  DType dtype_;
  int64_t stride_;
  Guarded<char> bytes_;
};

enum class Routing { kEven, kSkewed, kOneExpert, kAllSkipped, kSomeSkipped };
enum class Source { kGrouping, kIds };

struct Case {
  int tokens, hidden, width, experts;
  DType dtype, x_dtype;
  Activation activation;
  Routing routing;
  Source source;
  bool has_norm, has_bias, has_weights;
  int stride;  // between neighbours of x, w1 and w2
};

std::vector<int> draw_experts(const Case& c) {
  std::vector<int> experts(static_cast<size_t>(c.tokens));
  const int only = draw(0, c.experts - 1);
  for (int& e : experts) {
    e = draw(0, c.experts - 1);
    if (c.routing == Routing::kSkewed && draw(0, 3) != 0) e = e * e / c.experts;
    if (c.routing == Routing::kOneExpert) e = only;
    if (c.routing == Routing::kAllSkipped) e = -1;
    if (c.routing == Routing::kSomeSkipped && draw(0, 1) == 0) e = c.experts;
  }
  return experts;
}

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kGelu:
    case Activation::kGeGlu:
      return 0.5 * x * (1.0 + std::erf(x * std::sqrt(0.5)));
    case Activation::kGeluTanh:
    case Activation::kGeGluTanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kSilu:
    case Activation::kSwiGlu:
      return x / (1.0 + std::exp(-x));
    case Activation::kRelu:
    case Activation::kReGlu:
      return std::max(x, 0.0);
    case Activation::kRelu2:
      return x > 0.0 ? x * x : 0.0;
    case Activation::kIdentity:
      break;
  }
  return x;
}

// What the launcher gets, and the arrays behind it.
struct Problem {
  explicit Problem(const Case& c_)
      : c(c_),
        rows1(is_gated(c.activation) ? 2 * c.width : c.width),
        experts(draw_experts(c)),
        x(c.x_dtype, int64_t{c.tokens} * c.hidden, c.stride, 1.0),
        w1(c.dtype, int64_t{c.experts} * rows1 * c.hidden, c.stride, 1.0 / std::sqrt(c.hidden)),
        w2(c.dtype, int64_t{c.experts} * c.hidden * c.width, c.stride, 1.0 / std::sqrt(c.width)),
        b1(c.dtype, int64_t{c.experts} * rows1, 1, 1.0),
        b2(c.dtype, int64_t{c.experts} * c.hidden, 1, 1.0),
        norm_weight(c.x_dtype, int64_t{c.experts} * c.hidden, 1, 0.3, 1.0),
        norm_bias(c.x_dtype, int64_t{c.experts} * c.hidden, 1, 0.3),
        weights(c.x_dtype, c.tokens, 1, 0.3, 0.7),
        offsets(static_cast<size_t>(c.experts) + 1),
        row_to_assignment(experts.size()),
        ids(experts.begin(), experts.end()),
        workspace(static_cast<size_t>(
            mbk::tiny_ffn_plan(c.tokens, c.hidden, c.width, c.experts, c.dtype, c.activation, c.has_norm).bytes)) {
    params.tokens = c.tokens;
    params.hidden = c.hidden;
    params.width = c.width;
    params.experts = c.experts;
    params.dtype = c.dtype;
    params.x_dtype = c.x_dtype;
    params.activation = c.activation;
    params.eps = 1e-3f;
    params.x = x.data();
    params.x_stride_t = int64_t{c.hidden} * c.stride;
    params.x_stride_h = params.w1_stride_k = params.w2_stride_k = c.stride;
    params.w1 = w1.data();
    params.w1_stride_n = int64_t{c.hidden} * c.stride;
    params.w1_stride_e = rows1 * params.w1_stride_n;
    params.w2 = w2.data();
    params.w2_stride_n = int64_t{c.width} * c.stride;
    params.w2_stride_e = c.hidden * params.w2_stride_n;
    params.b1 = c.has_bias ? b1.data() : nullptr;
    params.b2 = c.has_bias ? b2.data() : nullptr;
    params.norm_weight = c.has_norm ? norm_weight.data() : nullptr;
    params.norm_bias = c.has_norm ? norm_bias.data() : nullptr;
    params.routing_weights = c.has_weights ? weights.data() : nullptr;
    params.workspace = workspace.data();
    route();
  }

  void route() {
    if (c.source == Source::kGrouping) {
      int row = 0;
      for (int e = 0; e <= c.experts; ++e) {
        offsets[static_cast<size_t>(e)] = row;
        for (int t = 0; t < c.tokens; ++t) {
          const int expert = experts[static_cast<size_t>(t)];
          const bool mine = e < c.experts ? expert == e : expert < 0 || expert >= c.experts;
          if (mine) row_to_assignment[static_cast<size_t>(row++)] = t;
        }
      }
      params.routing.offsets = offsets.data();
      params.routing.row_to_assignment = row_to_assignment.data();
      return;
    }
    params.routing.expert_ids = {ids.data(), 0, 1, IntType::kInt64};
  }

  void check_against_reference(const void* y) {
    std::vector<double> h(static_cast<size_t>(c.width)), z(static_cast<size_t>(c.hidden));
    for (int t = 0; t < c.tokens; ++t) {
      const int64_t e = experts[static_cast<size_t>(t)], of_token = int64_t{t} * c.hidden;
      const bool routed = e >= 0 && e < c.experts;
      if (!routed) {
        for (int n = 0; n < c.hidden; ++n) {
          CHECK(to_float(c.x_dtype, y, of_token + n) == (c.has_norm ? x[of_token + n] : 0.0), "token %d", t);
        }
        continue;
      }
      const auto pre_activation = [&](int n) {
        double sum = c.has_bias ? b1[e * rows1 + n] : 0.0;
        for (int k = 0; k < c.hidden; ++k) {
          sum += rounded(c.dtype, x[of_token + k]) * w1[(e * rows1 + n) * c.hidden + k];
        }
        return sum;
      };
      for (int n = 0; n < c.width; ++n) {
        const double up = is_gated(c.activation) ? pre_activation(c.width + n) : 1.0;
        h[static_cast<size_t>(n)] = rounded(c.dtype, activate(c.activation, pre_activation(n)) * up);
      }
      double largest = 0.0, mean = 0.0, variance = 0.0;
      for (int n = 0; n < c.hidden; ++n) {
        double sum = (c.has_bias ? b2[e * c.hidden + n] : 0.0) + (c.has_norm ? x[of_token + n] : 0.0);
        for (int k = 0; k < c.width; ++k) {
          const double product = h[static_cast<size_t>(k)] * w2[(e * c.hidden + n) * c.width + k];
          sum += product;
          largest = std::max(largest, std::fabs(product));
        }
        z[static_cast<size_t>(n)] = sum;
        mean += sum / c.hidden;
      }
      for (double value : z) variance += (value - mean) * (value - mean) / c.hidden;
      const double scale = c.has_norm ? 1.0 / std::sqrt(variance + 1e-3) : 1.0;
      const double p = c.has_weights ? weights[t] : 1.0;
      // A few activations may be rounded the other way; the rest is float32 and the rounding of y.
      const double error_of_z = 3.0 * epsilon(c.dtype) * largest + 1e-5;
      for (int n = 0; n < c.hidden; ++n) {
        const double gain = c.has_norm ? norm_weight[e * c.hidden + n] : 1.0;
        double exact = z[static_cast<size_t>(n)];
        if (c.has_norm) exact = (exact - mean) * scale * gain + norm_bias[e * c.hidden + n];
        exact *= p;
        const double got = to_float(c.x_dtype, y, of_token + n);
        const double of_norm = 2.0 * std::fabs(p * gain) * scale * error_of_z;
        const double bound = of_norm + epsilon(c.x_dtype) * std::fabs(exact) + 1e-6;
        CHECK(std::fabs(got - exact) <= bound, "T=%d H=%d I=%d E=%d dtype=%d act=%d source=%d t=%d n=%d: %g, not %g",
              c.tokens, c.hidden, c.width, c.experts, static_cast<int>(c.dtype), static_cast<int>(c.activation),
              static_cast<int>(c.source), t, n, got, exact);
      }
    }
  }

  Case c;
  int64_t rows1;
  std::vector<int> experts;
  Array x, w1, w2, b1, b2, norm_weight, norm_bias, weights;
  Guarded<int32_t> offsets, row_to_assignment;
  std::vector<int64_t> ids;
  Guarded<char> workspace;
  mbk::TinyFfnParams params{};
};

// Three replays on one workspace, each with blocks in another order: the same bits, and the right ones.
void run(const Case& c) {
  Problem problem(c);
  const auto bytes = static_cast<size_t>(int64_t{c.tokens} * c.hidden * size_of(c.x_dtype));
  Guarded<char> y(bytes);
  problem.params.y = y.data();
  std::vector<char> first;
  for (int replay = 0; replay < 3; ++replay) {
    std::memset(y.data(), 0xff, bytes);
    std::memset(problem.workspace.data(), 0xff, problem.workspace.size());  // or what is read too early looks right
    emulation::options().seed = replay == 0 ? 0 : random_numbers();
    const cudaError_t status = mbk::tiny_ffn(problem.params);
    CHECK(status == cudaSuccess, "status %d", status);
    cudaDeviceSynchronize();
    if (replay == 0) first.assign(y.begin(), y.end());
    CHECK(std::memcmp(first.data(), y.data(), bytes) == 0, "replay %d differs", replay);
  }
  problem.check_against_reference(y.data());
}

const DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
const int kTokens[] = {0, 1, 7, 32, 129, 256};

Case draw_case(int tokens, DType dtype) {
  const int sizes[][2] = {{64, 96}, {40, 32}, {37, 51}, {130, 20}, {3, 5}, {1, 1}, {72, 264}};
  const int* size = sizes[draw(0, tokens > 100 ? 4 : 6)];
  const int experts[] = {1, 4, 5, 40};
  Case c{};
  c.tokens = tokens;
  c.hidden = size[0];
  c.width = size[1];
  c.experts = experts[draw(0, 3)];
  c.dtype = dtype;
  c.x_dtype = draw(0, 2) == 0 ? DType::kFloat32 : dtype;
  c.activation = static_cast<Activation>(draw(0, 7));
  c.routing = static_cast<Routing>(draw(0, 4));
  c.source = static_cast<Source>(draw(0, 1));
  c.has_norm = draw(0, 3) != 0;
  c.has_bias = draw(0, 3) != 0;
  c.has_weights = draw(0, 1) != 0;
  c.stride = draw(0, 5) == 0 ? 2 : 1;
  return c;
}

void test_random_cases() {
  for (int tokens : kTokens) {
    for (DType dtype : kDTypes) {
      for (int i = 0; i < (tokens > 100 ? 3 : 14); ++i) run(draw_case(tokens, dtype));
    }
  }
}

void test_every_activation_and_source() {
  for (int activation = 0; activation < 8; ++activation) {
    for (int source = 0; source < 2; ++source) {
      Case c = draw_case(20, kDTypes[activation % 3]);
      c.activation = static_cast<Activation>(activation);
      c.source = static_cast<Source>(source);
      run(c);
    }
  }
}

// What is no finite number, and numbers whose squares are none: 0 or x far from 0, and NaN stays NaN.
void test_special_values() {
  for (int activation = 0; activation <= static_cast<int>(Activation::kIdentity); ++activation) {
    const auto act = static_cast<Activation>(activation);
    for (float x : {INFINITY, 3e38f, 1e25f}) {
      const float above = mbk::tiny::activate(act, x), below = mbk::tiny::activate(act, -x);
      const bool squares = act == Activation::kRelu2, same = act == Activation::kIdentity;
      CHECK(above == (squares ? INFINITY : x), "act=%d(%g): %g", activation, static_cast<double>(x),
            static_cast<double>(above));
      CHECK(below == (same ? -x : 0.0f), "act=%d(-%g): %g", activation, static_cast<double>(x),
            static_cast<double>(below));
    }
    CHECK(std::isnan(mbk::tiny::activate(act, NAN)), "act=%d(NaN)", activation);
  }
}

// Every tile height, rows of sums that fit in shared memory and one that does not, many steps along K.
void test_tiles_and_long_rows() {
  for (DType dtype : kDTypes) {
    run({100, 48, 72, 8, dtype, dtype, Activation::kGelu, Routing::kEven, Source::kGrouping, true, true, false, 1});
    run({130, 48, 72, 2, dtype, dtype, Activation::kGelu, Routing::kOneExpert, Source::kIds, true, true, true, 1});
    run({2, 6200, 24, 2, dtype, dtype, Activation::kGelu, Routing::kEven, Source::kIds, true, true, false, 1});
    run({5, 16, 2000, 3, dtype, dtype, Activation::kGelu, Routing::kSkewed, Source::kGrouping, true, true, false, 1});
    run({9, 700, 40, 700, dtype, dtype, Activation::kGelu, Routing::kEven, Source::kIds, true, true, false, 1});
  }
}

// One tile whose columns several CTAs sum: the last one needs the sums of all others.
void test_hand_over() {
  for (int i = 0; i < 60; ++i) {
    Case c = draw_case(draw(1, 4), kDTypes[i % 3]);
    c.hidden = 160;
    c.width = 16;
    c.experts = 1;
    c.routing = Routing::kOneExpert;
    c.has_norm = true;
    run(c);
  }
}

// No CTA needs h, and yet the second kernel must not end before the first one: what is launched next waits for one only.
void test_no_experts() {
  for (int i = 0; i < 20; ++i) {
    Case c = draw_case(draw(1, 9), kDTypes[i % 3]);
    c.routing = Routing::kAllSkipped;
    run(c);
  }
}

// Tiles never outnumber the plan, whatever the routing: a tile too many would have no CTA.
void test_plan_has_a_tile_for_every_row() {
  for (int i = 0; i < 20000; ++i) {
    const int tokens = draw(1, 256), experts = draw(1, draw(0, 1) == 0 ? 8 : 300), favourite = draw(0, experts);
    const auto plan = mbk::tiny_ffn_plan(tokens, 64, 64, experts, DType::kBFloat16, Activation::kGelu, true);
    std::vector<int> counts(static_cast<size_t>(experts) + 1);
    const int share = draw(0, 10);
    for (int t = 0; t < tokens; ++t) ++counts[static_cast<size_t>(draw(0, 9) < share ? favourite : draw(0, experts))];
    int tiles = 0;
    for (int count : counts) tiles += (count + plan.block_m - 1) / plan.block_m;
    CHECK(tiles <= plan.tiles, "T=%d E=%d: %d tiles, planned %d", tokens, experts, tiles, plan.tiles);
  }
}

void test_refusals() {
  Problem problem(draw_case(7, DType::kFloat16));
  Guarded<char> y(1 << 16);
  problem.params.y = y.data();
  auto params = problem.params;
  params.tokens = 257;
  CHECK(mbk::tiny_ffn(params) == cudaErrorInvalidValue, "257 tokens");
  params = problem.params;
  params.experts = 1025;
  CHECK(mbk::tiny_ffn(params) == cudaErrorInvalidValue, "1025 experts");
  params = problem.params;
  params.x_dtype = DType::kBFloat16;
  CHECK(mbk::tiny_ffn(params) == cudaErrorInvalidValue, "two types of 16 bits");
}

}  // namespace

int main() {
  test_plan_has_a_tile_for_every_row();
  test_refusals();
  test_special_values();
  test_hand_over();
  test_no_experts();
  test_tiles_and_long_rows();
  test_every_activation_and_source();
  test_random_cases();
  std::printf("tiny_ffn: all as expected\n");
}
