// Runs translated kernels, a block (or a cluster of blocks) after the other. The threads of a block are fibers that
// take turns where they wait for each other.
//
// These are found and reported, as exceptions that name the kernel, the instruction and the thread:
//   - global and shared accesses that are not aligned to their size
//   - shared memory beyond what the block has
//   - threads that meet at different instructions, masks with lanes that do not exist or have ended, and threads that
//     wait for others that never come
//   - more threads than __launch_bounds__ allows, more shared memory than the launch may have, a grid that is not
//     a multiple of the cluster
//   - asynchronous copies that nobody waited for
// and, with PTX_CHECK=1, which takes longer:
//   - races in shared memory: two threads at the same byte, one of them writing, with no barrier between them
//   - reading shared memory that nobody has written, or where an asynchronous copy is still under way
// Registers and shared memory start with all bits set, NaN as floats, and so does the target of an asynchronous copy
// until somebody waits for it. Arrays of global memory can lie between pages that nobody may touch: guarded_new.cpp.
#pragma once

#include <map>
#include <string>

#include "instructions.h"

namespace ptx {

// Which of the threads that can run does; as in tests/csrc/cuda_emulator.h.
enum class Order { lowest_first, highest_first, random };

struct Launch {
  u32 blocks, threads;
  u64 dynamic_shared = 0;
  u32 cluster = 0;                    // blocks of a cluster; 0: as the kernel was compiled
  u64 shared_limit = 48 * 1024;       // that a launch may have unless it asks for more
  Order order = Order::lowest_first;
};

// All kernels that are linked into the program, by their mangled names.
std::map<std::string, const Kernel*>& kernels();

// `parameters` as PTX lays them out.
void run(const Kernel& kernel, const Launch& launch, const u8* parameters);

// What has run so far.
struct Totals {
  u64 launches, blocks, threads;
};
extern Totals totals;

extern const char* running;  // the kernel, for guarded_new.cpp; null between launches

}  // namespace ptx
