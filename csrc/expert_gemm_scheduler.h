// Which tile each CTA of the expert GEMM computes next, and where it is in its pipeline: pure functions of `offsets`
// and of sizes, for the device and for host tests.
//
// Rows of expert e are offsets[e]:offsets[e + 1]; rows offsets[E]:rows have no expert and count as expert E. A work
// item is what one cluster does at a time. A cluster of two takes two adjacent row tiles of one expert and the same
// columns, so both need the same weights; an expert's odd last row tile is an item of two adjacent column tiles
// instead, each CTA with weights of its own. Items with the same rows are neighbours: the rows are read from HBM once,
// the weights of few experts stay in the L2. No item crosses an expert.
#pragma once

#include <cmath>

#include "common.h"

namespace mbk {

struct ExpertTile {
  int expert;           // E: rows without an expert, whose results are zeros
  int row0, row_end;    // rows row0:min(row0 + kBlockM, row_end); none for a CTA without a tile of its own
  int tile_n;           // columns tile_n * kBlockN and on
  bool shared_weights;  // the other CTA of the cluster has the same expert and tile_n
};

// Walks items first_item, first_item + stride, ...; every role in a CTA walks for itself and finds the same tiles.
// All CTAs of a cluster find the same items, of the same experts: they stay in step.
template <int kBlockM, int kCluster>
class ExpertTileScheduler {
  static_assert(kCluster == 1 || kCluster == 2, "a cluster is one CTA or a pair");

 public:
  MBK_HOST_DEVICE ExpertTileScheduler(const int* offsets, int num_experts, int rows, int tiles_n, int rank,
                                      int first_item, int stride)
      : offsets_(offsets),
        num_experts_(num_experts),
        rows_(rows),
        tiles_n_(tiles_n),
        rank_(rank),
        stride_(stride),
        item_(first_item) {}

  // False: no items are left.
  MBK_HOST_DEVICE bool next(ExpertTile& tile) {
    for (; expert_ <= num_experts_; ++expert_) {
      const int begin = offsets_[expert_], end = expert_ == num_experts_ ? rows_ : offsets_[expert_ + 1];
      const int row_tiles = (end - begin + kBlockM - 1) / kBlockM;
      const int shared_items = row_tiles / kCluster * tiles_n_;
      const int items = shared_items + row_tiles % kCluster * ((tiles_n_ + kCluster - 1) / kCluster);
      if (item_ < items) {
        const bool shared = item_ < shared_items;
        const int row_tile = shared ? item_ / tiles_n_ * kCluster + rank_ : row_tiles - 1;
        const int tile_n = shared ? item_ % tiles_n_ : (item_ - shared_items) * kCluster + rank_;
        const bool none = tile_n >= tiles_n_;
        tile.expert = expert_;
        tile.row0 = begin + row_tile * kBlockM;
        tile.row_end = none ? tile.row0 : end;
        tile.tile_n = none ? tiles_n_ - 1 : tile_n;
        tile.shared_weights = kCluster > 1 && shared;
        item_ += stride_;
        return true;
      }
      item_ -= items;
    }
    return false;
  }

 private:
  const int* offsets_;
  int num_experts_, rows_, tiles_n_, rank_, stride_;
  int item_, expert_ = 0;  // the next item, counted from its expert's first; few registers, as they live long
};

// A position in the ring of shared-memory stages, and the parity of the round it is in: what mbarriers wait on.
template <int kStages>
struct PipelineSlot {
  int stage = 0;
  uint32_t phase = 0;

  MBK_HOST_DEVICE void advance(int steps) {
    const int position = stage + steps;
    phase ^= static_cast<uint32_t>(position / kStages) & 1u;
    stage = position % kStages;
  }

  MBK_HOST_DEVICE PipelineSlot& operator++() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
    return *this;
  }
};

inline constexpr int kExpertGemmBlockM = 128, kExpertGemmBlockK = 64;

// Whether both consumer warp groups share tiles of so many columns, instead of taking them in turn.
MBK_HOST_DEVICE constexpr bool expert_gemm_is_cooperative(int block_n) { return block_n == 256; }

// Columns of a tile (128, 192 or 256) and CTAs of a cluster (1 or 2): what csrc/expert_gemm.cuh is compiled for.
struct ExpertGemmConfig {
  int block_n, cluster;
};

struct ExpertGemmSizes {
  int64_t rows, num_experts, columns, depth;
  bool has_activation;  // other than the identity
};

// The most items there can be, whatever the routing.
inline int64_t max_expert_gemm_items(const ExpertGemmConfig& config, const ExpertGemmSizes& sizes) {
  const int64_t row_tiles = sizes.rows / kExpertGemmBlockM + sizes.num_experts + 1;
  return ceil_div(row_tiles * ceil_div(sizes.columns, config.block_n) + sizes.num_experts + 1, config.cluster);
}

// Cycles of the CTA that has most to do, estimated; nothing of it was measured. An expert's last tile is half full on
// average, and the sum of the experts' tiles varies by 1 / sqrt(12) each.
// - A step of 64 multiplies 128 x block_n x 64 at 4,096 operations per cycle, or is bound by shared memory, of which a
//   product of 128 columns reads 160 bytes per cycle, one of 192 columns 138, and an SM delivers 128.
// - The epilogue issues 20 instructions for each element of a thread, 8 without an activation (counted), at 0.7
//   per cycle and scheduler. In turns it is hidden behind the other group's products, the last one excepted; a shared
//   tile's is not, and two warps of each scheduler have one.
inline double expert_gemm_cycles(const ExpertGemmConfig& config, const ExpertGemmSizes& sizes, int multiprocessors) {
  const auto rows = static_cast<double>(sizes.rows), experts = static_cast<double>(sizes.num_experts);
  const double ragged = std::fmin(experts, rows);
  const double row_tiles = rows / kExpertGemmBlockM + ragged / 2 + std::sqrt(ragged / 12);
  const auto column_tiles = static_cast<double>(ceil_div(sizes.columns, config.block_n));
  const double waves = std::ceil(row_tiles * column_tiles / multiprocessors);
  const double shared_memory = config.block_n == 128 ? 1.25 : config.block_n == 192 ? 1.08 : 1.0;
  const auto steps = static_cast<double>(ceil_div(sizes.depth, kExpertGemmBlockK));
  const double products = steps * 4 * config.block_n * shared_memory;
  const double epilogue = config.block_n * (sizes.has_activation ? 20 : 8) / 0.7;
  return expert_gemm_is_cooperative(config.block_n) ? waves * (products + epilogue)
                                                    : waves * std::fmax(products, epilogue / 2) + epilogue;
}

// The tile of the fewest cycles. Pairs share weights where an expert has four row tiles or more on average.
inline ExpertGemmConfig pick_expert_gemm_config(const ExpertGemmSizes& sizes, int multiprocessors) {
  ExpertGemmConfig best{};
  double least = HUGE_VAL;
  for (int block_n : {256, 192, 128}) {
    const ExpertGemmConfig config{block_n, sizes.rows >= 4 * kExpertGemmBlockM * sizes.num_experts ? 2 : 1};
    const double cycles = expert_gemm_cycles(config, sizes, multiprocessors);
    if (cycles < least) {
      least = cycles;
      best = config;
    }
  }
  return best;
}

}  // namespace mbk
