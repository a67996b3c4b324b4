// What the host tests share: arrays that end at a page nobody may touch, and checks that say where they failed.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#define CHECK(condition, ...)                                                \
  do {                                                                       \
    if (!(condition)) {                                                      \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);   \
      std::fprintf(stderr, __VA_ARGS__);                                     \
      std::fprintf(stderr, "\n");                                            \
      std::exit(1);                                                          \
    }                                                                        \
  } while (false)

// Reads and writes past its end are faults, not luck. Filled with a byte that is no plausible result.
template <typename T>
class Guarded {
 public:
  explicit Guarded(size_t size) : size_(size) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = (size * sizeof(T) + 15) / 16 * 16;
    mapped_ = (bytes + page - 1) / page * page + page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED, "mmap of %zu bytes", mapped_);
    memory_ = static_cast<char*>(memory);
    CHECK(mprotect(memory_ + mapped_ - page, page, PROT_NONE) == 0, "mprotect");
    data_ = reinterpret_cast<T*>(memory_ + mapped_ - page - bytes);
    std::memset(static_cast<void*>(data_), 0xa5, bytes);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, mapped_); }

  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }

 private:
  size_t size_;
  size_t mapped_ = 0;
  char* memory_ = nullptr;
  T* data_ = nullptr;
};
