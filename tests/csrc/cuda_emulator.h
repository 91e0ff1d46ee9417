// Runs CUDA device code on the host, without a GPU and without CUDA's headers: include this, then a
// .cuh.
//
// The blocks of a grid run one after another; the threads of a block are fibers (ucontext) that take turns only where
// CUDA lets threads wait for each other: at __syncthreads and at what a warp does together. Three schedules decide
// whose turn it is. Correct code gives the same result in all of them; where a barrier is missing, some schedule reads
// what is not yet written. Threads that wait for others which never come are reported. Shared memory is filled with
// rubbish (NaN) before each block; with -fsanitize=address, reading past an array is reported too.
//
// Emulated: threadIdx, blockIdx, blockDim, gridDim (x only), __syncthreads, __syncthreads_or, __syncwarp, shuffles and
// __ballot_sync of whole warps, __popc, __ffs, static shared memory, and dynamic shared memory by the name
// `dynamic_shared`.
#pragma once

#include <ucontext.h>

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
#define __launch_bounds__(threads)
// One thread of the host runs all fibers, so what is thread_local belongs to the block: static
// arrays in a kernel and, outside of kernels, `extern __shared__ double dynamic_shared[]` work as
// they stand.
#define __shared__ thread_local

namespace attncap {
constexpr size_t kDynamicSharedBytes = 48 * 1024;
inline thread_local double dynamic_shared[kDynamicSharedBytes / sizeof(double)];
}  // namespace attncap

namespace cuda_emulator {

// Which of the threads that could run does. The first two let one warp run far ahead of another.
enum class Schedule { lowest_first, highest_first, random };
constexpr Schedule kSchedules[] = {Schedule::lowest_first, Schedule::highest_first, Schedule::random};
constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;

struct Index {
  unsigned x;
};

// Where threads wait until all of them have come.
struct Barrier {
  unsigned size, round = 0;
  std::vector<unsigned> waiting = {};
};

struct Warp {
  Barrier barrier{kWarp};
  uint64_t values[2][kWarp];  // of even and of odd rounds: nobody is two rounds ahead of a thread
                              // that still reads
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

struct Block {
  Index index, size, grid;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::set<unsigned> ready;    // threads that could run
  std::vector<char> votes[2];  // of __syncthreads_or, as Warp::values
  std::function<void()> kernel;
  ucontext_t scheduler;
  unsigned thread;  // the fiber that runs
};

inline Block* block = nullptr;  // the one that runs

inline void wait(Barrier& barrier) {
  const unsigned thread = block->thread;
  barrier.waiting.push_back(thread);
  if (barrier.waiting.size() < barrier.size) {
    block->ready.erase(thread);
    swapcontext(&block->fibers[thread]->context, &block->scheduler);
    return;
  }
  block->ready.insert(barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
  ++barrier.round;
}

inline void run_fiber() {
  block->kernel();
  block->ready.erase(block->thread);
}

inline void run_block(Schedule schedule, std::mt19937& random) {
  for (unsigned thread = 0; thread < block->size.x; ++thread) {
    Fiber& fiber = *block->fibers[thread];
    getcontext(&fiber.context);
    fiber.context.uc_stack = {.ss_sp = fiber.stack.get(), .ss_flags = 0, .ss_size = kStackBytes};
    fiber.context.uc_link = &block->scheduler;
    makecontext(&fiber.context, run_fiber, 0);
    block->ready.insert(thread);
  }
  while (!block->ready.empty()) {
    const auto first = block->ready.begin(), last = std::prev(block->ready.end());
    block->thread = schedule == Schedule::lowest_first    ? *first
                    : schedule == Schedule::highest_first ? *last
                                                          : *block->ready.lower_bound(random() % (*last + 1));
    swapcontext(&block->scheduler, &block->fibers[block->thread]->context);
  }
  bool waits = !block->barrier.waiting.empty();
  for (const Warp& warp : block->warps) waits |= !warp.barrier.waiting.empty();
  if (waits) throw std::runtime_error("threads wait at a barrier others never reach");
}

// What each lane of the warp came with.
template <typename T>
struct WarpValues {
  const uint64_t* values;

  WarpValues(unsigned mask, T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    if (mask != 0xffffffffu) throw std::runtime_error("the emulator knows shuffles of whole warps only");
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

// What kernel<<<blocks, threads, shared_bytes>>>(arguments...) does on a GPU.
template <typename Kernel, typename... Arguments>
void launch(Schedule schedule, unsigned blocks, unsigned threads, size_t shared_bytes, Kernel kernel,
            const Arguments&... arguments) {
  if (threads == 0 || threads % kWarp || threads > kMostThreads || shared_bytes > attncap::kDynamicSharedBytes) {
    throw std::runtime_error("bad launch");
  }
  Block state{};
  state.size = {threads};
  state.grid = {blocks};
  state.kernel = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < threads; ++i) state.fibers.push_back(std::make_unique<Fiber>());
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
