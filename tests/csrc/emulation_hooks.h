// What gcc and clang call before each store under -fsanitize=thread, without the thread sanitizer's library: stores of
// kernels to the arena go through `View`. For one source file of a program.
#pragma once

#include "emulation.h"

#define EMULATION_HOOK extern "C" __attribute__((no_sanitize("thread"))) void

EMULATION_HOOK emulation_store(void* address, size_t size) {
  if (emulation::is_shared_by_blocks(address)) emulation::Machine::instance().plain_store(address, size);
}

#define EMULATION_HOOKS_OF(size)                                                    \
  EMULATION_HOOK __tsan_read##size(void*) {}                                        \
  EMULATION_HOOK __tsan_unaligned_read##size(void*) {}                              \
  EMULATION_HOOK __tsan_write##size(void* address) { emulation_store(address, size); } \
  EMULATION_HOOK __tsan_unaligned_write##size(void* address) { emulation_store(address, size); }

EMULATION_HOOKS_OF(1)
EMULATION_HOOKS_OF(2)
EMULATION_HOOKS_OF(4)
EMULATION_HOOKS_OF(8)
EMULATION_HOOKS_OF(16)

EMULATION_HOOK __tsan_read_range(void*, size_t) {}
EMULATION_HOOK __tsan_write_range(void* address, size_t size) { emulation_store(address, size); }
EMULATION_HOOK __tsan_init() {}
EMULATION_HOOK __tsan_func_entry(void*) {}
EMULATION_HOOK __tsan_func_exit() {}
EMULATION_HOOK __tsan_vptr_read(void*) {}
EMULATION_HOOK __tsan_vptr_update(void*, void*) {}

// Atomics of the launchers and of std::shared_ptr.
#define EMULATION_ATOMICS_OF(bits, type)                                                               \
  extern "C" __attribute__((no_sanitize("thread"))) type __tsan_atomic##bits##_load(                   \
      const volatile type* address, int) {                                                             \
    return *address;                                                                                   \
  }                                                                                                    \
  extern "C" __attribute__((no_sanitize("thread"))) void __tsan_atomic##bits##_store(                  \
      volatile type* address, type value, int) {                                                       \
    *address = value;                                                                                  \
  }                                                                                                    \
  extern "C" __attribute__((no_sanitize("thread"))) type __tsan_atomic##bits##_fetch_add(              \
      volatile type* address, type value, int) {                                                       \
    const type old = *address;                                                                         \
    *address = static_cast<type>(old + value);                                                         \
    return old;                                                                                        \
  }

EMULATION_ATOMICS_OF(8, uint8_t)
EMULATION_ATOMICS_OF(32, uint32_t)
EMULATION_ATOMICS_OF(64, uint64_t)
