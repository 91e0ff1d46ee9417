// Tests the emulator: correct code gives correct results in every schedule, and errors are detected.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda_emulator.h"  // first: it defines what device code needs

#include "common/device.cuh"

using namespace cuda_emulator;

namespace {

constexpr unsigned kThreads = 96;

// out[i] = 100 + the index of the next thread.
template <bool with_barrier>
void pass_to_neighbour(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = -1;
  __syncthreads();
  values[threadIdx.x] = 100 + static_cast<int>(threadIdx.x);
  if (with_barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}

// The sum over the warp plus 1e8 times the maximum over the warp.
void reductions(double* out) {
  const double sum = attncap::warp_reduce(1.0 + threadIdx.x, attncap::Sum());
  const double largest = attncap::warp_reduce(static_cast<double>(threadIdx.x ^ 5u), attncap::Max());
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum + 1e8 * largest;
}

// Combines the results of the shuffles and ballots that reductions() does not use into one number.
void exchanges(int* out) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int from_last = __shfl_sync(0xffffffffu, lane, 31), from_below = __shfl_up_sync(0xffffffffu, lane, 3);
  const unsigned ballot = __ballot_sync(0xffffffffu, lane % 8 == warp);  // 4 bits, the lowest at position `warp`
  out[threadIdx.x] = 10000 * from_last + 100 * from_below + 10 * __popc(ballot) + __ffs(ballot);
}

// In round r > 0, only thread r votes yes; in round 0, no thread does.
void votes(int* out) {
  int yes = 0;
  for (unsigned r = 0; r < kThreads; ++r) yes += __syncthreads_or(r > 0 && threadIdx.x == r) ? 1 : 1000;
  out[threadIdx.x] = yes;
}

// Like pass_to_neighbour, within a warp.
template <bool with_barrier>
void pass_to_lane(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = -1;
  __syncthreads();
  values[threadIdx.x] = 100 + static_cast<int>(threadIdx.x);
  if (with_barrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}

void barrier_for_some() {
  if (threadIdx.x < 32) __syncthreads();
}

void read_past_the_end(const float* values, float* out) { out[threadIdx.x] = values[threadIdx.x]; }

struct alignas(16) Four {
  float values[4];
};

void read_misaligned(const float* values, float* out) {
  out[threadIdx.x] = reinterpret_cast<const Four*>(values + 1)->values[threadIdx.x % 4];
}

void read_past_shared_memory(float* out) {
  out[threadIdx.x] = static_cast<float>(attncap::dynamic_shared[threadIdx.x]);
}

bool neighbour_is_right(Schedule schedule, void (*kernel)(int*)) {
  std::vector<int> out(kThreads);
  launch(schedule, 1, kThreads, 0, kernel, out.data());
  for (unsigned i = 0; i < kThreads; ++i) {
    if (out[i] != 100 + static_cast<int>((i + 1) % kThreads)) return false;
  }
  return true;
}

void expect(bool condition, const char* what) {
  std::printf("%s: %s\n", condition ? "ok" : "FAILED", what);
  if (!condition) std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  // When built with the sanitizers, each of these three must terminate the program.
  const std::string invalid_read = count > 1 ? arguments[1] : "";
  if (invalid_read == "read-past-array") {
    std::vector<float> values(kThreads - 1), out(kThreads);
    launch(Schedule::lowest_first, 1, kThreads, 0, read_past_the_end, values.data(), out.data());
    return 0;
  }
  if (invalid_read == "read-misaligned") {
    std::vector<float> values(8), out(kThreads);
    launch(Schedule::lowest_first, 1, kThreads, 0, read_misaligned, values.data(), out.data());
    return 0;
  }
  if (invalid_read == "read-past-shared") {
    std::vector<float> out(kThreads);
    launch(Schedule::lowest_first, 1, kThreads, (kThreads - 1) * sizeof(double), read_past_shared_memory, out.data());
    return 0;
  }

  int wrong = 0, wrong_in_warp = 0;
  for (const Schedule schedule : kSchedules) {
    expect(neighbour_is_right(schedule, pass_to_neighbour<true>), "a barrier makes neighbours' values visible");
    wrong += !neighbour_is_right(schedule, pass_to_neighbour<false>);

    std::vector<double> out(2 * kThreads);
    launch(schedule, 2, kThreads, 0, reductions, out.data());
    for (unsigned i = 0; i < 2 * kThreads; ++i) {
      const unsigned end = (i % kThreads / 32 + 1) * 32;  // of the warp's threads
      expect(out[i] == 32 * end - 31 * 16 + 1e8 * (end - 1), "warp_reduce");
    }

    std::vector<int> got(kThreads);
    launch(schedule, 1, kThreads, 0, exchanges, got.data());
    for (int i = 0; i < int(kThreads); ++i) {
      const int lane = i % 32, below = lane < 3 ? lane : lane - 3;
      expect(got[i] == 10000 * 31 + 100 * below + 10 * 4 + i / 32 + 1, "shuffles and ballot");
    }
    launch(schedule, 1, kThreads, 0, votes, got.data());
    expect(got == std::vector<int>(kThreads, 1000 + kThreads - 1), "__syncthreads_or");
    const auto lane_is_right = [&](auto kernel) {
      launch(schedule, 1, kThreads, 0, kernel, got.data());
      for (int i = 0; i < int(kThreads); ++i) {
        if (got[i] != 100 + (i ^ 1)) return false;
      }
      return true;
    };
    expect(lane_is_right(pass_to_lane<true>), "__syncwarp makes other lanes' values visible");
    wrong_in_warp += !lane_is_right(pass_to_lane<false>);
  }
  expect(wrong > 0 && wrong_in_warp > 0, "a missing barrier is detected in some schedule");

  bool caught = false;
  try {
    launch(Schedule::lowest_first, 1, kThreads, 0, barrier_for_some);
  } catch (const std::runtime_error&) {
    caught = true;
  }
  expect(caught, "a barrier that some threads never reach is reported");
}
