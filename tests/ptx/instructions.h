// What translated kernels (translate.py) are made of: the semantics of PTX instructions, for one thread. Those that
// need other threads or memory that others see are declared here and defined in runtime.cpp. A translated file includes
// only this, and there are many, so it includes little and has no templates.
//
// Section numbers are those of NVIDIA's "Parallel Thread Execution ISA", version 9.1.
#pragma once

#include <stdint.h>

namespace ptx {

using u8 = uint8_t;
using s8 = int8_t;
using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;
using f16 = _Float16;
using f32 = float;
using f64 = double;

// Registers have no type but a width; these read the bits of one type as another.
inline f32 as_f32(u32 bits) { return __builtin_bit_cast(f32, bits); }
inline f64 as_f64(u64 bits) { return __builtin_bit_cast(f64, bits); }
inline f16 as_f16(u16 bits) { return __builtin_bit_cast(f16, bits); }
inline u32 bits_f32(f32 value) { return __builtin_bit_cast(u32, value); }
inline u64 bits_f64(f64 value) { return __builtin_bit_cast(u64, value); }
inline u16 bits_f16(f16 value) { return __builtin_bit_cast(u16, value); }

// 9.7.1, integers. A division by zero has an unspecified result; this one has all bits set.
inline u32 div_u32(u32 a, u32 b) { return b ? a / b : ~0u; }
inline u64 div_u64(u64 a, u64 b) { return b ? a / b : ~0ull; }
inline s32 div_s32(s32 a, s32 b) { return b == 0 ? -1 : b == -1 ? (s32)-(u32)a : a / b; }
inline s64 div_s64(s64 a, s64 b) { return b == 0 ? -1 : b == -1 ? (s64)-(u64)a : a / b; }
inline u32 rem_u32(u32 a, u32 b) { return b ? a % b : ~0u; }
inline u64 rem_u64(u64 a, u64 b) { return b ? a % b : ~0ull; }
inline s32 rem_s32(s32 a, s32 b) { return b == 0 ? -1 : b == -1 ? 0 : a % b; }
inline s64 rem_s64(s64 a, s64 b) { return b == 0 ? -1 : b == -1 ? 0 : a % b; }
inline u32 mulhi_u32(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
inline s32 mulhi_s32(s32 a, s32 b) { return (s32)((s64)a * b >> 32); }
inline u64 mulhi_u64(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
inline s64 mulhi_s64(s64 a, s64 b) { return (s64)((__int128)a * b >> 64); }
inline u32 popc_b32(u32 a) { return (u32)__builtin_popcount(a); }
inline u32 popc_b64(u64 a) { return (u32)__builtin_popcountll(a); }
inline u32 clz_b32(u32 a) { return a ? (u32)__builtin_clz(a) : 32; }
inline u32 clz_b64(u64 a) { return a ? (u32)__builtin_clzll(a) : 64; }
inline u32 brev_b32(u32 a) {
  u32 reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1) << (31 - i);
  return reversed;
}
inline u32 bfind_u32(u32 a) { return a ? 31 - (u32)__builtin_clz(a) : ~0u; }
inline u32 bfind_shiftamt_u32(u32 a) { return a ? (u32)__builtin_clz(a) : ~0u; }
inline u32 low_bits(u32 count) { return count >= 32 ? ~0u : (1u << count) - 1; }
inline u32 bfi_b32(u32 a, u32 b, u32 at, u32 count) {
  at &= 0xff, count &= 0xff;
  const u32 mask = at >= 32 ? 0 : low_bits(count) << at;
  return (b & ~mask) | (at >= 32 ? 0 : a << at & mask);
}
inline u32 bfe_u32(u32 a, u32 at, u32 count) {
  at &= 0xff, count &= 0xff;
  return at >= 32 ? 0 : a >> at & low_bits(count);
}
inline u32 prmt_b32(u32 a, u32 b, u32 selectors) {
  const u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 selector = selectors >> 4 * i & 0xf;
    u32 byte = (u32)(bytes >> 8 * (selector & 7)) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign only
    result |= byte << 8 * i;
  }
  return result;
}
inline u32 lop3_b32(u32 a, u32 b, u32 c, u32 table) {
  u32 result = 0;
  for (int i = 0; i < 32; ++i) {
    result |= (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i;
  }
  return result;
}
inline u32 shf_l_wrap(u32 a, u32 b, u32 n) { return n & 31 ? b << (n & 31) | a >> (32 - (n & 31)) : b; }
inline u32 shf_r_wrap(u32 a, u32 b, u32 n) { return n & 31 ? a >> (n & 31) | b << (32 - (n & 31)) : a; }

// 9.7.8, shifts: amounts beyond the width are clamped to it.
inline u16 shl_b16(u16 a, u32 n) { return n > 15 ? 0 : (u16)(a << n); }
inline u32 shl_b32(u32 a, u32 n) { return n > 31 ? 0 : a << n; }
inline u64 shl_b64(u64 a, u32 n) { return n > 63 ? 0 : a << n; }
inline u16 shr_u16(u16 a, u32 n) { return n > 15 ? 0 : (u16)(a >> n); }
inline u32 shr_u32(u32 a, u32 n) { return n > 31 ? 0 : a >> n; }
inline u64 shr_u64(u64 a, u32 n) { return n > 63 ? 0 : a >> n; }
inline s16 shr_s16(s16 a, u32 n) { return (s16)(a >> (n > 15 ? 15 : n)); }
inline s32 shr_s32(s32 a, u32 n) { return a >> (n > 31 ? 31 : n); }
inline s64 shr_s64(s64 a, u32 n) { return a >> (n > 63 ? 63 : n); }

// 9.7.3, floating point. add, sub, mul and fma are C++'s own, compiled with -ffp-contract=off. min and max drop NaN,
// and -0 is less than +0.
inline f32 min_f32(f32 a, f32 b) {
  return a != a ? b : b != b ? a : a < b || (a == b && __builtin_signbit(a)) ? a : b;
}
inline f32 max_f32(f32 a, f32 b) {
  return a != a ? b : b != b ? a : a > b || (a == b && !__builtin_signbit(a)) ? a : b;
}
inline f64 min_f64(f64 a, f64 b) {
  return a != a ? b : b != b ? a : a < b || (a == b && __builtin_signbit(a)) ? a : b;
}
inline f64 max_f64(f64 a, f64 b) {
  return a != a ? b : b != b ? a : a > b || (a == b && !__builtin_signbit(a)) ? a : b;
}
inline f32 copysign_f32(f32 sign, f32 size) { return __builtin_copysignf(size, sign); }  // the sign comes first in PTX
inline f64 copysign_f64(f64 sign, f64 size) { return __builtin_copysign(size, sign); }
inline f32 saturate_f32(f32 a) { return a >= 0 ? (a < 1 ? a : 1) : 0; }  // NaN: 0
// Rounded down. The product of two floats is exact in float64, and the error of the sum is too (Knuth's two-sum).
inline f32 fma_rm_f32(f32 a, f32 b, f32 c) {
  const f32 nearest = __builtin_fmaf(a, b, c);
  const f64 product = (f64)a * b, sum = product + c;
  const f64 part = sum - product, error = (product - (sum - part)) + (c - part);
  const bool is_above = (f64)nearest > sum || ((f64)nearest == sum && error < 0);
  return is_above ? __builtin_nextafterf(nearest, -__builtin_inff()) : nearest;
}

// Approximate instructions, see runtime.cpp.
f32 rcp_approx_f32(f32 a);
f32 rcp_approx_ftz_f32(f32 a);
f64 rcp_approx_ftz_f64(f64 a);
f32 ex2_approx_f32(f32 a);
f32 ex2_approx_ftz_f32(f32 a);
f32 lg2_approx_f32(f32 a);
f32 lg2_approx_ftz_f32(f32 a);
f32 sqrt_approx_f32(f32 a);
f32 sqrt_approx_ftz_f32(f32 a);
f32 rsqrt_approx_f32(f32 a);
f32 rsqrt_approx_ftz_f32(f32 a);
f32 tanh_approx_f32(f32 a);
f32 div_approx_f32(f32 a, f32 b);
f32 div_full_f32(f32 a, f32 b);

// 9.7.9.21, cvt. To bfloat16: the upper half of a float32, rounded to nearest even.
inline u16 bf16_of(f32 value) {
  const u32 bits = bits_f32(value);
  return value != value ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u16 f16_of(f32 value) { return bits_f16((f16)value); }
inline u32 bf16x2_of(f32 upper, f32 lower) { return (u32)bf16_of(upper) << 16 | bf16_of(lower); }
inline u32 f16x2_of(f32 upper, f32 lower) { return (u32)f16_of(upper) << 16 | f16_of(lower); }
// From floating point to integers: to the nearest representable, NaN to 0.
inline f64 clamp(f64 value, f64 least, f64 most) {
  return value != value ? 0 : value < least ? least : value > most ? most : value;
}
inline s32 s32_of(f64 value) { return (s32)clamp(value, -2147483648.0, 2147483647.0); }
inline u32 u32_of(f64 value) { return (u32)clamp(value, 0, 4294967295.0); }
inline s64 s64_of(f64 value) { return value >= 0x1p63 ? INT64_MAX : (s64)clamp(value, -0x1p63, 0x1p63); }

// Where the running thread is in the grid. One dimension.
struct Position {
  u32 tid, ntid, ctaid, nctaid, lane, cluster_rank, cluster_size;
};
extern const Position* position;

// Memory. Global (and local) addresses are the host's. Addresses of shared memory count from 0 in the block's own;
// those of another block of the cluster have its rank + 1 in their upper 8 bits. As generic addresses, both lie in a
// window where the host has nothing. `site` is the number of the instruction within the kernel.
constexpr u64 kSharedWindow = 0x7000000000000000;
struct Access {
  enum Kind : u8 { load, store } kind;
  u32 bytes, site;
};
u8* global_at(u64 address, Access access);
u8* generic_at(u64 address, Access access);
u8* shared_at(u32 address, Access access);
u8* shared_cluster_at(u32 address, Access access);
u32 dynamic_shared();
u32 mapa(u32 address, u32 rank);
inline u64 mapa_generic(u64 address, u32 rank) { return kSharedWindow + mapa((u32)address, rank); }

// 9.7.13, threads that wait for each other.
void bar_sync(u32 barrier, u32 threads, u32 site);  // threads = 0: all of the block
bool bar_red_or(bool vote, u32 site);
bool bar_red_and(bool vote, u32 site);
u32 bar_red_popc(bool vote, u32 site);
void bar_warp_sync(u32 mask, u32 site);
u32 vote_ballot(bool vote, u32 mask, u32 site);
bool vote_any(bool vote, u32 mask, u32 site);
bool vote_all(bool vote, u32 mask, u32 site);
u32 redux_add(u32 value, u32 mask, u32 site);
struct Shuffled {
  u32 value;
  bool is_valid;
};
Shuffled shfl_bfly(u32 value, u32 b, u32 c, u32 mask, u32 site);
Shuffled shfl_up(u32 value, u32 b, u32 c, u32 mask, u32 site);
Shuffled shfl_down(u32 value, u32 b, u32 c, u32 mask, u32 site);
Shuffled shfl_idx(u32 value, u32 b, u32 c, u32 mask, u32 site);
u32 activemask();
void barrier_cluster_arrive(bool is_release, u32 site);
void barrier_cluster_wait(u32 site);

// 9.7.9.25, asynchronous copies, and 9.7.13.15, mbarrier. Addresses of shared memory.
void cp_async(u32 to, u64 from, u32 bytes, u32 source_bytes, u32 site);
void cp_async_commit_group();
void cp_async_wait_group(u32 pending_groups);
void cp_async_bulk(u32 to, u64 from, u32 bytes, u32 barrier, u32 site);
void mbarrier_init(u32 barrier, u32 count, u32 site);
void mbarrier_inval(u32 barrier, u32 site);
void mbarrier_expect_tx(u32 barrier, u32 bytes, u32 site);
u64 mbarrier_arrive(u32 barrier, u32 count, u32 expected_bytes, u32 site);
bool mbarrier_try_wait_parity(u32 barrier, u32 parity, u32 site);
inline bool mbarrier_try_wait(u32 barrier, u64 state, u32 site) {
  return mbarrier_try_wait_parity(barrier, (u32)state, site);
}

// How many instructions of a unit a stretch of code without branches has, for counting.h.
struct Mix {
  u32 stretch;
  const char* unit;
  u32 instructions;
};
struct Parameter {
  u32 offset, bytes;
};
struct Kernel {
  const char* name;
  void (*run)(const u8* parameters);
  const Parameter* parameters;
  u32 parameter_count, static_shared, dynamic_alignment, most_threads, cluster_size;
  const char* const* sites;  // the instructions, for messages
  u64* executed;             // how often threads came through each stretch
  u32 stretches;
  const Mix* mixes;
  u32 mix_count;
};
struct Register {
  explicit Register(const Kernel& kernel);
};

}  // namespace ptx
