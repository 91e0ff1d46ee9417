// Stands before tests/csrc/cuda_emulator.h in the include path: the tests of tests/csrc, as they are, then launch
// nvcc's PTX of a kernel instead of the kernel as the host's compiler understands it. The two have the same mangled
// name.
#pragma once

#define launch launch_host_code
#include CUDA_EMULATOR_H
#undef launch

#include <dlfcn.h>

#include "../runtime.h"

namespace cuda_emulator {

template <typename Kernel, typename... Arguments>
void launch(Schedule schedule, unsigned blocks, unsigned threads, size_t shared_bytes, Kernel kernel,
            const Arguments&... arguments) {
  if (blocks == 0) return;  // as in the emulator; the launchers launch nothing then
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(kernel), &info) || !info.dli_sname) throw std::runtime_error("a nameless kernel");
  alignas(16) ptx::u8 parameters[4096];
  size_t bytes = 0;
  const auto add = [&]<typename T>(const T& argument) {
    bytes = (bytes + alignof(T) - 1) / alignof(T) * alignof(T);
    std::memcpy(parameters + bytes, &argument, sizeof(T));
    bytes += sizeof(T);
  };
  (add(arguments), ...);
  const ptx::Kernel& translated = *ptx::kernels().at(info.dli_sname);
  const ptx::Parameter& last = translated.parameters[translated.parameter_count - 1];
  if (bytes != last.offset + last.bytes) throw std::runtime_error("parameters of another size than the kernel's");
  const ptx::Launch configuration{.blocks = blocks,
                                  .threads = threads,
                                  .dynamic_shared = shared_bytes,
                                  .order = static_cast<ptx::Order>(schedule)};
  ptx::run(translated, configuration, parameters);
}

}  // namespace cuda_emulator

#include "../report_totals.h"
