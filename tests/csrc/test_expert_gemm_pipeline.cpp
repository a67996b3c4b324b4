// The expert GEMM's protocol, in threads: barriers with the device's parities and counts, TMA and cp.async that land
// late, two consumer groups and clusters of two. A wrong count, phase or order ends in a wrong slice or in no end.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "expert_gemm_scheduler.h"
#include "testing.h"

namespace {

using mbk::ExpertTile;

constexpr int kBlockM = 8, kWarps = 4;

void stray(std::mt19937& random) {
  if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 40));
}

// mbarrier: a phase ends when its arrivals and its bytes are in; bytes may come before they are expected.
class Barrier {
 public:
  void init(int arrivals) { arrivals_ = pending_ = arrivals; }
  void arrive(int bytes = 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    bytes_ += bytes;
    CHECK(pending_ > 0, "more arrivals than a phase has");
    --pending_;
    end_phase_if_complete();
  }
  void complete(int bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    bytes_ -= bytes;
    end_phase_if_complete();
  }
  // True of the phase before this one, too: what makes a wait that is a round too early pass.
  void wait(uint32_t parity) {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool ended = changed_.wait_for(lock, std::chrono::seconds(60), [&] { return (phase_ & 1) != parity; });
    CHECK(ended, "nobody ends this phase");
  }

 private:
  void end_phase_if_complete() {
    if (pending_ != 0 || bytes_ != 0) return;
    pending_ = arrivals_;
    ++phase_;
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrivals_ = 0, pending_ = 0, bytes_ = 0;
  uint32_t phase_ = 0;
};

// bar.arrive and bar.sync of two groups: one of each opens it.
class NamedBarrier {
 public:
  void arrive() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++arrived_;
    CHECK(arrived_ == 1, "two arrivals without a wait between them");
    changed_.notify_all();
  }
  void sync() {
    std::unique_lock<std::mutex> lock(mutex_);
    CHECK(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return arrived_ == 1; }), "nobody arrives");
    arrived_ = 0;
  }
  bool idle() const { return arrived_ == 0; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int arrived_ = 0;
};

// What a slice holds: which rows or columns, and which step of the sum.
struct Slice {
  int expert = -1, position = -1, step = -1;
  bool operator==(const Slice& other) const {
    return expert == other.expert && position == other.position && step == other.step;
  }
};

struct Problem {
  std::vector<int> offsets;
  int rows, tiles_n, steps, clusters;
  bool gather;
  int num_experts() const { return static_cast<int>(offsets.size()) - 1; }
};

template <int kStages>
struct Cta {
  Barrier full[kStages], empty[kStages];
  NamedBarrier turn[2];
  std::mutex memory;  // no more than C++ asks for: the barriers are what is tested
  Slice rows[kStages], weights[kStages][2];
};

template <int kStages, int kCluster>
class Cluster {
 public:
  Cluster(const Problem& problem, int index, std::vector<std::atomic<int>>& written)
      : problem_(problem), index_(index), written_(written) {
    for (auto& cta : ctas_) {
      for (int stage = 0; stage < kStages; ++stage) {
        cta.full[stage].init(problem.gather ? 2 : 1);  // the gathering warps arrive as one here
        cta.empty[stage].init(kWarps * kCluster);
      }
    }
  }

  void run(unsigned seed) {
    std::vector<std::thread> threads;
    for (int rank = 0; rank < kCluster; ++rank) {
      threads.emplace_back([=] { produce(rank, seed + rank); });
      for (int group = 0; group < 2; ++group) {
        threads.emplace_back([=] { consume(rank, group, seed + 10 * rank + group + 100); });
      }
    }
    for (auto& thread : threads) thread.join();
    for (const auto& cta : ctas_) CHECK(cta.turn[0].idle() && cta.turn[1].idle(), "an arrival nobody waited for");
  }

 private:
  using Scheduler = mbk::ExpertTileScheduler<kBlockM, kCluster>;
  Scheduler scheduler(int rank) const {
    return Scheduler(problem_.offsets.data(), problem_.num_experts(), problem_.rows, problem_.tiles_n, rank, index_,
                     problem_.clusters);
  }

  void produce(int rank, unsigned seed) {
    constexpr int kLag = kStages / 2;
    std::mt19937 random(seed);
    Cta<kStages>& mine = ctas_[rank];
    auto tiles = scheduler(rank);
    mbk::PipelineSlot<kStages> slot, written;
    std::vector<std::pair<int, Slice>> copies;  // gathered rows on their way
    const auto land = [&](size_t most) {
      while (copies.size() > most) {
        set(mine, mine.rows[copies.front().first], copies.front().second);
        copies.erase(copies.begin());
      }
    };
    ExpertTile tile{};
    int pending = 0;
    while (tiles.next(tile)) {
      if (tile.expert == problem_.num_experts()) continue;
      for (int step = 0; step < problem_.steps; ++step, ++slot) {
        stray(random);
        mine.empty[slot.stage].wait(slot.phase ^ 1);
        mine.full[slot.stage].arrive(problem_.gather ? 2 : 3);
        const Slice weights{tile.expert, tile.tile_n, step}, rows{tile.expert, tile.row0, step};
        for (int part = 0; part < kCluster; ++part) {
          if (tile.shared_weights && part != rank) continue;
          for (int other = 0; other < kCluster; ++other) {
            if (!tile.shared_weights && other != rank) continue;
            stray(random);
            set(ctas_[other], ctas_[other].weights[slot.stage][part], weights);
            ctas_[other].full[slot.stage].complete(2 / kCluster);
          }
        }
        if (!problem_.gather) {
          set(mine, mine.rows[slot.stage], rows);
          mine.full[slot.stage].complete(1);
          continue;
        }
        copies.emplace_back(slot.stage, rows);
        if (pending == kLag) {
          land(kLag);
          mine.full[written.stage].arrive();
          ++written;
        } else {
          ++pending;
        }
      }
    }
    land(0);
    for (; pending > 0; --pending, ++written) mine.full[written.stage].arrive();
  }

  void consume(int rank, int group, unsigned seed) {
    std::mt19937 random(seed);
    Cta<kStages>& mine = ctas_[rank];
    auto tiles = scheduler(rank);
    mbk::PipelineSlot<kStages> slot;
    ExpertTile tile{}, others{};
    const auto release = [&](int stage) {
      for (int other = 0; other < kCluster; ++other) {
        for (int warp = 0; warp < kWarps; ++warp) ctas_[other].empty[stage].arrive();
      }
    };
    bool more = tiles.next(tile), wait_turn = false;
    if (group == 1 && more) {
      if (tile.expert < problem_.num_experts()) slot.advance(problem_.steps);
      more = tiles.next(tile);
      wait_turn = true;
    }
    while (more) {
      const bool other = tiles.next(others);
      if (wait_turn) mine.turn[group].sync();
      wait_turn = true;
      const bool has_expert = tile.expert < problem_.num_experts();
      int last = -1;
      for (int step = 0; has_expert && step < problem_.steps; ++step, ++slot) {
        stray(random);
        mine.full[slot.stage].wait(slot.phase);
        check_slices(mine, slot.stage, tile, step);
        if (last >= 0) {
          check_slices(mine, last, tile, step - 1);
          release(last);
        }
        last = slot.stage;
      }
      if (other) mine.turn[1 - group].arrive();
      if (has_expert) {
        stray(random);
        check_slices(mine, last, tile, problem_.steps - 1);
        release(last);
      }
      for (int row = tile.row0; row < std::min(tile.row_end, tile.row0 + kBlockM); ++row) {
        ++written_[static_cast<size_t>(row) * problem_.tiles_n + tile.tile_n];
      }
      if (other && others.expert < problem_.num_experts()) slot.advance(problem_.steps);
      more = other && tiles.next(tile);
    }
  }

  static void set(Cta<kStages>& cta, Slice& slice, const Slice& value) {
    std::lock_guard<std::mutex> lock(cta.memory);
    slice = value;
  }

  static void check_slices(Cta<kStages>& cta, int stage, const ExpertTile& tile, int step) {
    std::lock_guard<std::mutex> lock(cta.memory);
    CHECK((cta.rows[stage] == Slice{tile.expert, tile.row0, step}), "step %d of the tile at row %d has other rows",
          step, tile.row0);
    for (int part = 0; part < kCluster; ++part) {
      CHECK((cta.weights[stage][part] == Slice{tile.expert, tile.tile_n, step}),
            "step %d of the tile at row %d has other weights", step, tile.row0);
    }
  }

  const Problem& problem_;
  int index_;
  std::vector<std::atomic<int>>& written_;
  Cta<kStages> ctas_[kCluster];
};

template <int kStages, int kCluster>
void check(const Problem& problem, unsigned seed) {
  std::vector<std::atomic<int>> written(static_cast<size_t>(problem.rows) * problem.tiles_n);
  for (int index = 0; index < problem.clusters; ++index) {
    Cluster<kStages, kCluster>(problem, index, written).run(seed + 1000u * static_cast<unsigned>(index));
  }
  for (const auto& count : written) CHECK(count == 1, "a tile's row was written %d times", count.load());
}

}  // namespace

int main() {
  std::mt19937 random(7);
  for (int round = 0; round < 60; ++round) {
    Problem problem;
    problem.offsets.assign(1, 0);
    const int experts = 1 + static_cast<int>(random() % 5);
    for (int e = 0; e < experts; ++e) {
      problem.offsets.push_back(problem.offsets.back() + static_cast<int>(random() % 3 == 0 ? 0 : random() % 60));
    }
    problem.rows = problem.offsets.back() + static_cast<int>(random() % 30);
    problem.tiles_n = 1 + static_cast<int>(random() % 4);
    problem.steps = 1 + static_cast<int>(random() % 14);
    problem.clusters = 1 + static_cast<int>(random() % 3);
    for (bool gather : {false, true}) {
      problem.gather = gather;
      check<6, 1>(problem, static_cast<unsigned>(round));
      check<6, 2>(problem, static_cast<unsigned>(round));
      check<5, 1>(problem, static_cast<unsigned>(round));
      check<5, 2>(problem, static_cast<unsigned>(round));
    }
  }
  return 0;
}
