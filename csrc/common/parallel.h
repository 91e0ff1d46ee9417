// Parallel loops on the caller's threads. In an unnamed namespace, like everything that CPU kernels use: see simd.h.
#pragma once

#include "isa.h"

namespace attncap {
namespace {

// Calls body(i) for i in [0, count), in any order and possibly concurrently.
template <typename Body>
void parallel_for(Threads threads, int64_t count, Body body) {
  threads(
      count,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<Body*>(context))(i);
      },
      &body);
}

}  // namespace
}  // namespace attncap
