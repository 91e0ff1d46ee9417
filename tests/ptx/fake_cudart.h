// What fake_cudart.cpp pretends, and what happened.
#pragma once

#include <string>

#include "runtime.h"

namespace fake_cudart {

extern int processors;     // multiprocessors of the GPU
extern ptx::Order order;   // in which threads take turns
extern std::string error;  // of the last launch that failed

}  // namespace fake_cudart
