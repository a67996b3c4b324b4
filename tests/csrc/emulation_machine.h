// Grids of blocks of threads on one host thread. Every CUDA thread is a fiber.
//
// Several blocks are in flight at once; which blocks start first, which run, and in which order a block's warps and
// lanes run is drawn from `options().seed`, so that a missing barrier or a wait for a block that cannot start shows as a
// wrong result or as a deadlock, which ends the program with a message. Now and then, when a thread has told other
// blocks something, other warps of its block stand still: what they had yet to do is late.
// Copies that a thread leaves to the hardware are `events` of its block, which happen at a later sweep, drawn as well.
#pragma once

#include <deque>
#include <numeric>
#include <random>

#include "emulation_grid.h"

namespace emulation {

// Rounds without progress before it is a deadlock, where threads look at memory again and again; where all threads wait
// for barriers and no copy is on its way, a round counts as many.
constexpr int kPatience = 20000, kRoundsOfWaiting = 100;

class Machine {
 public:
  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  Fiber& current() { return *current_; }
  Block& block() { return *current_->block; }
  bool ordered() const { return options().seed == 0; }  // nothing is late, nobody overtakes
  uint64_t draw(uint64_t below) { return ordered() ? 0 : random_() % below; }

  // Lets others run until *generation differs from `seen`; with nullptr, once.
  void wait(const uint64_t* generation, uint64_t seen) {
    current_->waiting_for = generation;
    current_->seen = seen;
    if (generation != nullptr) progress_ = true;
    if (_setjmp(current_->state) == 0) _longjmp(scheduler_, 1);
  }

  // Now and then the running thread's block stands still, for so long that others can do much of their work.
  void stand_still_sometimes() {
    if (draw(8) != 1) return;
    block().late_warps = ~0u;
    block().late_sweeps = 1 + static_cast<unsigned>(draw(200));
    progress_ = true;
    wait(nullptr, 0);
  }

  // Now and then the running thread's warp does, for so long that others finish a tile.
  void warp_stands_still_sometimes() {
    if (draw(256) != 1) return;
    block().late_warps = 1u << (thread_index() / kLanes);
    block().late_sweeps = 1 + static_cast<unsigned>(draw(2000));
    progress_ = true;
    wait(nullptr, 0);
  }

  // One of `expected` arrives at a meeting and, unless it only `tells`, waits for the others.
  void arrive(Meeting& meeting, unsigned expected, unsigned count = 1, bool tells = false) {
    const uint64_t generation = meeting.generation;
    meeting.arrived += count;
    progress_ = true;
    if (meeting.arrived > expected) fail("more threads arrive at a barrier than it is for");
    if (meeting.arrived == expected) {
      meeting.arrived = 0;
      ++meeting.generation;
    } else if (!tells) {
      wait(&meeting.generation, generation);
    }
  }

  void launch(Grid grid) {
    if (!grid.beside_previous) run();
    grid.left = grid.blocks();
    grid.waiting.resize(grid.left / grid.cluster);
    std::iota(grid.waiting.begin(), grid.waiting.end(), 0u);
    grid.previous = grids_.empty() ? nullptr : &grids_.back();
    grids_.push_back(std::move(grid));
  }

  // Until all launched grids have ended.
  void run() {
    if (grids_.empty()) return;
    random_.seed(options().seed);
    for (Grid& grid : grids_) {
      if (!ordered()) std::shuffle(grid.waiting.begin(), grid.waiting.end(), random_);
    }
    for (int patience = kPatience; grids_.back().ended == 0;) {
      progress_ = ran_ = left_out_ = false;
      for (Grid& grid : grids_) start_what_may(grid);
      for (auto& block : blocks_) {
        if (blocks_.size() > 1 && draw(4) == 1) {  // it stands still for a while, as on a busy machine
          left_out_ = true;
        } else {
          sweep(*block);
        }
      }
      retire();
      if (progress_) patience = kPatience;
      if (!progress_ && !left_out_) patience -= ran_ ? 1 : kPatience / kRoundsOfWaiting;
      if (patience <= 0) fail("deadlock");
    }
    grids_.clear();
  }

  // Something that the hardware does for the running thread's block, now or up to `most` sweeps later.
  void later(uint64_t most, std::function<void()> happen) {
    const uint64_t delay = draw(4) == 1 ? 0 : draw(most);
    if (delay == 0) return happen();
    block().events.push_back({block().sweeps + delay, std::move(happen)});
  }

  // A thread has written where other blocks may look.
  void tell(const void* address) {
    Block& mine = block();
    if (mine.owns(address) || ordered() || mine.late_sweeps > 0 || draw(4) != 0) return;
    const unsigned some = draw(2) == 0 ? ~0u : 1u << draw(kLanes);
    mine.late_warps = some & ~(1u << (thread_index() / kLanes));
    mine.late_sweeps = 200;
  }

  void plain_store(const void* address, size_t size) {
    if (!ordered()) memory().store(address, size, thread_index(), block().barrier.generation);
  }

  void fence() { memory().fence(thread_index(), block().barrier.generation); }

  void allow_next() {
    if (block().allows_next) return;
    block().allows_next = true;
    ++block().grid->allowing;
    stand_still_sometimes();
  }

 private:
  static void enter() { instance().loop(); }

  // A fiber serves one thread after another: making a context costs system calls.
  void loop() {
    for (;;) {
      current_->block->grid->body();
      Fiber& fiber = *current_;
      Block& block = *fiber.block;
      fiber.done = true;
      --block.live_threads;
      --block.cluster->live_threads;
      finish(block.barrier, block.live_threads);
      finish(block.cluster->barrier, block.cluster->live_threads);
      progress_ = true;
      if (_setjmp(fiber.state) == 0) _longjmp(scheduler_, 1);
    }
  }

  // Threads that have ended are not waited for.
  static void finish(Meeting& meeting, unsigned expected) {
    if (meeting.arrived == 0 || meeting.arrived < expected) return;
    meeting.arrived = 0;
    ++meeting.generation;
  }

  void start_what_may(Grid& grid) {
    const Grid* previous = grid.previous;
    if (grid.waiting.empty()) return;
    if (previous != nullptr && previous->ended == 0 &&
        !(grid.beside_previous && previous->allowing == previous->blocks())) {
      return;
    }
    const auto mine = std::count_if(blocks_.begin(), blocks_.end(), [&](auto& block) { return block->grid == &grid; });
    for (auto in_flight = static_cast<unsigned>(mine);
         !grid.waiting.empty() && in_flight < options().resident_blocks * grid.cluster; in_flight += grid.cluster) {
      const unsigned first = grid.waiting.back() * grid.cluster;
      grid.waiting.pop_back();
      auto cluster = std::make_shared<Cluster>();
      for (unsigned rank = 0; rank < grid.cluster; ++rank) {
        blocks_.push_back(start(grid, first + rank));
        Block& block = *blocks_.back();
        block.cluster = cluster;
        block.rank = rank;
        cluster->blocks.push_back(&block);
        cluster->live_threads += block.live_threads;
      }
      progress_ = true;
    }
  }

  std::unique_ptr<Block> start(Grid& grid, unsigned index) {
    auto block = std::make_unique<Block>();
    const unsigned threads = grid.block.x * grid.block.y * grid.block.z;
    block->grid = &grid;
    block->number = ++started_;
    block->index = dim3(index % grid.size.x, index / grid.size.x % grid.size.y, index / grid.size.x / grid.size.y);
    block->live_threads = threads;
    block->memory.assign(grid.shared_bytes + 1024, 0xa5);
    const auto address = reinterpret_cast<uintptr_t>(block->memory.data());
    block->shared = block->memory.data() + (1024 - address % 1024);
    const unsigned warps = (threads + kLanes - 1) / kLanes;
    block->meetings.resize(warps * kLanes);
    std::vector<unsigned> order(warps);
    std::iota(order.begin(), order.end(), 0u);
    if (!ordered()) std::shuffle(order.begin(), order.end(), random_);
    for (unsigned warp : order) {
      const bool backwards = draw(2) == 1;
      for (unsigned i = 0; i < kLanes; ++i) {
        const unsigned thread = warp * kLanes + (backwards ? kLanes - 1 - i : i);
        if (thread < threads) block->order.push_back(thread);
      }
    }
    for (unsigned i = 0; i < threads; ++i) {
      if (idle_.empty()) idle_.push_back(std::make_unique<Fiber>());
      block->fibers.push_back(std::move(idle_.back()));
      idle_.pop_back();
      Fiber& fiber = *block->fibers.back();
      fiber.block = block.get();
      fiber.thread = {i % grid.block.x, i / grid.block.x % grid.block.y, i / grid.block.x / grid.block.y};
      fiber.waiting_for = nullptr;
      fiber.done = false;
    }
    block->view = std::make_unique<View>();
    block->view->keeps_old_values = draw(2) == 1;
    memory().add(block->view.get());
    return block;
  }

  void sweep(Block& block) {
    blockIdx = {block.index.x, block.index.y, block.index.z};
    blockDim = block.grid->block;
    gridDim = block.grid->size;
    memory().enter(block.view.get());
    if (!ordered() && block.sweeps % 32 == 0) block.slow_warps = static_cast<unsigned>(random_() & random_());
    ++block.sweeps;
    let_happen(block);
    if (block.late_sweeps > 0) {
      --block.late_sweeps;
      progress_ = true;
    }
    volatile bool ran = false;  // set between _setjmp and _longjmp
    for (unsigned thread : block.order) {
      Fiber& fiber = *block.fibers[thread];
      const unsigned still = block.slow_warps | (block.late_sweeps > 0 ? block.late_warps : 0);
      if ((still >> (thread / kLanes)) & 1) continue;
      if (fiber.done || (fiber.waiting_for != nullptr && *fiber.waiting_for == fiber.seen)) continue;
      if (fiber.waiting_for != nullptr) progress_ = true;
      current_ = &fiber;
      threadIdx = fiber.thread;
      ran = true;
      if (_setjmp(scheduler_) == 0) resume(fiber);
    }
    ran_ = ran_ || ran;
    if (!ran && block.slow_warps != 0) {
      block.slow_warps = 0;
      left_out_ = true;
    }
    if (draw(16) == 1) memory().publish_if([&](const Cell&) { return draw(2) == 1; });
    memory().leave();
  }

  void let_happen(Block& block) {
    if (block.events.empty()) return;
    progress_ = true;
    std::vector<Event> due;
    const auto later = std::stable_partition(block.events.begin(), block.events.end(),
                                             [&](const Event& event) { return event.due > block.sweeps; });
    std::move(later, block.events.end(), std::back_inserter(due));
    block.events.erase(later, block.events.end());
    if (!ordered()) std::shuffle(due.begin(), due.end(), random_);
    for (Event& event : due) event.happen();
  }

  void retire() {
    for (size_t i = 0; i < blocks_.size();) {
      Block& block = *blocks_[i];
      if (block.cluster->live_threads > 0) {
        ++i;
        continue;
      }
      blockIdx = {block.index.x, block.index.y, block.index.z};
      if (block.copies_in_flight > 0) fail("a block has ended with copies on their way");
      Grid& grid = *block.grid;
      if (!block.allows_next) ++grid.allowing;
      memory().remove(block.view.get());
      grid.views_of_ended.push_back(std::move(block.view));
      for (auto& fiber : block.fibers) idle_.push_back(std::move(fiber));
      blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
      progress_ = true;
      if (--grid.left == 0) end(grid);
    }
  }

  static void end(Grid& grid) {
    for (auto& view : grid.views_of_ended) {
      memory().enter(view.get());
      memory().fence(0, ~uint64_t{0});
      memory().leave();
    }
    if (grid.previous != nullptr && grid.previous->ended == 0) {
      fail("a grid ends before the one that it was started beside: the next one would not wait for both");
    }
    grid.ended = 1;
  }

  void resume(Fiber& fiber) {
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    setcontext(&fiber.context);
  }

  std::deque<Grid> grids_;
  std::vector<std::unique_ptr<Block>> blocks_;
  Fibers idle_;
  uint64_t started_ = 0;
  std::mt19937_64 random_;
  jmp_buf scheduler_;
  Fiber* current_ = nullptr;
  bool progress_ = false, ran_ = false, left_out_ = false;  // in this round
};

}  // namespace emulation
