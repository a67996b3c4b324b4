// The kernel of the expert GEMM in emulation, with one type and one activation: every tile and cluster, rows by TMA and
// by cp.async, under many orders in which warps run and copies arrive.
#include <cstdlib>

#include "expert_gemm_cases.h"
#include "expert_gemm_launch.cuh"

namespace {

template <int kBlockN, int kCluster>
void check(bool gather) {
  cases::Case c = cases::draw_case(kBlockN, kCluster);
  c.activation = mbk::Activation::kIdentity;
  c.gather = gather;
  cases::Problem<__nv_bfloat16> problem(c);
  using Traits = mbk::ExpertGemmTraits<__nv_bfloat16, kBlockN, kCluster>;
  const cudaError_t status = mbk::expert_gemm_detail::launch<Traits, mbk::ActivationForm::kClamp>(
      problem.params(), {}, &cuTensorMapEncodeTiled, emulation::kMultiprocessors);
  CHECK(status == cudaSuccess, "status %d; %s", status, c.text().c_str());
  cudaDeviceSynchronize();
  problem.check();
}

}  // namespace

int main(int arguments, char** values) {
  const int rounds = arguments > 1 ? std::atoi(values[1]) : 12;
  for (int round = 0; round < rounds; ++round) {
    for (bool gather : {false, true}) {
      check<128, 1>(gather);
      check<128, 2>(gather);
      check<192, 1>(gather);
      check<192, 2>(gather);
    }
  }
  std::printf("%d rounds of 8 problems\n", rounds);
}
