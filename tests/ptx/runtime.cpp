#include "runtime.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "counting.h"
#include "fiber.h"

namespace ptx {

Totals totals;
const char* running = nullptr;
const Position* position = nullptr;

std::map<std::string, const Kernel*>& kernels() {
  static std::map<std::string, const Kernel*> table;
  return table;
}

Register::Register(const Kernel& kernel) { kernels()[kernel.name] = new Kernel(kernel); }

// Approximate instructions are as bad as the manual lets them be. PTX_APPROX=hash: the error is a hash of the operands,
// between the largest ones up and down; up, down: always the largest; exact: none.

namespace {

const std::string approx = [] {
  const char* const name = std::getenv("PTX_APPROX");
  return std::string(name ? name : "hash");
}();

// In [-1, 1].
double share_of_error(u64 operands) {
  if (approx != "hash") return approx == "up" ? 1 : approx == "down" ? -1 : 0;
  u64 h = operands * 0x9e3779b97f4a7c15ull;
  h ^= h >> 29, h *= 0xbf58476d1ce4e5b9ull, h ^= h >> 32;
  return std::ldexp(double(h >> 11), -52) - 1;
}

// The float that is furthest from `exact` within `ulps`, or a share of that. Half an ulp is left for the rounding.
f32 within_ulps(double exact, double ulps, u64 operands) {
  const f32 nearest = static_cast<f32>(exact);
  if (!std::isfinite(nearest) || nearest == 0) return nearest;
  const double ulp = double(std::nextafter(std::fabs(nearest), INFINITY)) - std::fabs(nearest);
  return static_cast<f32>(exact + share_of_error(operands) * (ulps - 0.5) * ulp);
}

f32 within_relative(double exact, double error, u64 operands) {
  return static_cast<f32>(exact * (1 + share_of_error(operands) * error));
}

f32 flush(f32 a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; }

}  // namespace

// 9.7.3.13: at most 1 ulp.
f32 rcp_approx_f32(f32 a) {
  return a == 0 || std::isinf(a) || a != a ? 1 / a : within_ulps(1 / double(a), 1, bits_f32(a));
}
f32 rcp_approx_ftz_f32(f32 a) { return flush(rcp_approx_f32(flush(a))); }
// 9.7.3.14, rcp.approx.ftz.f64: of the upper 32 bits; the lower ones of the result are 0.
f64 rcp_approx_ftz_f64(f64 a) {
  constexpr u64 kUpper = 0xffffffff00000000;
  return as_f64(bits_f64(1 / as_f64(bits_f64(a) & kUpper)) & kUpper);
}
// 9.7.3.21: at most 2 ulp from the correctly rounded result. Exact for integers, which the manual does not say but
// CUDA's own float64 functions count on.
f32 ex2_approx_f32(f32 a) {
  if (a != a || std::isinf(a) || a == std::nearbyint(a)) return std::exp2(a);
  return within_ulps(std::exp2(double(a)), 2.5, bits_f32(a));
}
f32 ex2_approx_ftz_f32(f32 a) { return flush(ex2_approx_f32(flush(a))); }
// 9.7.3.20: an absolute 2^-22 between 0.5 and 2, a relative 2^-22 elsewhere.
f32 lg2_approx_f32(f32 a) {
  const double exact = std::log2(double(a));
  if (!std::isfinite(exact)) return static_cast<f32>(exact);
  if (a > 0.5f && a < 2) return static_cast<f32>(exact + share_of_error(bits_f32(a)) * 0x1p-22);
  return within_relative(exact, 0x1p-22, bits_f32(a));
}
f32 lg2_approx_ftz_f32(f32 a) { return flush(lg2_approx_f32(flush(a))); }
// 9.7.3.15: a relative 2^-23.
f32 sqrt_approx_f32(f32 a) { return within_relative(std::sqrt(double(a)), 0x1p-23, bits_f32(a)); }
f32 sqrt_approx_ftz_f32(f32 a) { return flush(sqrt_approx_f32(flush(a))); }
// 9.7.3.16: a relative 2^-22.9.
f32 rsqrt_approx_f32(f32 a) { return within_relative(1 / std::sqrt(double(a)), 0x1p-22 * 0.535, bits_f32(a)); }
f32 rsqrt_approx_ftz_f32(f32 a) { return flush(rsqrt_approx_f32(flush(a))); }
// 9.7.3.22: a relative 2^-11.
f32 tanh_approx_f32(f32 a) {
  if (std::fabs(a) < 0x1p-126f) return a;
  return std::clamp(within_relative(std::tanh(double(a)), 0x1p-11, bits_f32(a)), -1.0f, 1.0f);
}
// 9.7.3.8: at most 2 ulp; by numbers between 2^126 and 2^128, 0 with the sign of the quotient, and infinity by them
// NaN.
f32 div_approx_f32(f32 a, f32 b) {
  if (std::fabs(b) > 0x1p126f && !std::isinf(b)) return std::isinf(a) ? NAN : a * 0.0f * std::copysign(1.0f, b);
  return div_full_f32(a, b);
}
f32 div_full_f32(f32 a, f32 b) {
  const double exact = double(a) / double(b);
  return within_ulps(exact, 2, u64{bits_f32(a)} << 32 | bits_f32(b));
}

namespace {

constexpr u32 kWarp = 32, kNamedBarriers = 16, kRankShift = 24;
constexpr u16 kCopied = 0xffff;  // as the writer of a byte: a bulk copy

const bool is_checking = [] {
  const char* const text = std::getenv("PTX_CHECK");
  return text && text[0] == '1';
}();

struct Block;

struct Copy {
  u8* to;
  const u8* from;
  u32 bytes, zeros;  // that follow
  Block* block;
  u32 site;
};

struct Thread {
  u32 index;  // in the cluster
  Position at;
  Block* block;
  fibers::Fiber fiber;
  u32 site;  // where it waits
  bool has_ended, has_arrived;
  u64 arrived_in;  // the phase of the cluster's barrier
  std::vector<Copy> copies;                // not yet in a group
  std::vector<std::vector<Copy>> groups;   // committed, not yet waited for
  std::map<u32, u32> completions;          // of an mbarrier: when this thread last saw its phase complete
};

// Threads that wait until all have come.
struct Meeting {
  u32 expected = 0, site = 0;
  u64 completed = 0;
  std::vector<u32> waiting;
};

// Of the lanes in a mask.
struct WarpMeeting {
  Meeting meeting;
  u32 values[2][kWarp];  // of even and odd rounds: no lane is two rounds ahead of one that still reads
};

struct Warp {
  u32 lanes = 0;
  std::map<u32, WarpMeeting> meetings;  // by mask
  u32 synchronized = 0;                 // when all lanes last met in bar.warp.sync, which alone orders memory
  WarpAccesses accesses;
};

// What PTX_CHECK=1 remembers of a byte of shared memory.
struct Byte {
  u16 writer, reader;
  u32 write_time, read_time, remote_read_time, barrier;
  bool is_written, is_copied_to, has_readers, has_warps;  // under way; several readers, and in several warps
};

struct MBarrier {
  u32 count, pending;
  s64 expected_bytes = 0;
  u64 phase = 0;
  std::vector<Copy> copies = {};
  std::vector<u32> waiting = {};
};

struct Block {
  u32 rank;
  u32 ended = 0;  // threads
  u32 synchronized = 1;
  Meeting barriers[kNamedBarriers];
  std::vector<u8> votes[2];
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::vector<Byte> bytes;
  std::map<u32, MBarrier> mbarriers;
};

// The threads that can run, as bits.
class Ready {
 public:
  explicit Ready(u32 size) : size_(size), words_((size + 63) / 64) {}
  bool is_empty() const { return count_ == 0; }
  void insert(u32 i) { count_ += !(words_[i / 64] >> i % 64 & 1), words_[i / 64] |= u64{1} << i % 64; }
  void erase(u32 i) { count_ -= words_[i / 64] >> i % 64 & 1, words_[i / 64] &= ~(u64{1} << i % 64); }
  u32 next(Order order) {
    if (order == Order::highest_first) {
      for (u32 w = words_.size(); w-- > 0;) {
        if (words_[w]) return w * 64 + 63 - __builtin_clzll(words_[w]);
      }
    }
    const u32 first = order == Order::random ? random_() % size_ : 0;
    for (u32 n = 0, w = first / 64; n <= words_.size(); ++n, w = (w + 1) % words_.size()) {
      const u64 word = n == 0 ? words_[w] & ~u64{0} << first % 64 : words_[w];
      if (word) return w * 64 + __builtin_ctzll(word);
    }
    std::abort();  // it is empty
  }

 private:
  u32 size_, count_ = 0;
  std::vector<u64> words_;
  std::mt19937 random_{0};
};

// The blocks that run now: one, or those of a cluster.
struct Cluster {
  const Kernel& kernel;
  const Launch& launch;
  const u8* parameters;
  std::vector<std::unique_ptr<Thread>>& threads;
  Ready ready;
  std::vector<Block> blocks;
  void* main = nullptr;  // stack pointer of run()
  u32 clock = 1;         // counts what orders memory, so that an access before has a lower time
  u32 synchronized = 1;
  u32 arrived = 0, ended = 0;  // threads
  bool is_released = true;
  u64 phase = 0;
  std::vector<u32> waiting;
  std::string error;
};

Cluster* cluster = nullptr;
Thread* current = nullptr;

Warp& warp() { return current->block->warps[current->at.tid / kWarp]; }

// Continues with another thread, or with run() when no thread can go on.
void switch_thread() {
  void** const store = &current->fiber.pointer;
  if (cluster->ready.is_empty() || !cluster->error.empty()) {
    switch_stack(store, cluster->main);
  } else {
    current = cluster->threads[cluster->ready.next(cluster->launch.order)].get();
    position = &current->at;
    if (store != &current->fiber.pointer) switch_stack(store, current->fiber.pointer);
  }
}

void wait(std::vector<u32>& waiting, u32 site) {
  waiting.push_back(current->index);
  current->site = site;
  cluster->ready.erase(current->index);
  switch_thread();
}

void wake(std::vector<u32>& waiting) {
  for (const u32 i : waiting) cluster->ready.insert(i);
  waiting.clear();
}

std::string describe(u32 site) {
  return "'" + std::string(cluster->kernel.sites[site]) + "' (instruction " + std::to_string(site) + ")";
}

[[noreturn]] void stop(const std::string& what, u32 site) {
  cluster->error = std::string(cluster->kernel.name) + ": " + what + " at " + describe(site) + ", thread " +
                   std::to_string(current->at.tid) + " of block " + std::to_string(current->at.ctaid);
  switch_thread();
  std::abort();  // run() does not come back
}

// Returns true for the one that comes last.
bool meet(Meeting& meeting, u32 expected, u32 site) {
  if (meeting.waiting.empty()) {
    meeting.site = site, meeting.expected = expected;
  } else if (meeting.site != site || meeting.expected != expected) {
    stop("threads meet that are at different instructions: one at " + describe(meeting.site) + ", another", site);
  }
  if (meeting.waiting.size() + 1 < expected) {
    wait(meeting.waiting, site);
    return false;
  }
  wake(meeting.waiting);
  ++meeting.completed;
  return true;
}

// All threads of the block meet, or the given number of them.
void meet_block(u32 barrier, u32 threads, u32 site) {
  Block& block = *current->block;
  if (barrier >= kNamedBarriers) stop("no such barrier", site);
  const u32 all = current->at.ntid;
  if (!meet(block.barriers[barrier], threads ? threads : all, site)) return;
  if (threads == 0 || threads == all) block.synchronized = ++cluster->clock;
  if (is_counting) {
    count_barrier();
    for (Warp& each : block.warps) each.accesses.finish();
  }
}

// What each lane of the mask brings.
const u32* exchange(u32 value, u32 mask, u32 site, bool orders_memory = false) {
  Warp& own = warp();
  const u32 lane = current->at.lane;
  if (!(mask >> lane & 1)) stop("a mask without the lane itself", site);
  if (mask & ~own.lanes) stop("a mask with lanes that have ended or do not exist", site);
  WarpMeeting& lanes = own.meetings[mask];
  u32* const values = lanes.values[lanes.meeting.completed % 2];
  values[lane] = value;
  if (meet(lanes.meeting, __builtin_popcount(mask), site)) {
    if (orders_memory && mask == own.lanes) own.synchronized = ++cluster->clock;
    if (is_counting) own.accesses.finish();
  }
  return values;
}

// 9.7.9.6. `lane` returns the source lane, and whether it is within the segment.
template <typename Lane>
Shuffled shuffle(u32 value, u32 c, u32 mask, u32 site, const Lane& lane) {
  const u32 own = current->at.lane, segment = c >> 8 & 31, limit = (own & segment) | (c & 31 & ~segment);
  const u32* const values = exchange(value, mask, site);
  const auto [from, is_valid] = lane(own, limit, own & segment, segment);
  if (!is_valid) return {values[own], false};
  if (!(mask >> from & 1)) stop("a shuffle from a lane outside of its mask", site);
  return {values[from], true};
}

void complete_cluster_barrier() {
  const u32 all = cluster->launch.threads * cluster->blocks.size();
  if (cluster->arrived == 0 || cluster->arrived + cluster->ended < all) return;
  ++cluster->phase;
  if (cluster->is_released) cluster->synchronized = ++cluster->clock;
  cluster->arrived = 0, cluster->is_released = true;
  wake(cluster->waiting);
  if (is_counting) {
    count_cluster_barrier();
    for (Block& block : cluster->blocks) {
      for (Warp& each : block.warps) each.accesses.finish();
    }
  }
}

void run_thread() {
  cluster->kernel.run(cluster->parameters);
  current->groups.push_back(std::move(current->copies));
  for (const auto& group : current->groups) {
    if (!group.empty()) stop("an asynchronous copy that nobody waited for", group.front().site);
  }
  current->has_ended = true;
  warp().lanes &= ~(1u << current->at.lane);
  ++current->block->ended, ++cluster->ended;
  complete_cluster_barrier();
  cluster->ready.erase(current->index);
  switch_thread();
  std::abort();
}

// Shared memory.

struct Place {
  Block* block;
  u32 offset;
};

Place place(u32 address, u32 bytes, u32 site) {
  const u32 window = address >> kRankShift;
  if (window > cluster->blocks.size()) stop("an address of a block that is not in the cluster", site);
  Block* const block = window ? &cluster->blocks[window - 1] : current->block;
  const u32 offset = address & ((1u << kRankShift) - 1);
  if (u64{offset} + bytes > block->shared.size()) {
    stop(std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of shared memory, beyond its " +
             std::to_string(block->shared.size()),
         site);
  }
  if (block != current->block && block->ended == current->at.ntid) {
    stop("shared memory of a block that has ended", site);
  }
  return {block, offset};
}

// Whether what a thread did at `time` comes before what the current thread does, in every order of the threads.
bool is_ordered(const Thread& other, u32 time) {
  if (&other == current || time < cluster->synchronized) return true;
  if (other.block != current->block) return false;
  return time < current->block->synchronized ||
         (other.at.tid / kWarp == current->at.tid / kWarp && time < warp().synchronized);
}

void check_write(Place at, u32 bytes, u32 site) {
  for (u32 i = at.offset; i < at.offset + bytes; ++i) {
    Byte& byte = at.block->bytes[i];
    if (byte.is_copied_to) stop("a write where an asynchronous copy is under way", site);
    if (byte.writer != kCopied && !is_ordered(*cluster->threads[byte.writer], byte.write_time)) {
      stop("a race in shared memory: written by thread " + std::to_string(byte.writer) + " too,", site);
    }
    const bool is_read = byte.read_time >= std::max(at.block->synchronized, cluster->synchronized);
    const bool by_others = byte.has_warps || (byte.has_readers && byte.read_time >= warp().synchronized) ||
                           !is_ordered(*cluster->threads[byte.reader], byte.read_time);
    if ((is_read && by_others) || byte.remote_read_time >= cluster->synchronized) {
      stop("a race in shared memory: read by thread " + std::to_string(byte.reader) + " too,", site);
    }
    byte.writer = current->index, byte.write_time = cluster->clock, byte.is_written = true;
  }
}

void check_read(Place at, u32 bytes, u32 site) {
  const bool is_remote = at.block != current->block;
  for (u32 i = at.offset; i < at.offset + bytes; ++i) {
    Byte& byte = at.block->bytes[i];
    if (byte.is_copied_to) stop("a read where an asynchronous copy is under way", site);
    if (!byte.is_written) stop("a read of shared memory that nobody has written", site);
    if (byte.writer == kCopied) {
      const auto seen = current->completions.find(byte.barrier);
      const bool has_waited = seen != current->completions.end() && seen->second >= byte.write_time;
      if (!has_waited && byte.write_time >= std::max(at.block->synchronized, cluster->synchronized)) {
        stop("a read of what was copied, without having waited for it,", site);
      }
    } else if (!is_ordered(*cluster->threads[byte.writer], byte.write_time)) {
      stop("a race in shared memory: written by thread " + std::to_string(byte.writer) + " too,", site);
    }
    if (is_remote) {
      byte.remote_read_time = cluster->clock;
      continue;
    }
    const bool is_first = byte.read_time < current->block->synchronized;
    const Thread& before = *cluster->threads[byte.reader];
    byte.has_readers = !is_first && (byte.has_readers || &before != current);
    byte.has_warps = !is_first && (byte.has_warps || before.at.tid / kWarp != current->at.tid / kWarp);
    byte.reader = current->index, byte.read_time = cluster->clock;
  }
}

u8* access_shared(u32 address, Access access) {
  if (address % access.bytes) stop("a misaligned access, shared address " + std::to_string(address), access.site);
  const Place at = place(address, access.bytes, access.site);
  if (is_checking) {
    (access.kind == Access::store ? check_write : check_read)(at, access.bytes, access.site);
  }
  if (is_counting) {
    const Space space = at.block == current->block ? Space::shared : Space::remote;
    warp().accesses.add(current->at.lane, space, access, at.offset);
  }
  return at.block->shared.data() + at.offset;
}

// Copies: the bytes arrive when somebody waits for them, until then there is rubbish.

Copy begin_copy(u32 to, u64 from, u32 bytes, u32 source_bytes, u32 site) {
  const Place at = place(to, bytes, site);
  if (is_checking) {
    check_write(at, bytes, site);
    for (u32 i = 0; i < bytes; ++i) at.block->bytes[at.offset + i].is_copied_to = true;
  }
  u8* const target = at.block->shared.data() + at.offset;
  std::memset(target, 0xff, bytes);
  return {target, reinterpret_cast<const u8*>(from), source_bytes, bytes - source_bytes, at.block, site};
}

void end_copy(const Copy& copy, u16 writer, u32 barrier) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(copy.to + copy.bytes, 0, copy.zeros);
  if (!is_checking) return;
  const u32 offset = copy.to - copy.block->shared.data();
  for (u32 i = offset; i < offset + copy.bytes + copy.zeros; ++i) {
    Byte& byte = copy.block->bytes[i];
    byte.is_copied_to = false;
    byte.writer = writer, byte.write_time = cluster->clock, byte.barrier = barrier;
  }
}

// mbarrier objects are kept beside shared memory; the 8 bytes there are left alone.

u32 barrier_key(Place at) { return (at.block->rank + 1) << kRankShift | at.offset; }

MBarrier& mbarrier_at(u32 address, u32 site) {
  const Place at = place(address, 8, site);
  const auto found = at.block->mbarriers.find(at.offset);
  if (found == at.block->mbarriers.end()) stop("an mbarrier that is not initialised", site);
  return found->second;
}

// Lets copies arrive and the phase end, if everything that it waits for is under way.
void complete_phase(MBarrier& barrier, u32 key) {
  s64 bytes = 0;
  for (const Copy& copy : barrier.copies) bytes += copy.bytes;
  if (barrier.pending > 0 || barrier.expected_bytes != bytes) return;
  ++cluster->clock;
  for (const Copy& copy : barrier.copies) end_copy(copy, kCopied, key);
  barrier.copies.clear();
  barrier.expected_bytes = 0, barrier.pending = barrier.count;
  ++barrier.phase;
  wake(barrier.waiting);
}

}  // namespace

// Memory.

u8* global_at(u64 address, Access access) {
  if (address % access.bytes) stop("a misaligned access of global memory", access.site);
  if (is_counting) warp().accesses.add(current->at.lane, Space::global, access, address);
  return reinterpret_cast<u8*>(address);
}

u8* generic_at(u64 address, Access access) {
  if (address - kSharedWindow < 1ull << 32) return access_shared(static_cast<u32>(address), access);
  return global_at(address, access);
}

u8* shared_at(u32 address, Access access) {
  if (address >> kRankShift) stop("an address of another block's shared memory, without ::cluster", access.site);
  return access_shared(address, access);
}

u8* shared_cluster_at(u32 address, Access access) { return access_shared(address, access); }

u32 dynamic_shared() {
  const u32 alignment = cluster->kernel.dynamic_alignment;
  return (cluster->kernel.static_shared + alignment - 1) / alignment * alignment;
}

u32 mapa(u32 address, u32 rank) { return (rank + 1) << kRankShift | (address & ((1u << kRankShift) - 1)); }

// Threads.

void bar_sync(u32 barrier, u32 threads, u32 site) { meet_block(barrier, threads, site); }

u32 bar_red_popc(bool vote, u32 site) {
  Block& block = *current->block;
  auto& votes = block.votes[block.barriers[0].completed % 2];  // of even and odd rounds, as in WarpMeeting
  votes[current->at.tid] = vote;
  meet_block(0, 0, site);
  return std::count(votes.begin(), votes.end(), 1);
}
bool bar_red_or(bool vote, u32 site) { return bar_red_popc(vote, site) > 0; }
bool bar_red_and(bool vote, u32 site) { return bar_red_popc(vote, site) == current->at.ntid; }

void bar_warp_sync(u32 mask, u32 site) { exchange(0, mask, site, true); }

u32 vote_ballot(bool vote, u32 mask, u32 site) {
  const u32* const votes = exchange(vote, mask, site);
  u32 bits = 0;
  for (u32 lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) bits |= votes[lane] << lane;
  }
  return bits;
}
bool vote_any(bool vote, u32 mask, u32 site) { return vote_ballot(vote, mask, site) != 0; }
bool vote_all(bool vote, u32 mask, u32 site) { return vote_ballot(vote, mask, site) == mask; }

u32 redux_add(u32 value, u32 mask, u32 site) {
  const u32* const values = exchange(value, mask, site);
  u32 sum = 0;
  for (u32 lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) sum += values[lane];
  }
  return sum;
}

struct Source {
  u32 lane;
  bool is_valid;
};
Shuffled shfl_bfly(u32 value, u32 b, u32 c, u32 mask, u32 site) {
  return shuffle(value, c, mask, site, [&](u32 own, u32 limit, u32, u32) {
    return Source{own ^ (b & 31), (own ^ (b & 31)) <= limit};
  });
}
Shuffled shfl_up(u32 value, u32 b, u32 c, u32 mask, u32 site) {  // here the limit is the lowest lane
  return shuffle(value, c, mask, site, [&](u32 own, u32 limit, u32, u32) {
    return Source{own - (b & 31), s32(own - (b & 31)) >= s32(limit)};
  });
}
Shuffled shfl_down(u32 value, u32 b, u32 c, u32 mask, u32 site) {
  return shuffle(value, c, mask, site, [&](u32 own, u32 limit, u32, u32) {
    return Source{own + (b & 31), own + (b & 31) <= limit};
  });
}
Shuffled shfl_idx(u32 value, u32 b, u32 c, u32 mask, u32 site) {
  return shuffle(value, c, mask, site, [&](u32, u32 limit, u32 first, u32 segment) {
    const u32 from = first | (b & 31 & ~segment);
    return Source{from, from <= limit};
  });
}

// 9.7.13.10: any set of lanes that run together; code must be right for the smallest.
u32 activemask() { return 1u << current->at.lane; }

// 9.7.13.4. Threads that have ended count as arrived.
void barrier_cluster_arrive(bool is_release, u32 site) {
  if (current->has_arrived) stop("a thread arrives twice without waiting", site);
  current->has_arrived = true, current->arrived_in = cluster->phase;
  ++cluster->arrived;
  cluster->is_released &= is_release;
  complete_cluster_barrier();
}
void barrier_cluster_wait(u32 site) {
  if (!current->has_arrived) stop("a thread waits without having arrived", site);
  if (cluster->phase == current->arrived_in) wait(cluster->waiting, site);
  current->has_arrived = false;
}

// 9.7.9.25.3: cp.async.
void cp_async(u32 to, u64 from, u32 bytes, u32 source_bytes, u32 site) {
  if (to % bytes || from % bytes) stop("a misaligned copy", site);
  if (is_counting) {
    warp().accesses.add(current->at.lane, Space::async_copy, {Access::load, source_bytes, site}, from);
  }
  current->copies.push_back(begin_copy(to, from, bytes, std::min(source_bytes, bytes), site));
}
void cp_async_commit_group() { current->groups.push_back(std::move(current->copies)), current->copies.clear(); }
void cp_async_wait_group(u32 pending_groups) {
  auto& groups = current->groups;
  for (; groups.size() > pending_groups; groups.erase(groups.begin())) {
    for (const Copy& copy : groups.front()) end_copy(copy, current->index, 0);
  }
}

// 9.7.9.25.4: cp.async.bulk. Everything is a multiple of 16.
void cp_async_bulk(u32 to, u64 from, u32 bytes, u32 address, u32 site) {
  if (to % 16 || from % 16 || bytes % 16) stop("a misaligned copy", site);
  MBarrier& barrier = mbarrier_at(address, site);
  if (is_counting) count_bulk_copy(from, bytes);
  barrier.copies.push_back(begin_copy(to, from, bytes, bytes, site));
  if (!barrier.waiting.empty()) complete_phase(barrier, barrier_key(place(address, 8, site)));
}

void mbarrier_init(u32 address, u32 count, u32 site) {
  if (address % 8) stop("a misaligned mbarrier", site);
  const Place at = place(address, 8, site);
  if (is_checking) check_write(at, 8, site);
  at.block->mbarriers[at.offset] = {.count = count, .pending = count};
}
void mbarrier_inval(u32 address, u32 site) {
  mbarrier_at(address, site);
  const Place at = place(address, 8, site);
  at.block->mbarriers.erase(at.offset);
}
void mbarrier_expect_tx(u32 address, u32 bytes, u32 site) { mbarrier_at(address, site).expected_bytes += bytes; }
u64 mbarrier_arrive(u32 address, u32 count, u32 expected_bytes, u32 site) {
  MBarrier& barrier = mbarrier_at(address, site);
  const u32 key = barrier_key(place(address, 8, site));
  if (barrier.pending == 0) complete_phase(barrier, key);  // nobody has waited for the phase before
  if (barrier.pending < count) stop("more arrivals at an mbarrier than it expects", site);
  barrier.expected_bytes += expected_bytes, barrier.pending -= count;
  const u64 phase = barrier.phase;
  if (!barrier.waiting.empty() || barrier.expected_bytes == 0) complete_phase(barrier, key);
  return phase & 1;
}
// It may wait or return at once, 9.7.13.15.16; here it waits.
bool mbarrier_try_wait_parity(u32 address, u32 parity, u32 site) {
  MBarrier& barrier = mbarrier_at(address, site);
  const u32 key = barrier_key(place(address, 8, site));
  complete_phase(barrier, key);
  while ((barrier.phase & 1) == (parity & 1)) wait(barrier.waiting, site);
  current->completions[key] = cluster->clock;
  return true;
}

namespace {

void run_cluster(Cluster& state, u32 first_block) {
  const Kernel& kernel = state.kernel;
  const Launch& launch = state.launch;
  const u32 size = state.blocks.size();
  const u64 shared = launch.dynamic_shared ? dynamic_shared() + launch.dynamic_shared : kernel.static_shared;
  for (u32 rank = 0; rank < size; ++rank) {
    Block& block = state.blocks[rank];
    block.rank = rank;
    block.shared.assign(shared, 0xff);
    if (is_checking) block.bytes.assign(shared, Byte());
    block.warps.resize((launch.threads + kWarp - 1) / kWarp);
    for (auto& votes : block.votes) votes.assign(launch.threads, 0);
    for (u32 i = 0; i < launch.threads; ++i) {
      block.warps[i / kWarp].lanes |= 1u << i % kWarp;
      Thread& thread = *state.threads[rank * launch.threads + i];
      thread.at = {i, launch.threads, first_block + rank, launch.blocks, i % kWarp, rank, size};
      thread.block = &block;
      thread.has_ended = thread.has_arrived = false;
      thread.copies.clear(), thread.groups.clear(), thread.completions.clear();
      thread.fiber.start(run_thread);
      state.ready.insert(thread.index);
    }
  }
  current = state.threads[state.ready.next(launch.order)].get();
  position = &current->at;
  switch_stack(&state.main, current->fiber.pointer);
  const auto report = [&](const std::string& what) {
    if (state.error.empty()) state.error = std::string(kernel.name) + ": " + what;
  };
  for (u32 i = 0; i < size * launch.threads; ++i) {
    const Thread& thread = *state.threads[i];
    if (thread.has_ended) continue;
    report("threads wait for others that never come, one of them at " + describe(thread.site) + ", thread " +
           std::to_string(thread.at.tid) + " of block " + std::to_string(thread.at.ctaid));
  }
  for (const Block& block : state.blocks) {
    for (const auto& [offset, barrier] : block.mbarriers) {
      if (barrier.copies.empty()) continue;
      report("an asynchronous copy that nobody waited for at " + describe(barrier.copies.front().site));
    }
  }
  if (is_counting) {
    for (Block& block : state.blocks) {
      for (Warp& each : block.warps) each.accesses.finish();
    }
  }
}

}  // namespace

void run(const Kernel& kernel, const Launch& launch, const u8* parameters) {
  static std::vector<std::unique_ptr<Thread>> threads;
  const auto refuse = [&](const std::string& why) { throw std::runtime_error(std::string(kernel.name) + ": " + why); };
  const u32 size = launch.cluster ? launch.cluster : kernel.cluster_size;
  const u64 shared = kernel.static_shared + launch.dynamic_shared;
  if (launch.threads == 0 || launch.threads > kernel.most_threads) {
    refuse("more threads than its launch bounds, or none");
  }
  if (launch.blocks == 0 || launch.blocks % size) refuse("the number of blocks is no multiple of the cluster's, or 0");
  if (shared > launch.shared_limit) refuse(std::to_string(shared) + " bytes of shared memory are more than allowed");
  struct Running {
    explicit Running(const char* name) { running = name; }
    ~Running() { running = nullptr, cluster = nullptr; }
  } guard(kernel.name);
  while (threads.size() < size * launch.threads) {
    threads.push_back(std::make_unique<Thread>());
    threads.back()->index = threads.size() - 1;
  }
  ++totals.launches, totals.blocks += launch.blocks, totals.threads += u64{launch.blocks} * launch.threads;
  if (is_counting) begin_count(kernel);
  for (u32 first = 0; first < launch.blocks; first += size) {
    Cluster state{kernel, launch, parameters, threads, Ready(size * launch.threads), std::vector<Block>(size)};
    cluster = &state;
    run_cluster(state, first);
    if (!state.error.empty()) throw std::runtime_error(state.error);
  }
  if (is_counting) end_count(kernel, launch);
}

}  // namespace ptx
