// The Hopper instructions that the expert GEMM is made of. tests/csrc/emulation_hopper.h and emulation_wgmma.h have the
// same functions for the host, so that everything above them runs there unchanged.
#pragma once

#include "device.cuh"

#ifdef MBK_EMULATION

#include "emulation_wgmma.h"
#define MBK_HAS_WGMMA

#else

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/mma_atom.hpp>

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MBK_HAS_WGMMA
#endif

namespace mbk {
namespace hopper {

// The block's dynamic shared memory where a swizzle over 1024 bytes begins.
__device__ __forceinline__ unsigned char* swizzled_shared() {
  extern __shared__ __align__(1024) unsigned char mbk_swizzled_shared[];
  return mbk_swizzled_shared;
}

__device__ __forceinline__ int warp_group_index() { return cutlass::canonical_warp_group_idx(); }

template <uint32_t kRegisters>
__device__ __forceinline__ void give_registers_up() {
  cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}

template <uint32_t kRegisters>
__device__ __forceinline__ void take_registers() {
  cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

__device__ __forceinline__ int rank_in_cluster() { return static_cast<int>(cute::block_rank_in_cluster()); }

// All threads of the cluster meet; what they wrote before is not published, but for barriers (publish_barriers).
__device__ __forceinline__ void sync_cluster() {
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();
}

// mbarriers: a phase ends when its arrivals and its bytes are in.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, int arrivals) {
  cutlass::arch::ClusterBarrier::init(barrier, arrivals);
}

// After all inits, for the cluster and for the copies.
__device__ __forceinline__ void publish_barriers() { cutlass::arch::fence_barrier_init(); }

__device__ __forceinline__ void arrive(uint64_t* barrier) { cutlass::arch::ClusterBarrier::arrive(barrier); }

// At the barrier in the same place of the cluster's CTA `rank`.
__device__ __forceinline__ void arrive_at(uint64_t* barrier, int rank) {
  cutlass::arch::ClusterBarrier::arrive(barrier, rank, true);
}

__device__ __forceinline__ void arrive_and_expect(uint64_t* barrier, uint32_t bytes) {
  cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, bytes);
}

// Until a phase of this parity has ended.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  cutlass::arch::ClusterBarrier::wait(barrier, parity);
}

// The same where other CTAs of the cluster wrote what is read next.
__device__ __forceinline__ void wait_for_cluster(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait_for_cluster:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait_for_cluster;\n"
      "}"
      :
      : "r"(cute::cast_smem_ptr_to_uint(barrier)), "r"(parity));
}

// Into the same place of the cluster's CTA `rank`: 8 bytes that complete on its barrier, whenever they get there.
__device__ __forceinline__ void send(float2* shared, uint64_t* barrier, int rank, float2 value) {
  const auto to = static_cast<uint32_t>(rank);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
               :
               : "r"(cute::set_block_rank(cute::cast_smem_ptr_to_uint(shared), to)), "f"(value.x), "f"(value.y),
                 "r"(cute::set_block_rank(cute::cast_smem_ptr_to_uint(barrier), to)));
}

// What `send` brought, after a wait: volatile, as the barriers' instructions order nothing else.
__device__ __forceinline__ float2 received(const float2* shared) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "r"(cute::cast_smem_ptr_to_uint(shared)));
  return value;
}

__device__ __forceinline__ void sync_named(int threads, int name) {
  cutlass::arch::NamedBarrier::sync(static_cast<uint32_t>(threads), static_cast<uint32_t>(name));
}

__device__ __forceinline__ void arrive_named(int threads, int name) {
  cutlass::arch::NamedBarrier::arrive(static_cast<uint32_t>(threads), static_cast<uint32_t>(name));
}

// TMA: boxes of a tensor map come into shared memory and complete their bytes on `full`.
constexpr uint64_t kCacheHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) { cute::prefetch_tma_descriptor(map); }

__device__ __forceinline__ void load_box(const CUtensorMap* map, uint64_t* full, void* shared, int k, int row) {
  cute::SM90_TMA_LOAD_2D::copy(map, full, kCacheHint, shared, k, row);
}

__device__ __forceinline__ void load_box(const CUtensorMap* map, uint64_t* full, void* shared, int k, int row,
                                         int expert) {
  cute::SM90_TMA_LOAD_3D::copy(map, full, kCacheHint, shared, k, row, expert);
}

// Into the same place of all CTAs in `ranks`, on the barrier of each.
__device__ __forceinline__ void load_box_for(uint16_t ranks, const CUtensorMap* map, uint64_t* full, void* shared,
                                             int k, int row, int expert) {
  cute::SM90_TMA_LOAD_MULTICAST_3D::copy(map, full, ranks, kCacheHint, shared, k, row, expert);
}

__device__ __forceinline__ void load_box_for(uint16_t ranks, const CUtensorMap* map, uint64_t* full, void* shared,
                                             int k, int row) {
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(map, full, ranks, kCacheHint, shared, k, row);
}

// cp.async: 16 bytes to shared memory, or zeros, through the generic proxy.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

__device__ __forceinline__ void copy_or_zero(Bytes16* shared, const void* global, bool inside) {
  cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(*static_cast<const cute::uint128_t*>(global),
                                                               *reinterpret_cast<cute::uint128_t*>(shared), inside);
}

__device__ __forceinline__ void commit_copies() { cute::cp_async_fence(); }

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  cute::cp_async_wait<kPending>();
}

// What this thread wrote to shared memory becomes visible to wgmma, which reads through the async proxy.
__device__ __forceinline__ void fence_proxies() { cutlass::arch::fence_view_async_shared(); }

template <class T>
struct CutlassType;
template <>
struct CutlassType<__half> {
  using type = cutlass::half_t;
};
template <>
struct CutlassType<__nv_bfloat16> {
  using type = cutlass::bfloat16_t;
};

// The product of kM rows with kN rows of weights, kK elements long in each stage, by kGroups warp groups that take 64
// rows of each 64 * kGroups. `thread` is that of the warp groups together. Both operands lie in shared memory,
// K adjacent, swizzled over 128 bytes. Objects stay in the kernel: as members of one object they cost instructions.
template <class Element, int kM, int kN, int kK, int kStages, int kGroups>
struct Product {
  using T = typename CutlassType<Element>::type;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<T, T, float, cute::Shape<cute::Int<kM>, cute::Int<kN>, cute::Int<kK>>>(),
      cute::Layout<cute::Shape<cute::Int<kGroups>, cute::_1, cute::_1>>{}));

  template <int kRows>
  static __device__ __forceinline__ auto stages(Element* data) {
    using Layout = decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<T>{},
                                                cute::Shape<cute::Int<kRows>, cute::Int<kK>, cute::Int<kStages>>{}));
    return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<T*>(data)), Layout{});
  }

  static __device__ __forceinline__ auto rows(Element* data, int thread) {
    return Mma{}.get_thread_slice(thread).partition_fragment_A(stages<kM>(data));
  }

  static __device__ __forceinline__ auto weights(Element* data, int thread) {
    return Mma{}.get_thread_slice(thread).partition_fragment_B(stages<kN>(data));
  }

  // A thread's share.
  static __device__ __forceinline__ auto accumulators() {
    return cute::partition_fragment_C(Mma{}, cute::Shape<cute::Int<kM>, cute::Int<kN>>{});
  }

  // The first product of such an object replaces the accumulators; those after it are added.
  static __device__ __forceinline__ Mma begin() {
    Mma mma;
    mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
    return mma;
  }

  // Returns with the stage's product on its way.
  template <class Rows, class Weights, class Accumulators>
  static __device__ __forceinline__ void start(Mma& mma, const Rows& rows, const Weights& weights, Accumulators& acc,
                                               int stage) {
    cute::warpgroup_fence_operand(acc);
    cute::warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < cute::size<2>(rows); ++k) {
      cute::gemm(mma, rows(cute::_, cute::_, k, stage), weights(cute::_, cute::_, k, stage), acc);
      mma.accumulate_ = cute::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
  }

  // Until at most kPending of the newest products are on their way.
  template <int kPending, class Accumulators>
  static __device__ __forceinline__ void wait(Accumulators& acc) {
    cute::warpgroup_wait<kPending>();
    cute::warpgroup_fence_operand(acc);
  }

  // Column 8 * j + 2 * (lane % 4) + c, row 64 * (kGroups * m + group) + 16 * warp + lane / 4 + 8 * v.
  template <class Accumulators>
  static __device__ __forceinline__ float& at(Accumulators& acc, int j, int v, int m, int c) {
    return acc(cute::make_coord(c, v, j), m, 0);
  }
};

}  // namespace hopper
}  // namespace mbk

#endif
