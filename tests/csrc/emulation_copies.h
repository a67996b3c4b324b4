// cp.async: 16 bytes from global to shared memory that arrive when they are issued, some sweeps later, or when the
// thread waits for their group.
#pragma once

#include <unordered_map>

#include "emulation.h"

namespace emulation {

struct Copy {
  Block* block;
  void* target;
  const void* source;
  int bytes;  // the rest of 16 is zeros
  bool arrived = false;
};

// Copies of one thread, by group; the last group is open.
using CopyGroups = std::vector<std::vector<std::shared_ptr<Copy>>>;

struct Copies {
  uint64_t block = 0;  // its number: a fiber serves one thread after another
  CopyGroups groups = CopyGroups(1);
  std::vector<std::shared_ptr<Copy>> written;  // arrived, and not yet seen by the async proxy
};

inline Copies& copies_of_thread() {
  static std::unordered_map<const Fiber*, Copies> all;
  Copies& mine = all[&Machine::instance().current()];
  const uint64_t block = Machine::instance().block().number;
  if (mine.block != block) mine = Copies{block, CopyGroups(1), {}};
  return mine;
}

inline void make_copy(Copy& copy) {
  if (copy.arrived) return;
  copy.arrived = true;
  --copy.block->copies_in_flight;
  std::memset(copy.target, 0, 16);
  if (copy.bytes > 0) std::memcpy(copy.target, copy.source, static_cast<size_t>(copy.bytes));
}

inline void copy_async(void* shared, const void* global, int bytes) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(shared) % 16 == 0 && (bytes == 0 || reinterpret_cast<uintptr_t>(global) % 16 == 0);
  if (!aligned || bytes < 0 || bytes > 16) fail("an asynchronous copy that is not 16 aligned bytes");
  Machine& machine = Machine::instance();
  if (!machine.block().owns(shared)) fail("an asynchronous copy to what is not this block's shared memory");
  auto copy = std::make_shared<Copy>(Copy{&machine.block(), shared, global, bytes});
  ++machine.block().copies_in_flight;
  copies_of_thread().groups.back().push_back(copy);
  if (machine.draw(4) == 0) machine.later(20, [copy] { make_copy(*copy); });
}

inline void commit_copies() { copies_of_thread().groups.emplace_back(); }

// Until at most `pending` of the newest committed groups are on their way.
inline void wait_for_copies(size_t pending) {
  Copies& mine = copies_of_thread();
  const size_t committed = mine.groups.size() - 1;
  const size_t done = committed > pending ? committed - pending : 0;
  for (size_t i = 0; i < done; ++i) {
    for (auto& copy : mine.groups[i]) {
      make_copy(*copy);
      mine.written.push_back(std::move(copy));
    }
  }
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace emulation
