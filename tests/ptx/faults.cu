// That the checks find what they are for: each kernel is right, or has one fault if `planted`. `faults CASE [planted]`
// prints "ok", "wrong result", or what was found. For compute capability 9.0.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>

namespace {

constexpr int kThreads = 64;

// Each kernel computes from values[i] = i, and is to store 63 - i.

template <bool planted>
__global__ void missing_barrier(const float* values, float* results) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = values[threadIdx.x];
  if (!planted) __syncthreads();
  results[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

template <bool planted>
__global__ void written_too_early(const float* values, float* results) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = values[threadIdx.x];
  __syncthreads();
  const float other = shared[kThreads - 1 - threadIdx.x];
  if (!planted) __syncthreads();
  shared[threadIdx.x] = other;
  results[threadIdx.x] = shared[threadIdx.x];
}

template <bool planted>
__global__ void missing_warp_barrier(const float* values, float* results) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
  if (!planted) __syncwarp();
  const float next = shared[threadIdx.x ^ 1];
  results[threadIdx.x] = __shfl_xor_sync(0xffffffffu, next, 1);
}

template <bool planted>
__global__ void diverged_barrier(const float* values, float* results) {
  if (!planted || threadIdx.x < 32) __syncthreads();
  results[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool planted>
__global__ void wrong_shuffle(const float* values, float* results) {
  const float other = __shfl_xor_sync(0xffffffffu, values[threadIdx.x ^ 32], planted ? 30 : 31);
  results[threadIdx.x] = other;
}

template <bool planted>
__global__ void wrong_mask(const float* values, float* results) {
  results[threadIdx.x] = __shfl_xor_sync(planted ? 0xffffu : 0xffffffffu, values[threadIdx.x ^ 32], 31);
}

template <bool planted>
__global__ void beyond_shared(const float* values, float* results) {
  extern __shared__ float dynamic[];  // kThreads numbers
  dynamic[threadIdx.x + planted] = values[kThreads - 1 - threadIdx.x];
  __syncthreads();
  results[threadIdx.x] = dynamic[threadIdx.x + planted];
}

template <bool planted>
__global__ void beyond_global(const float* values, float* results) {
  results[threadIdx.x] = values[kThreads - 1 - threadIdx.x + planted] - planted;
}

template <bool planted>
__global__ void misaligned(const float* values, float* results) {
  if (threadIdx.x >= kThreads / 4) return;
  const float4 four = *reinterpret_cast<const float4*>(values + kThreads - 4 - 4 * threadIdx.x - planted);
  reinterpret_cast<float4*>(results)[threadIdx.x] = {four.w, four.z, four.y, four.x};
}

template <bool planted>
__global__ void __launch_bounds__(planted ? 32 : 64) launch_bounds(const float* values, float* results) {
  results[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool planted>
__global__ void unwritten(const float* values, float* results) {
  __shared__ float shared[kThreads];
  if (!planted || threadIdx.x > 0) shared[threadIdx.x] = 0;
  __syncthreads();
  results[threadIdx.x] = values[kThreads - 1 - threadIdx.x] + (shared[threadIdx.x] > 0 ? 1 : 0);
}

// (1 + 2^-12)^2 - 1 is 2^-11 + 2^-24; with a rounding between, 2^-11.
template <bool planted>
__global__ void rounded_twice(const float* values, float* results) {
  const float a = 1 + 0x1p-12f + 0 * values[0];
  const float excess = planted ? __fadd_rn(__fmul_rn(a, a), -1) : __fmaf_rn(a, a, -1);
  results[threadIdx.x] = kThreads - 1 - threadIdx.x + (excess - 0x1p-11f) * 0x1p24f - 1;
}

// Not a fault, but slow: a warp's numbers all in one bank.
template <bool planted>
__global__ void bank_conflicts(const float* values, float* results) {
  __shared__ float shared[kThreads * 32];
  float* const own = shared + threadIdx.x * (planted ? 32 : 1);
  *own = values[kThreads - 1 - threadIdx.x];
  __syncthreads();
  results[threadIdx.x] = *own;
}

// sm_80: asynchronous copies of 16 bytes.
template <bool planted>
__global__ void missing_wait(const float* values, float* results) {
  __shared__ alignas(16) float shared[kThreads];
  if (threadIdx.x < kThreads / 4) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared + 4 * threadIdx.x));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\ncp.async.commit_group;" ::"r"(to),
                 "l"(values + 4 * threadIdx.x)
                 : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
  if (planted) {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
  __syncthreads();
  results[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// sm_90: a bulk copy, awaited at an mbarrier, twice into the same place.
__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ void start_copy(float* to, const float* from, uint64_t* barrier) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(kThreads * 4), "r"(shared_address(barrier))
      : "memory");
}
__device__ void wait_for_copy(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred arrived;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 arrived, [%1], %2;\n"
        "selp.u32 %0, 1, 0, arrived;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
template <bool without_wait, bool without_barrier>
__device__ void copy_in_bulk(const float* values, float* results) {
  __shared__ alignas(16) float shared[kThreads];
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                     shared_address(&barrier))
                 : "memory");
    start_copy(shared, values, &barrier);
  }
  __syncthreads();
  for (int i = 0; i < 2; ++i) {
    if (!without_wait || threadIdx.x == 0) wait_for_copy(&barrier, i);
    results[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
    if (!without_barrier) __syncthreads();
    if (i == 0 && threadIdx.x == 0) start_copy(shared, values, &barrier);
  }
}
template <bool planted>
__global__ void missing_bulk_wait(const float* values, float* results) {
  copy_in_bulk<planted, false>(values, results);
}
template <bool planted>
__global__ void overwritten_by_copy(const float* values, float* results) {
  copy_in_bulk<false, planted>(values, results);
}

// sm_90: two blocks read each other's shared memory.
__device__ void wait_for_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <bool without_first, bool without_last>
__device__ void read_other_block(const float* values, float* results) {
  __shared__ float shared[kThreads / 2];
  const int i = blockIdx.x * kThreads / 2 + threadIdx.x;
  uint32_t rank, address;
  float value;
  shared[threadIdx.x] = values[i];
  if (!without_first) wait_for_cluster();
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(shared + kThreads / 2 - 1 - threadIdx.x)), "r"(1 - rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  results[i] = value;
  if (!without_last) wait_for_cluster();
}
template <bool planted>
__global__ void __cluster_dims__(2) missing_cluster_barrier(const float* values, float* results) {
  read_other_block<planted, false>(values, results);
}
template <bool planted>
__global__ void __cluster_dims__(2) ended_block(const float* values, float* results) {
  read_other_block<false, planted>(values, results);
}

using Kernel = void (*)(const float*, float*);
struct Case {
  Kernel right, planted;
  int blocks = 1, shared_bytes = 0, planted_shared_bytes = 0;
};
#define CASE(kernel) #kernel, { kernel<false>, kernel<true> }
const std::map<std::string, Case> cases = {
    {CASE(missing_barrier)},
    {CASE(written_too_early)},
    {CASE(missing_warp_barrier)},
    {CASE(diverged_barrier)},
    {CASE(wrong_shuffle)},
    {CASE(wrong_mask)},
    {"beyond_shared", {beyond_shared<false>, beyond_shared<true>, 1, kThreads * 4, kThreads * 4}},
    {"too_much_shared", {beyond_shared<false>, beyond_shared<false>, 1, 48 * 1024, 49 * 1024}},
    {CASE(beyond_global)},
    {CASE(misaligned)},
    {CASE(launch_bounds)},
    {CASE(unwritten)},
    {CASE(rounded_twice)},
    {CASE(bank_conflicts)},
    {CASE(missing_wait)},
    {CASE(missing_bulk_wait)},
    {CASE(overwritten_by_copy)},
    {"missing_cluster_barrier", {missing_cluster_barrier<false>, missing_cluster_barrier<true>, 2}},
    {"ended_block", {ended_block<false>, ended_block<true>, 2}},
};

// Instructions whose results are known: tanh.approx of the number, for the error that PTX_APPROX sets.
__global__ void approximate_tanh(float* number) {
  asm("tanh.approx.f32 %0, %1;" : "=f"(*number) : "f"(*number));
}

}  // namespace

int main(int count, char** words) {
  if (count < 2) return 2;
  if (words[1] == std::string("tanh")) {
    float number = 0.5f;
    approximate_tanh<<<1, 1>>>(&number);
    std::printf("%.9g\n", number);
    return 0;
  }
  const Case& tried = cases.at(words[1]);
  const bool planted = count > 2;
  float *const values = new float[kThreads], *const results = new float[kThreads];
  for (int i = 0; i < kThreads; ++i) values[i] = i, results[i] = NAN;
  const int shared_bytes = planted ? tried.planted_shared_bytes : tried.shared_bytes;
  (planted ? tried.planted : tried.right)<<<tried.blocks, kThreads / tried.blocks, shared_bytes>>>(values, results);
  if (const cudaError_t error = cudaGetLastError()) {
    std::printf("%s\n", cudaGetErrorString(error));
    return 0;
  }
  bool is_right = true;
  for (int i = 0; i < kThreads; ++i) is_right &= results[i] == kThreads - 1 - i;
  std::printf(is_right ? "ok\n" : "wrong result\n");
}
