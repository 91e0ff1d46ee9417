// What the tests of the ops share. Include cuda_emulator.h first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"

namespace attncap {

inline int failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// Prints a summary and returns the exit status of the test.
inline int report() {
  for (const Isa isa : {Isa::avx2, Isa::avx512}) {
    if (isa > best_isa()) std::printf("skipped: this processor does not support instruction set %d\n", int(isa));
  }
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}

inline void serial(int64_t count, void (*work)(int64_t, int64_t, void*), void* context) { work(0, count, context); }

// Each index in a call of its own, the last one first, since results must not depend on the order.
inline void backwards(int64_t count, void (*work)(int64_t, int64_t, void*), void* context) {
  while (count-- > 0) work(count, count + 1, context);
}

// Calls body(name, isa, threads) for every instruction set that this processor supports.
template <typename Body>
void for_each_isa(const Body& body) {
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    for (const Threads threads : {serial, backwards}) {
      if (isa <= best_isa()) body("CPU " + std::to_string(int(isa)), isa, threads);
    }
  }
}

// Calls body(name, schedule) for every schedule that the emulator has.
template <typename Body>
void for_each_schedule(const Body& body) {
  for (const cuda_emulator::Schedule schedule : cuda_emulator::kSchedules) {
    body("schedule " + std::to_string(int(schedule)), schedule);
  }
}

template <typename T>
std::vector<T> normal(int64_t count, double scale, std::mt19937& random) {
  std::normal_distribution<double> distribution(0, scale);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(static_cast<float>(distribution(random)));
  return values;
}

template <typename T>
std::vector<double> widen(const std::vector<T>& values) {
  return std::vector<double>(values.begin(), values.end());
}

// Expects the largest error, relative to the largest true value, to be at most `tolerance`.
template <typename T>
void compare(const std::string& name, const std::vector<T>& actual, const std::vector<double>& truth,
             double tolerance) {
  double largest = 1e-30, error = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    largest = std::max(largest, std::fabs(truth[i]));
    const double difference = std::fabs(static_cast<double>(actual[i]) - truth[i]);
    if (!(difference <= error)) error = difference;  // once NaN, stays NaN
  }
  if (truth.size() == actual.size() && error <= tolerance * largest + 1e-30) return;
  std::printf("FAILED: %s: error %g of %g\n", name.c_str(), error, largest);
  ++failures;
}

}  // namespace attncap
