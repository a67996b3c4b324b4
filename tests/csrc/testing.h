// What the host tests share: arrays that end at a page nobody may touch, and checks that say where they failed.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "emulation_memory.h"

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
  explicit Guarded(size_t size)
      : size_(size),
        bytes_((size * sizeof(T) + 15) / 16 * 16),
        data_(static_cast<T*>(emulation::arena().allocate(bytes_))) {
    std::memset(static_cast<void*>(data_), 0xa5, bytes_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { emulation::arena().release(data_, bytes_); }

  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }

 private:
  size_t size_, bytes_;
  T* data_;
};
