// At the end of a test, prints how much ran on PTX: test_ptx.py expects more than nothing.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "runtime.h"

namespace ptx {

inline const int report_at_exit = std::atexit([] {
  std::printf("PTX: %llu launches, %llu blocks, %llu threads\n", (unsigned long long)totals.launches,
              (unsigned long long)totals.blocks, (unsigned long long)totals.threads);
});

}  // namespace ptx
