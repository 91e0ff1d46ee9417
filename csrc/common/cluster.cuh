// Device code for compute capability 9.0 and newer: clusters of blocks, copies that the hardware makes on its own, and the
// barriers by which they report their arrival. PTX ISA 8.8, sections 9.7.9.25 (cp.async.bulk, mapa), 9.7.13.12
// (barrier.cluster) and 9.7.13.15 (mbarrier). Elsewhere, and on the host, a cluster is one block, and there are no copies.
#pragma once

#include <cstdint>

namespace attncap {

#if __CUDA_ARCH__ >= 900

__device__ inline uint32_t block_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster. What they wrote to shared memory is then visible to all.
__device__ inline void sync_cluster() {
  __syncwarp();  // "aligned": all threads of a warp arrive together
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Waits for all threads of the cluster; for blocks that must stay until others have read their shared memory.
__device__ inline void leave_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The address of the same variable in the shared memory of another block of the cluster.
template <typename Element>
__device__ const Element* in_block(const Element* own, uint32_t block) {
  const Element* of_block;
  asm("mapa.u64 %0, %1, %2;" : "=l"(of_block) : "l"(own), "r"(block));
  return of_block;
}

// A barrier in shared memory, for one phase after the other. A phase ends when the threads that it expects have arrived
// and the bytes that it expects have been copied.
class PhaseBarrier {
 public:
  __device__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals) : "memory");
  }
  __device__ void arrive() { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory"); }

  // Arrives, and lets the phase expect this many bytes more.
  __device__ void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()), "r"(bytes) : "memory");
  }

  // Waits for the end of phase n, counted from 0; the one after it must not have ended.
  __device__ void wait(uint32_t n) {
    uint32_t ended = 0;
    while (!ended) {
      asm volatile(
          "{\n.reg .pred ended;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
          "selp.u32 %0, 1, 0, ended;\n}"
          : "=r"(ended)
          : "r"(address()), "r"(n & 1)
          : "memory");
    }
  }

  // Starts a copy from global to this block's shared memory. Addresses and bytes are multiples of 16.
  __device__ void copy(void* to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address())
                 : "memory");
  }

 private:
  __device__ uint32_t address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&state_)); }

  uint64_t state_;
};

// Makes barriers that this thread has initialised visible to copies.
__device__ inline void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

#else

__device__ inline void sync_cluster() { __syncthreads(); }
__device__ inline void leave_cluster() {}

template <typename Element>
__device__ const Element* in_block(const Element* own, uint32_t) {
  return own;
}

#endif

}  // namespace attncap
