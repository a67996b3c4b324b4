// The kernel of the expert GEMM in emulation, with one type and one activation: every tile and cluster, rows by TMA and
// by cp.async, and one GEMM started while the one that it reads from runs, under many orders in which warps run and
// copies arrive.
#include <cstdlib>

#include "expert_gemm_cases.h"
#include "expert_gemm_launch.cuh"

namespace {

using T = __nv_bfloat16;

template <int kBlockN, int kCluster>
void launch(const mbk::ExpertGemmParams& params, const cases::Case& c) {
  using Traits = mbk::ExpertGemmTraits<T, kBlockN, kCluster>;
  const cudaError_t status = mbk::expert_gemm_detail::launch<Traits, mbk::ActivationForm::kClamp>(
      params, {}, &cuTensorMapEncodeTiled, emulation::kMultiprocessors);
  CHECK(status == cudaSuccess, "status %d; %s", status, c.text().c_str());
}

cases::Case draw_identity(int block_n, int cluster) {
  cases::Case c = cases::draw_case(block_n, cluster);
  c.activation = mbk::Activation::kIdentity;
  return c;
}

template <int kBlockN, int kCluster>
void check(bool gather) {
  cases::Case c = draw_identity(kBlockN, kCluster);
  c.gather = gather;
  cases::Problem<T> problem(c);
  launch<kBlockN, kCluster>(problem.params(), c);
  cudaDeviceSynchronize();
  problem.check();
}

// h = x w1, then y = h w2 by a second launch that may start beside the first one.
template <int kBlockN, int kCluster>
void check_two() {
  cases::Case c = draw_identity(kBlockN, kCluster);
  c.gather = false;
  c.depth = c.columns;
  cases::Problem<T> problem(c);
  cases::Case first = c;
  first.top_k = 1;
  first.tokens = c.tokens * c.top_k;
  first.scatter = first.has_bias = first.has_weights = first.has_pre = false;
  cases::Problem<T> producer(first);  // of small numbers: their sums, rounded, are what the second one reads
  auto params = producer.params();
  params.offsets = problem.params().offsets;
  params.row_to_assignment = problem.params().row_to_assignment;
  launch<kBlockN, kCluster>(params, c);
  auto after = problem.params();
  after.a = params.y;
  after.after_previous = true;
  launch<kBlockN, kCluster>(after, c);
  cudaDeviceSynchronize();
  problem.take_rows(static_cast<const T*>(params.y));
  problem.check();
}

template <int kBlockN>
void check_all() {
  for (bool gather : {false, true}) {
    check<kBlockN, 1>(gather);
    check<kBlockN, 2>(gather);
  }
  check_two<kBlockN, 1>();
  check_two<kBlockN, 2>();
}

}  // namespace

int main(int arguments, char** values) {
  const int rounds = arguments > 1 ? std::atoi(values[1]) : 8;
  for (int round = 0; round < rounds; ++round) {
    check_all<128>();
    check_all<192>();
    check_all<256>();
  }
  std::printf("%d rounds of 18 problems\n", rounds);
}
