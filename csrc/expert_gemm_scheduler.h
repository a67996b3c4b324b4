// Which tile each CTA of the expert GEMM computes next, and where it is in its pipeline: pure functions of `offsets`
// and of sizes, for the device and for host tests.
//
// Rows of expert e are offsets[e]:offsets[e + 1]; rows offsets[E]:rows have no expert and count as expert E. A work
// item is what one cluster does at a time. A cluster of two takes two adjacent row tiles of one expert and the same
// columns, so both need the same weights; an expert's odd last row tile is an item of two adjacent column tiles
// instead, each CTA with weights of its own. Items with the same rows are neighbours: the rows are read from HBM once,
// the weights of few experts stay in the L2. No item crosses an expert.
#pragma once

#include "common.h"

namespace mbk {

struct ExpertTile {
  int expert;           // E: rows without an expert, whose results are zeros
  int row0, row_end;    // rows row0:min(row0 + kBlockM, row_end); none for a CTA that only keeps its pair company
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

// Columns of a tile and CTAs of a cluster; one of those that csrc/expert_gemm.cuh is compiled for.
struct ExpertGemmConfig {
  int block_n, cluster;
};

// The most items there can be, whatever the routing.
inline int64_t max_expert_gemm_items(const ExpertGemmConfig& config, int64_t rows, int64_t num_experts,
                                     int64_t columns) {
  const int64_t row_tiles = rows / kExpertGemmBlockM + num_experts + 1;
  return ceil_div(row_tiles * ceil_div(columns, config.block_n) + num_experts + 1, config.cluster);
}

// By an estimate: the waves that ragged groups are expected to need, where every expert's last tile is half full,
// times a tile's width. Pairs share weights where an expert has four row tiles or more on average.
inline ExpertGemmConfig pick_expert_gemm_config(int64_t rows, int64_t num_experts, int64_t columns,
                                                int multiprocessors) {
  const int64_t half_tiles = 2 * (rows / kExpertGemmBlockM) + (num_experts < rows ? num_experts : rows);
  ExpertGemmConfig best{128, rows >= 4 * kExpertGemmBlockM * num_experts ? 2 : 1};
  int64_t least = INT64_MAX;
  for (int block_n : {192, 128}) {
    const int64_t waves = ceil_div(ceil_div(half_tiles, 2) * ceil_div(columns, block_n), multiprocessors);
    if (waves * block_n < least) {
      least = waves * block_n;
      best.block_n = block_n;
    }
  }
  return best;
}

}  // namespace mbk
