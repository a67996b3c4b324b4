// The expert GEMM in emulation as the op calls it: launcher, both types, every activation, tile and cluster.
#include "expert_gemm_cases.h"

#include "expert_gemm.cu"
#include "expert_gemm_bf16.cu"
#include "expert_gemm_fp16.cu"

namespace {

template <typename T>
void check(const cases::Case& c) {
  cases::Problem<T> problem(c);
  const cudaError_t status = mbk::expert_gemm(problem.params());
  CHECK(status == cudaSuccess, "status %d; %s", status, c.text().c_str());
  cudaDeviceSynchronize();
  problem.check();
}

template <mbk::ActivationForm kForm>
void check_special_values(mbk::Activation activation) {
  const auto constants = mbk::expert_gemm_detail::form_of(activation).constants;
  const bool same = activation == mbk::Activation::kIdentity;
  for (float x : {INFINITY, 3e38f, 1e25f}) {
    CHECK(mbk::activate<kForm>(x, constants) == x, "%g", static_cast<double>(x));
    CHECK(mbk::activate<kForm>(-x, constants) == (same ? -x : 0.0f), "-%g", static_cast<double>(x));
  }
  CHECK(std::isnan(mbk::activate<kForm>(NAN, constants)), "NaN");
}

void test_special_values() {
  using Form = mbk::ActivationForm;
  check_special_values<Form::kGelu>(mbk::Activation::kGelu);
  check_special_values<Form::kSigmoid>(mbk::Activation::kGeluTanh);
  check_special_values<Form::kSigmoid>(mbk::Activation::kSilu);
  check_special_values<Form::kClamp>(mbk::Activation::kRelu);
  check_special_values<Form::kClamp>(mbk::Activation::kIdentity);
}

void test_refusals() {
  cases::Problem<__half> problem(cases::draw_case(128, 1));
  const auto refused = [&](auto change) {
    auto params = problem.params();
    change(params);
    return mbk::expert_gemm(params) == cudaErrorInvalidValue;
  };
  CHECK(refused([](auto& params) { params.columns += 4; }), "columns");
  CHECK(refused([](auto& params) { params.depth += 4; }), "depth");
  CHECK(refused([](auto& params) { params.a = static_cast<const char*>(params.a) + 2; }), "an address");
  CHECK(refused([](auto& params) { params.activation = mbk::Activation::kSwiGlu; }), "a gated activation");
  CHECK(refused([](auto& params) { params.activation = mbk::Activation::kRelu2; }), "relu2");
  CHECK(refused([](auto& params) { params.dtype = mbk::DType::kFloat32; }), "float32");
  CHECK(refused([](auto& params) { params.block_n = 64; }), "a tile that is not compiled");
  auto none = problem.params();
  none.rows = 0;
  CHECK(mbk::expert_gemm(none) == cudaSuccess, "no rows");
}

}  // namespace

int main() {
  test_refusals();
  test_special_values();
  int count = 0;
  for (mbk::Activation activation : cases::kActivations) {
    for (int block_n : {0, 128, 192, 256}) {
      for (int cluster : {0, 1, 2}) {
        cases::Case c = cases::draw_case(block_n, cluster);
        c.activation = activation;
        if (count++ % 2 == 0) {
          check<__half>(c);
        } else {
          check<__nv_bfloat16>(c);
        }
      }
    }
  }
  std::printf("%d problems\n", count);
}
