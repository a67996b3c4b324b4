// Work for torch's threads, and memory that each of them keeps.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace mbk {

// The OpenMP threads that torch has loaded: threads of our own would compete with those, which wait busily.
using Body = void (*)(void*);
using GompParallel = void (*)(Body, void*, unsigned, unsigned);

template <typename Work>
void parallel(int threads, int count, const Work& work) {
  static const auto start = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  struct Shared {
    const Work& work;
    std::atomic<int> next;
    int count;
  } shared{work, {0}, count};
  const Body body = [](void* data) {
    auto& own = *static_cast<Shared*>(data);
    for (int i = own.next++; i < own.count; i = own.next++) own.work(i);
  };
  threads = std::min(threads, count);
  if (threads < 2 || start == nullptr) return body(&shared);
  start(body, &shared, threads, 0);
}

// Memory that a thread keeps: what is given back costs a fault of each page when it is asked for again.
inline char* scratch(int64_t bytes) {
  static thread_local std::unique_ptr<char[]> memory;
  static thread_local int64_t size = 0;
  if (size < bytes + 64) {
    memory.reset();
    memory.reset(new char[bytes + 64]);
    size = bytes + 64;
  }
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
}

}  // namespace mbk
