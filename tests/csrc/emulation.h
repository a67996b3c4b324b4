// A small CUDA on one host thread: kernels of csrc/ and their launchers compile unchanged and run on it.
//
//   emulation_numbers.h  half, bfloat16 and vectors
//   emulation_memory.h   global memory of which blocks see old values, and stores that leave at fences
//   emulation_grid.h     grids, clusters, blocks and threads
//   emulation_machine.h  which of them runs next
//   emulation_warp.h     barriers, ballots, shuffles, atomics, fences, kernels that overlap
//   emulation_runtime.h  launches
//   emulation_copies.h   cp.async: copies that arrive late
//   emulation_mma.h      mma.sync (for tiny_ffn)
//   emulation_hopper.h   mbarriers, TMA, the two proxies, other blocks' shared memory (for expert_gemm)
//   emulation_wgmma.h    wgmma (for expert_gemm)
//   emulation_hooks.h    how stores are seen; only where memory ordering is tested
//
// Not emulated: static __shared__ variables, memory ordering within a block beyond that of the two proxies, time.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __grid_constant__

#include "emulation_runtime.h"
