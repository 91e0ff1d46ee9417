// Runs CUDA device code on the host, without a GPU and without CUDA's headers: include this, then a
// .cuh.
//
// The blocks of a grid run one after another; the threads of a block are fibers (ucontext) that
// take turns only where CUDA lets threads wait for each other: at __syncthreads and at warp
// shuffles. Three schedules decide whose turn it is. Correct code gives the same result in all of
// them; where a barrier is missing, some schedule reads what is not yet written. Threads that wait
// for others which never come are reported. Shared memory is filled with rubbish (NaN) before each
// block; with -fsanitize=address, reading past an array is reported too.
//
// Emulated: threadIdx, blockIdx, blockDim, gridDim (x only), __syncthreads, __shfl_xor_sync on
// whole warps, static shared memory, and dynamic shared memory by the name `dynamic_shared`.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
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
constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

struct Index {
  unsigned x;
};

// Threads that wait until all of them have come.
struct Barrier {
  unsigned size, arrived = 0, round = 0;
};

struct Warp {
  Barrier barrier{kWarp};
  uint64_t values[2][kWarp];  // of even and of odd rounds: nobody is two rounds ahead of a thread
                              // that still reads
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool finished;
  const Barrier* barrier;  // where it waits, while that barrier's round is still `round`
  unsigned round;
};

struct Block {
  Index index, size, grid;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::function<void()> kernel;
  ucontext_t scheduler;
  unsigned thread;  // the fiber that runs
};

inline Block* block = nullptr;  // the one that runs

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  Fiber& fiber = *block->fibers[block->thread];
  fiber.barrier = &barrier;
  fiber.round = barrier.round;
  swapcontext(&fiber.context, &block->scheduler);
}

inline void run_fiber() {
  block->kernel();
  block->fibers[block->thread]->finished = true;
}

inline void run_block(Schedule schedule, std::mt19937& random) {
  for (auto& fiber : block->fibers) {
    fiber->finished = false;
    fiber->barrier = nullptr;
    getcontext(&fiber->context);
    fiber->context.uc_stack = {.ss_sp = fiber->stack.get(), .ss_flags = 0, .ss_size = kStackBytes};
    fiber->context.uc_link = &block->scheduler;
    makecontext(&fiber->context, run_fiber, 0);
  }
  std::vector<unsigned> ready;
  while (true) {
    ready.clear();
    for (unsigned thread = 0; thread < block->size.x; ++thread) {
      const Fiber& fiber = *block->fibers[thread];
      const bool waits = fiber.barrier && fiber.barrier->round == fiber.round;
      if (!fiber.finished && !waits) ready.push_back(thread);
    }
    if (ready.empty()) break;
    block->thread = schedule == Schedule::lowest_first    ? ready.front()
                    : schedule == Schedule::highest_first ? ready.back()
                                                          : ready[random() % ready.size()];
    swapcontext(&block->scheduler, &block->fibers[block->thread]->context);
  }
  for (const auto& fiber : block->fibers) {
    if (!fiber->finished) throw std::runtime_error("threads wait at a barrier others never reach");
  }
}

// What kernel<<<blocks, threads, shared_bytes>>>(arguments...) does on a GPU.
template <typename Kernel, typename... Arguments>
void launch(Schedule schedule, unsigned blocks, unsigned threads, size_t shared_bytes, Kernel kernel,
            const Arguments&... arguments) {
  if (threads % kWarp || shared_bytes > attncap::kDynamicSharedBytes) throw std::runtime_error("bad launch");
  Block state{};
  state.size = {threads};
  state.grid = {blocks};
  state.kernel = [&] { kernel(arguments...); };
  for (unsigned i = 0; i < threads; ++i) state.fibers.push_back(std::make_unique<Fiber>());
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

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) throw std::runtime_error("the emulator knows shuffles of whole warps only");
  const unsigned thread = threadIdx.x, lane = thread % cuda_emulator::kWarp;
  cuda_emulator::Warp& warp = cuda_emulator::block->warps[thread / cuda_emulator::kWarp];
  uint64_t* values = warp.values[warp.barrier.round % 2];
  std::memcpy(&values[lane], &value, sizeof(T));
  cuda_emulator::wait(warp.barrier);
  std::memcpy(&value, &values[lane ^ lane_mask], sizeof(T));
  return value;
}
