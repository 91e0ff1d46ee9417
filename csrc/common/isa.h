// How CPU kernels are dispatched. They are compiled once per instruction set, each time in a namespace of that name;
// one is chosen at run time. The caller supplies the threads.
#pragma once

#include <cstdint>

namespace attncap {

#ifdef ATTNCAP_X86
#define ATTNCAP_FOR_EACH_ISA(apply) apply(baseline) apply(avx2) apply(avx512)
#else
#define ATTNCAP_FOR_EACH_ISA(apply) apply(baseline)
#endif

enum class Isa { baseline, avx2, avx512 };

// Calls the version of function(...) that was compiled for an instruction set.
#ifdef ATTNCAP_X86
#define ATTNCAP_CALL_ISA(isa, function, ...) \
  switch (isa) {                             \
    case Isa::avx512:                        \
      avx512::function(__VA_ARGS__);         \
      break;                                 \
    case Isa::avx2:                          \
      avx2::function(__VA_ARGS__);           \
      break;                                 \
    case Isa::baseline:                      \
      baseline::function(__VA_ARGS__);       \
      break;                                 \
  }
#else
#define ATTNCAP_CALL_ISA(isa, function, ...) baseline::function(__VA_ARGS__)
#endif

// The widest instruction set that this processor and operating system support.
inline Isa best_isa() {
#ifdef ATTNCAP_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// The caller's thread pool: threads(count, work, context) calls work(begin, end, context) on disjoint ranges that cover
// [0, count), possibly concurrently.
using Threads = void (*)(int64_t count, void (*work)(int64_t begin, int64_t end, void* context), void* context);

}  // namespace attncap
