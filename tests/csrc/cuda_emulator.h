// Runs CUDA device code on the host, without a GPU and without CUDA's headers. Include this file before a .cuh.
//
// The blocks of a grid run one after another. The threads of a block are fibers that switch only where CUDA
// threads wait for each other: at __syncthreads and at warp-level operations. The schedule decides which thread runs
// next; there are three. Correct code gives the same result in all of them; if a barrier is missing, data is read
// before it is written in at least one of them. Threads that wait at a barrier that others never reach are reported.
// Shared memory is filled with NaN before each block. With -fsanitize=address, out-of-bounds reads are reported too.
//
// Emulated: threadIdx, blockIdx, blockDim, gridDim (x only), __syncthreads, __syncthreads_or, __syncwarp, shuffles and
// __ballot_sync of whole warps, __popc, __ffs, static shared memory, and dynamic shared memory with the name
// `dynamic_shared`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "fiber.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define EMULATOR_POISON(begin, bytes) __asan_poison_memory_region(begin, bytes)
#define EMULATOR_UNPOISON(begin, bytes) __asan_unpoison_memory_region(begin, bytes)
#else
#define EMULATOR_POISON(begin, bytes)
#define EMULATOR_UNPOISON(begin, bytes)
#endif

#define __global__
#define __device__
#define __host__
#define __noinline__
#define __launch_bounds__(...)
// One host thread runs all fibers of a block, so thread_local variables are shared by the block. This covers static
// arrays in a kernel and, outside of kernels, `extern __shared__ double dynamic_shared[]`.
#define __shared__ thread_local

namespace attncap {
constexpr size_t kDynamicSharedBytes = 48 * 1024;
inline thread_local double dynamic_shared[kDynamicSharedBytes / sizeof(double)];
}  // namespace attncap

namespace cuda_emulator {

// Which of the threads that are ready runs next. The first two let one warp run far ahead of the others.
enum class Schedule { lowest_first, highest_first, random };
constexpr Schedule kSchedules[] = {Schedule::lowest_first, Schedule::highest_first, Schedule::random};
constexpr unsigned kWarp = 32, kMaxThreads = 1024;

struct Index {
  unsigned x;
};

// Where threads wait until all of them have arrived.
struct Barrier {
  unsigned size, round = 0;
  std::vector<unsigned> waiting = {};
};

struct Warp {
  Barrier barrier{kWarp};
  uint64_t values[2][kWarp];  // of even and odd rounds; no thread is two rounds ahead of one that still reads
};

struct Block {
  Index index, size, grid;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<fibers::Fiber>> fibers;
  std::set<unsigned> ready;    // threads that can run
  std::vector<char> votes[2];  // of __syncthreads_or, like Warp::values
  std::function<void()> kernel;
  void* scheduler;  // its stack, while a thread runs
  unsigned thread;  // that is running
};

inline Block* block = nullptr;  // that is running

inline void wait(Barrier& barrier) {
  const unsigned thread = block->thread;
  barrier.waiting.push_back(thread);
  if (barrier.waiting.size() < barrier.size) {
    block->ready.erase(thread);
    switch_stack(&block->fibers[thread]->pointer, block->scheduler);
    return;
  }
  block->ready.insert(barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
  ++barrier.round;
}

inline void run_thread() {
  block->kernel();
  block->ready.erase(block->thread);
  switch_stack(&block->fibers[block->thread]->pointer, block->scheduler);
}

inline void run_block(Schedule schedule, std::mt19937& random) {
  for (unsigned thread = 0; thread < block->size.x; ++thread) {
    block->fibers[thread]->start(run_thread);
    block->ready.insert(thread);
  }
  while (!block->ready.empty()) {
    const auto first = block->ready.begin(), last = std::prev(block->ready.end());
    block->thread = schedule == Schedule::lowest_first    ? *first
                    : schedule == Schedule::highest_first ? *last
                                                          : *block->ready.lower_bound(random() % (*last + 1));
    switch_stack(&block->scheduler, block->fibers[block->thread]->pointer);
  }
  bool waits = !block->barrier.waiting.empty();
  for (const Warp& warp : block->warps) waits |= !warp.barrier.waiting.empty();
  if (waits) throw std::runtime_error("some threads wait at a barrier that others never reach");
}

// The values that the lanes of a warp pass to a warp-level operation.
template <typename T>
struct WarpValues {
  const uint64_t* values;

  WarpValues(unsigned mask, T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    if (mask != 0xffffffffu) throw std::runtime_error("the emulator supports operations of whole warps only");
    Warp& warp = block->warps[block->thread / kWarp];
    uint64_t* to = warp.values[warp.barrier.round % 2];
    std::memcpy(&to[lane()], &value, sizeof(T));
    wait(warp.barrier);
    values = to;
  }
  static unsigned lane() { return block->thread % kWarp; }
  T of(unsigned lane) const {
    T value;
    std::memcpy(&value, &values[lane], sizeof(T));
    return value;
  }
};

// Emulates kernel<<<blocks, threads, shared_bytes>>>(arguments...).
template <typename Kernel, typename... Arguments>
void launch(Schedule schedule, unsigned blocks, unsigned threads, size_t shared_bytes, Kernel kernel,
            const Arguments&... arguments) {
  if (threads == 0 || threads % kWarp || threads > kMaxThreads || shared_bytes > attncap::kDynamicSharedBytes) {
    throw std::runtime_error("invalid number of threads or bytes of shared memory");
  }
  Block state{};
  state.size = {threads};
  state.grid = {blocks};
  state.kernel = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < threads; ++i) state.fibers.push_back(std::make_unique<fibers::Fiber>());
  for (auto& votes : state.votes) votes.resize(threads);
  block = &state;
  std::mt19937 random(0);
  char* shared = reinterpret_cast<char*>(attncap::dynamic_shared);
  for (state.index.x = 0; state.index.x < blocks; ++state.index.x) {
    state.barrier = {.size = threads};
    state.warps.assign(threads / kWarp, Warp());
    std::memset(shared, 0xff, shared_bytes);
    EMULATOR_POISON(shared + shared_bytes, attncap::kDynamicSharedBytes - shared_bytes);
    run_block(schedule, random);
    EMULATOR_UNPOISON(shared, attncap::kDynamicSharedBytes);
  }
  block = nullptr;
}

}  // namespace cuda_emulator

#define threadIdx (cuda_emulator::Index{cuda_emulator::block->thread})
#define blockIdx (cuda_emulator::block->index)
#define blockDim (cuda_emulator::block->size)
#define gridDim (cuda_emulator::block->grid)

inline void __syncthreads() { cuda_emulator::wait(cuda_emulator::block->barrier); }

inline bool __syncthreads_or(bool vote) {
  cuda_emulator::Block& block = *cuda_emulator::block;
  std::vector<char>& votes = block.votes[block.barrier.round % 2];
  votes[block.thread] = vote;
  cuda_emulator::wait(block.barrier);
  return std::find(votes.begin(), votes.end(), true) != votes.end();
}

inline void __syncwarp() {
  cuda_emulator::wait(cuda_emulator::block->warps[threadIdx.x / cuda_emulator::kWarp].barrier);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_emulator::WarpValues(mask, value).of(lane);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  const cuda_emulator::WarpValues values(mask, value);
  return values.of(values.lane() ^ lane_mask);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const cuda_emulator::WarpValues values(mask, value);
  return values.of(values.lane() < delta ? values.lane() : values.lane() - delta);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const cuda_emulator::WarpValues votes(mask, vote);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < cuda_emulator::kWarp; ++lane) bits |= static_cast<unsigned>(votes.of(lane)) << lane;
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }
