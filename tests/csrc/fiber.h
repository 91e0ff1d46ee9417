// Stacks that take turns on one host thread. glibc's swapcontext does the same, but with a system call for the signal
// mask each time, which took longer than the kernels themselves.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "switch_stack is written for x86-64 and AArch64"
#endif

extern "C" {
// Pushes the registers that a function must preserve, stores the stack pointer, and continues where the other stack
// pointer was stored.
void switch_stack(void** store, void* load);
}

#if defined(__x86_64__)
asm(R"(
.text
.p2align 4
.weak switch_stack
.type switch_stack, @function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stack, .-switch_stack
)");
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 4
.weak switch_stack
.type switch_stack, %function
switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size switch_stack, .-switch_stack
)");
#endif

namespace fibers {

class Fiber {
 public:
  Fiber() {
    stack_ = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    unpoison();
    munmap(stack_, kStackBytes);
  }

  // The next switch to this fiber begins body(), which must not return.
  void start(void (*body)()) {
    unpoison();
    void** const top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStackBytes);
#if defined(__x86_64__)
    void** const frame = top - 8;  // six registers, the address to return to, and a word that aligns the stack
    frame[6] = reinterpret_cast<void*>(body);
#else
    void** const frame = top - 20;
    frame[11] = reinterpret_cast<void*>(body);  // x30
#endif
    pointer = frame;
  }

  void* pointer = nullptr;  // of the stack, while the fiber does not run

 private:
  static constexpr size_t kStackBytes = 256 * 1024;

  // AddressSanitizer keeps what surrounds local variables from being used; body() has not returned to allow it again.
  void unpoison() {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
  }

  void* stack_;
};

}  // namespace fibers
