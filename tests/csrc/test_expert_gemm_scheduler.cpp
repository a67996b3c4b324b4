// The expert GEMM's tiles against plain enumeration: every element of the output once, clusters in step.
#include <algorithm>
#include <random>
#include <vector>

#include "expert_gemm_scheduler.h"
#include "testing.h"

namespace {

using mbk::ExpertTile;

struct Problem {
  std::vector<int> offsets;  // (E + 1,)
  int rows, tiles_n;
  int num_experts() const { return static_cast<int>(offsets.size()) - 1; }
};

template <int kBlockM, int kCluster>
std::vector<ExpertTile> walk(const Problem& problem, int rank, int first_item, int stride) {
  mbk::ExpertTileScheduler<kBlockM, kCluster> scheduler(problem.offsets.data(), problem.num_experts(), problem.rows,
                                                        problem.tiles_n, rank, first_item, stride);
  std::vector<ExpertTile> tiles;
  ExpertTile tile;
  while (scheduler.next(tile)) tiles.push_back(tile);
  CHECK(!scheduler.next(tile), "a scheduler that has ended went on");
  return tiles;
}

// The clusters' walks, put together in the order of items.
template <int kBlockM, int kCluster>
std::vector<ExpertTile> all_items(const Problem& problem, int rank, int clusters) {
  std::vector<std::vector<ExpertTile>> walks;
  size_t longest = 0;
  for (int cluster = 0; cluster < clusters; ++cluster) {
    walks.push_back(walk<kBlockM, kCluster>(problem, rank, cluster, clusters));
    longest = std::max(longest, walks.back().size());
  }
  std::vector<ExpertTile> items;
  for (size_t turn = 0; turn < longest; ++turn) {
    for (const auto& tiles : walks) {
      if (turn < tiles.size()) items.push_back(tiles[turn]);
    }
  }
  return items;
}

template <int kBlockM, int kCluster>
void check(const Problem& problem, int clusters) {
  const int experts = problem.num_experts();
  std::vector<std::vector<ExpertTile>> items;
  for (int rank = 0; rank < kCluster; ++rank) {
    items.push_back(all_items<kBlockM, kCluster>(problem, rank, clusters));
    CHECK(items[rank].size() == items[0].size(), "CTAs of a cluster have %zu and %zu items", items[0].size(),
          items[rank].size());
  }

  std::vector<int> written(static_cast<size_t>(problem.rows) * problem.tiles_n);
  for (size_t i = 0; i < items[0].size(); ++i) {
    for (int rank = 0; rank < kCluster; ++rank) {
      const ExpertTile& tile = items[rank][i];
      CHECK(tile.expert == items[0][i].expert, "item %zu: CTAs of a cluster are out of step", i);
      CHECK(tile.shared_weights == items[0][i].shared_weights, "item %zu: shared by one CTA only", i);
      CHECK(tile.tile_n >= 0 && tile.tile_n < problem.tiles_n, "item %zu: tile_n %d", i, tile.tile_n);
      CHECK(tile.expert >= 0 && tile.expert <= experts, "item %zu: expert %d", i, tile.expert);
      const int begin = problem.offsets[tile.expert];
      const int end = tile.expert == experts ? problem.rows : problem.offsets[tile.expert + 1];
      CHECK(tile.row0 >= begin && tile.row0 < end && (tile.row0 - begin) % kBlockM == 0, "item %zu: row0 %d", i,
            tile.row0);
      CHECK(tile.row_end == end || (kCluster == 2 && rank == 1 && tile.row_end == tile.row0 && !tile.shared_weights),
            "item %zu: rows %d:%d", i, tile.row0, tile.row_end);
      for (int row = tile.row0; row < std::min(tile.row_end, tile.row0 + kBlockM); ++row) {
        ++written[static_cast<size_t>(row) * problem.tiles_n + tile.tile_n];
      }
    }
    if (items[0][i].shared_weights) {
      CHECK(kCluster == 2, "item %zu: shared without a pair", i);
      CHECK(items[1][i].tile_n == items[0][i].tile_n, "item %zu: a pair with two weights", i);
      CHECK(items[1][i].row0 == items[0][i].row0 + kBlockM, "item %zu: a pair of rows apart", i);
    } else if (kCluster == 2) {
      CHECK(items[0][i].row0 + kBlockM >= items[0][i].row_end, "item %zu: alone, and not an expert's last rows", i);
    }
    CHECK(i == 0 || items[0][i].row0 >= items[0][i - 1].row0, "item %zu goes back to earlier rows", i);
  }
  for (size_t i = 0; i < written.size(); ++i) {
    CHECK(written[i] == 1, "tile column %zu of row %zu written %d times", i % problem.tiles_n, i / problem.tiles_n,
          written[i]);
  }
  if (kBlockM == mbk::kExpertGemmBlockM) {
    const int64_t columns = int64_t{problem.tiles_n} * 128;
    const int64_t most = mbk::max_expert_gemm_items({128, kCluster}, {problem.rows, experts, columns, 64, false});
    CHECK(static_cast<int64_t>(items[0].size()) <= most, "%zu items, at most %lld expected", items[0].size(),
          static_cast<long long>(most));
  }
}

Problem random_problem(std::mt19937& random, int block) {
  const auto below = [&](int count) { return static_cast<int>(random() % static_cast<unsigned>(count)); };
  Problem problem;
  problem.offsets.assign(1, 0);
  const int experts = 1 + below(below(4) == 0 ? 70 : 6);
  for (int e = 0; e < experts; ++e) {
    int rows = below(3) == 0 ? 0 : below(6 * block);
    if (below(4) == 0) rows = rows / block * block;
    problem.offsets.push_back(problem.offsets.back() + rows);
  }
  problem.rows = problem.offsets.back() + (below(2) == 0 ? 0 : below(4 * block));
  problem.tiles_n = 1 + below(7);
  return problem;
}

void check_all(const Problem& problem, int clusters) {
  check<128, 1>(problem, clusters);
  check<128, 2>(problem, clusters);
}

template <int kStages>
void check_slots() {
  for (int skipped = 0; skipped < 5 * kStages; ++skipped) {
    for (int before = 0; before < 3 * kStages; ++before) {
      mbk::PipelineSlot<kStages> one_by_one, at_once;
      for (int i = 0; i < before; ++i) ++one_by_one;
      at_once.advance(before);
      for (int i = 0; i < skipped; ++i) ++one_by_one;
      at_once.advance(skipped);
      CHECK(one_by_one.stage == at_once.stage && one_by_one.phase == at_once.phase, "%d and %d steps of %d stages",
            before, skipped, kStages);
      CHECK(one_by_one.phase == static_cast<uint32_t>((before + skipped) / kStages % 2), "phase after %d steps",
            before + skipped);
    }
  }
}

void check_configs() {
  const auto pick = [](int64_t rows, int64_t experts, int64_t columns, int64_t depth, bool activation) {
    return mbk::pick_expert_gemm_config({rows, experts, columns, depth, activation}, 132);
  };
  for (int64_t rows : {1, 100, 1024, 4096, 16384, 65536, 1 << 24}) {
    for (int64_t experts : {1, 4, 64, 1024}) {
      for (int64_t columns : {8, 128, 768, 3072}) {
        for (int multiprocessors : {1, 78, 132}) {
          const auto config =
              mbk::pick_expert_gemm_config({rows, experts, columns, 768, columns == 128}, multiprocessors);
          CHECK(config.block_n == 128 || config.block_n == 192 || config.block_n == 256, "block_n %d", config.block_n);
          CHECK(config.cluster == 1 || config.cluster == 2, "cluster %d", config.cluster);
        }
      }
    }
  }
  CHECK(pick(128, 1, 128, 768, true).block_n == 128, "more than 128 columns for 128");
  CHECK(pick(256, 64, 768, 768, true).cluster == 1, "pairs of experts with one row tile");
  CHECK(pick(65536, 4, 768, 768, true).cluster == 2, "no pairs of 128 row tiles");
  CHECK(pick(4096, 4, 768, 768, false).block_n == 256, "two waves where one is enough");
  CHECK(pick(65536, 8, 1024, 64, true).block_n != 256, "an epilogue that nothing hides");
}

}  // namespace

int main() {
  std::mt19937 random(4);
  for (int round = 0; round < 3000; ++round) {
    const Problem problem = random_problem(random, 8);
    check<8, 1>(problem, 1 + static_cast<int>(random() % 40));
    check<8, 2>(problem, 1 + static_cast<int>(random() % 40));
  }
  for (int round = 0; round < 100; ++round) {
    check_all(random_problem(random, 128), 1 + static_cast<int>(random() % 140));
  }
  check_all({{0, 0}, 1, 1}, 132);
  check_all({{0, 0, 0}, 300, 3}, 2);
  check_all({{0, 1, 1, 2}, 2, 5}, 66);
  check_all({{0, 128, 256, 384}, 384, 6}, 66);
  check_all({{0, 129, 385, 386}, 500, 4}, 7);
  check_all({{0, 100000}, 100000, 2}, 66);
  check_slots<4>();
  check_slots<5>();
  check_slots<6>();
  check_configs();
  return 0;
}
