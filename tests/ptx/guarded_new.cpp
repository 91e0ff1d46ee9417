// Linked into a test, puts what operator new gives out, the arrays that kernels read and write, between pages that
// nobody may touch: an access past the end of an array or of freed memory, or with PTX_GUARD=before one before its
// beginning, is a fault, reported with the kernel's name. The kernels need not be compiled again for that, and arrays
// of a multiple of 16 bytes stay aligned to 16 bytes.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "runtime.h"

namespace {

constexpr size_t kArena = size_t{1} << 40, kPage = 4096;
char* arena = nullptr;
size_t used = 0;
uint32_t* page_counts = nullptr;  // of what begins in a page of the arena
bool is_before = false;

void on_fault(int, siginfo_t* info, void*) {
  char text[400];
  const int length = std::snprintf(text, sizeof(text), "FAILED: memory fault at %p in kernel %s\n", info->si_addr,
                                   ptx::running ? ptx::running : "(none)");
  (void)!write(STDOUT_FILENO, text, length);
  _exit(3);
}

void* reserve(size_t bytes, int protection) {
  return mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

void start() {
  arena = static_cast<char*>(reserve(kArena, PROT_NONE));
  page_counts = static_cast<uint32_t*>(reserve(kArena / kPage * sizeof(uint32_t), PROT_READ | PROT_WRITE));
  const char* const mode = std::getenv("PTX_GUARD");
  is_before = mode && !std::strcmp(mode, "before");
  static char stack[64 * 1024];
  stack_t alternative{};
  alternative.ss_sp = stack, alternative.ss_size = sizeof(stack);
  sigaltstack(&alternative, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

void* guarded(size_t bytes) {
  if (!arena) start();
  const size_t pages = (bytes + kPage - 1) / kPage * kPage;
  char* const begin = arena + used + kPage;
  used += pages + 2 * kPage;
  if (used > kArena || mprotect(begin, pages, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
  page_counts[(begin - arena) / kPage] = pages / kPage;
  return is_before ? begin : begin + pages - bytes;
}

}  // namespace

// Not guarded: what the runtime itself allocates during a launch, and short texts.
void* operator new(size_t bytes) {
  if (ptx::running || bytes < 4 || (bytes % 2 && bytes < 64)) return std::malloc(bytes ? bytes : 1);
  return guarded(bytes);
}
void* operator new[](size_t bytes) { return operator new(bytes); }
void operator delete(void* pointer) noexcept {
  char* const at = static_cast<char*>(pointer);
  if (!arena || at < arena || at >= arena + kArena) return std::free(pointer);
  char* const page = arena + (at - arena) / kPage * kPage;
  const size_t bytes = page_counts[(page - arena) / kPage] * kPage;
  madvise(page, bytes, MADV_DONTNEED);
  mprotect(page, bytes, PROT_NONE);  // never used again
}
void operator delete[](void* pointer) noexcept { operator delete(pointer); }
void operator delete(void* pointer, size_t) noexcept { operator delete(pointer); }
void operator delete[](void* pointer, size_t) noexcept { operator delete(pointer); }
