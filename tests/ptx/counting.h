// Counts what a launch asks of a GPU, if the environment variable PTX_COUNTS names a file: a JSON line a launch, which
// ptx.py describes.
#pragma once

#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "runtime.h"

namespace ptx {

extern const bool is_counting;

enum class Space { global, shared, remote, async_copy };

// The accesses of a warp since its lanes last met. Lanes run one after the other, so that those which a GPU would make
// one request have to be found: the n-th time that each lane comes to an instruction is taken for the same request.
// Where lanes go through a loop a different number of times, that is what a GPU does too, as long as those which leave
// do so before the others go on.
class WarpAccesses {
 public:
  void add(u32 lane, Space space, Access access, u64 address);
  void finish();  // the lanes meet: counts the requests

 private:
  struct Request {
    Space space;
    Access access;
    std::vector<u64> addresses;
  };
  std::unordered_map<u64, u32> executions_;     // of a lane and an instruction
  std::unordered_map<u64, Request> requests_;  // of an execution and an instruction
};

void count_bulk_copy(u64 address, u64 bytes);  // one request of one thread
void count_barrier();
void count_cluster_barrier();
void begin_count(const Kernel& kernel);
void end_count(const Kernel& kernel, const Launch& launch);

}  // namespace ptx
