// Global memory that blocks see differently: stores wait in a buffer, loads may find what was there before.
//
// Arrays that kernels share come from `arena()`. While a block runs, the arena holds what that block sees; `View` keeps
// the difference between this and what all see:
// - `pending`: what the block has stored and nobody else sees yet. It leaves at a fence (what the fencing thread stored,
//   and what others of its block stored before the last barrier), at the end of the grid, or by chance before.
// - `stale`: what others have stored since the block's last fence and it does not see yet, in blocks that keep old
//   values. A fence drops it; so does, now and then, a volatile load of that address.
// Atomics and volatile stores are seen by all at once, and in no order with plain stores.
// Stores are seen where the compiler instruments them (-fsanitize=thread, see emulation_hooks.h); without that, or with
// seed 0, memory is what it is on the host.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <vector>

namespace emulation {

struct View;

constexpr size_t kArenaBytes = size_t{1} << 38;
inline uintptr_t arena_begin = 0;
inline View* running_view = nullptr;  // of the block whose threads run

// Whether the running block's accesses of this address go through its view.
__attribute__((no_sanitize("thread"))) inline bool is_shared_by_blocks(const void* address) {
  return running_view != nullptr && reinterpret_cast<uintptr_t>(address) - arena_begin < kArenaBytes;
}

// Addresses for arrays of kernels, never given out twice. Each array ends at a page that nobody may touch.
class Arena {
 public:
  Arena() {
    void* memory = mmap(nullptr, kArenaBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    arena_begin = next_ = reinterpret_cast<uintptr_t>(memory);
  }

  void* allocate(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t mapped = (bytes + page - 1) / page * page;
    auto* memory = reinterpret_cast<char*>(next_);
    if (next_ + mapped + page > arena_begin + kArenaBytes || mprotect(memory, mapped, PROT_READ | PROT_WRITE) != 0) std::abort();
    next_ += mapped + page;
    return memory + (mapped - bytes);
  }

  void release(void* data, size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t mapped = (bytes + page - 1) / page * page;
    mmap(static_cast<char*>(data) + bytes - mapped, mapped, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  }

 private:
  uintptr_t next_ = 0;
};

inline Arena& arena() {
  static Arena value;
  return value;
}

// Some of the four bytes at an address.
struct Cell {
  unsigned char bytes[4];
  unsigned mask = 0;
  unsigned thread = 0;  // that stored last, and how many barriers of its block came before
  uint64_t epoch = 0;
};

using Cells = std::unordered_map<uintptr_t, Cell>;

// Calls f(cell's address, mask) for the cells of an access.
template <typename F>
void for_each_cell(const void* address, size_t size, F&& f) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t at = first & ~uintptr_t{3}; at < first + size; at += 4) {
    unsigned mask = 0;
    for (unsigned i = 0; i < 4; ++i) {
      if (at + i >= first && at + i < first + size) mask |= 1u << i;
    }
    f(at, mask);
  }
}

// Not a store of the kernel's.
__attribute__((no_sanitize("thread"))) inline void exchange(uintptr_t at, Cell& cell, unsigned mask) {
  auto* memory = reinterpret_cast<unsigned char*>(at);
  for (unsigned i = 0; i < 4; ++i) {
    if (((mask >> i) & 1) == 0) continue;
    const unsigned char byte = memory[i];
    memory[i] = cell.bytes[i];
    cell.bytes[i] = byte;
  }
}

// While its block runs, cells hold what the others see; else what the block sees.
struct View {
  Cells pending, stale;
  bool keeps_old_values = false;
};

class Memory {
 public:
  void add(View* view) { views_.push_back(view); }
  void remove(View* view) { views_.erase(std::find(views_.begin(), views_.end(), view)); }

  void enter(View* view) {
    running_view = view;
    swap(*view);
  }

  void leave() {
    swap(*running_view);
    running_view = nullptr;
  }

  // Before a plain store of the running block.
  void store(const void* address, size_t size, unsigned thread, uint64_t epoch) {
    for_each_cell(address, size, [&](uintptr_t at, unsigned mask) {
      drop_stale(at, mask);
      Cell& cell = running_view->pending[at];
      const unsigned added = mask & ~cell.mask;
      for (unsigned i = 0; i < 4; ++i) {
        if ((added >> i) & 1) cell.bytes[i] = reinterpret_cast<const unsigned char*>(at)[i];
      }
      cell.mask |= mask;
      cell.thread = thread;
      cell.epoch = epoch;
    });
  }

  // Makes what is pending at these addresses seen by all, and what others stored there seen by the running block.
  void settle(const void* address, size_t size) {
    for_each_cell(address, size, [&](uintptr_t at, unsigned mask) {
      drop_stale(at, mask);
      const auto found = running_view->pending.find(at);
      if (found == running_view->pending.end()) return;
      publish(at, found->second);
      running_view->pending.erase(found);
    });
  }

  // Before a store that all see at once: who keeps old values keeps this one. After `settle`.
  void replace(const void* address, size_t size) {
    for_each_cell(address, size, [&](uintptr_t at, unsigned mask) {
      Cell old;
      std::memcpy(old.bytes, reinterpret_cast<const void*>(at), 4);
      old.mask = mask;
      publish(at, old);
    });
  }

  // Before a volatile load that sees what is there now.
  void refresh(const void* address, size_t size) {
    for_each_cell(address, size, [&](uintptr_t at, unsigned mask) { drop_stale(at, mask); });
  }

  void fence(unsigned thread, uint64_t epoch) {
    publish_if([&](const Cell& cell) { return cell.thread == thread || cell.epoch < epoch; });
    for (auto& [at, cell] : running_view->stale) exchange(at, cell, cell.mask);
    running_view->stale.clear();
  }

  template <typename Predicate>
  void publish_if(Predicate&& predicate) {
    for (auto at = running_view->pending.begin(); at != running_view->pending.end();) {
      if (predicate(at->second)) {
        publish(at->first, at->second);
        at = running_view->pending.erase(at);
      } else {
        ++at;
      }
    }
  }

 private:
  static void swap(View& view) {
    for (auto* cells : {&view.pending, &view.stale}) {
      for (auto& [at, cell] : *cells) exchange(at, cell, cell.mask);
    }
  }

  void drop_stale(uintptr_t at, unsigned mask) {
    const auto found = running_view->stale.find(at);
    if (found == running_view->stale.end()) return;
    exchange(at, found->second, found->second.mask & mask);
    found->second.mask &= ~mask;
    if (found->second.mask == 0) running_view->stale.erase(found);
  }

  // The arena's bytes replace `old`, for all who do not keep the old ones.
  void publish(uintptr_t at, const Cell& old) {
    for (View* view : views_) {
      if (view == running_view || !view->keeps_old_values) continue;
      const auto mine = view->pending.find(at);
      unsigned mask = old.mask & ~(mine == view->pending.end() ? 0 : mine->second.mask);
      const auto kept = view->stale.find(at);
      if (kept != view->stale.end()) mask &= ~kept->second.mask;
      if (mask == 0) continue;
      Cell& cell = view->stale[at];
      for (unsigned i = 0; i < 4; ++i) {
        if ((mask >> i) & 1) cell.bytes[i] = old.bytes[i];
      }
      cell.mask |= mask;
    }
  }

  std::vector<View*> views_;
};

inline Memory& memory() {
  static Memory value;
  return value;
}

}  // namespace emulation
