// csrc/common/simd.h in one instruction set, compared with the C library in float64.
#include <cmath>
#include <cstdio>
#include <vector>

#include "common/simd.h"

using namespace attncap;

namespace {

int failures = 0;

void expect(bool condition, const char* what, double x) {
  if (condition) return;
  std::printf("FAILED: %s at %.9g\n", what, x);
  ++failures;
}

// The error in units in the last place of a float32.
double units(float actual, double truth) { return std::fabs(actual - truth) / (std::fabs(truth) * 0x1p-23 + 0x1p-149); }

void test_functions() {
  for (uint32_t bits = 0; bits <= 0x7f800000u; bits += 4099) {  // from 0 to infinity
    for (const float x : {bit_cast<float>(bits), -bit_cast<float>(bits)}) {
      const float exp_x = exp(broadcast(x))[0], tanh_x = tanh(broadcast(x))[kLanes<float> - 1];
      if (std::fabs(x) <= 87) expect(units(exp_x, std::exp(double(x))) <= 1 + std::fabs(x), "exp", x);
      if (x < -87) expect(exp_x == 0, "exp below -87", x);
      const float negative = exp_of_negative(broadcast(x))[0], least = exp(broadcast(-87.0f))[0];
      if (x <= 0) expect(negative == (x < -87 ? least : exp_x), "exp_of_negative", x);
      const float power = exp2_of_negative(broadcast(x))[0];
      if (x <= 0) expect(units(power, std::exp2(double(x < -126 ? -126 : x))) <= 1, "exp2_of_negative", x);
      expect(units(tanh_x, std::tanh(double(x))) <= 2.5, "tanh", x);
      const double short_error = short_tanh(broadcast(x))[0] / std::tanh(double(x)) - 1;
      expect(x == 0 || std::fabs(short_error) <= 1e-4, "short_tanh", x);
      expect(relu(broadcast(x))[0] == std::fmax(x, 0.0f), "relu", x);
    }
  }
  const Vector<float> nan = broadcast(NAN);
  expect(std::isnan(exp(nan)[0]) && std::isnan(exp_of_negative(nan)[0]) && std::isnan(exp2_of_negative(nan)[0]) &&
             std::isnan(tanh(nan)[0]) && std::isnan(short_tanh(nan)[0]) && std::isnan(relu(nan)[0]),
         "NaN stays NaN", NAN);
  expect(tanh(Vector<double>{} + 0.5)[0] == std::tanh(0.5), "tanh in float64", 0.5);
}

template <typename T>
void test_loads() {
  using acc_t = accumulate_t<T>;
  const int64_t lanes = kLanes<acc_t>;
  for (int64_t count = 0; count <= 3 * lanes; ++count) {  // exact lengths, for AddressSanitizer
    std::vector<T> values(count), copy(count);
    double sum = 0, seen = 0;
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(float(i - 5)), sum += i - 5;
    for_each_vector<acc_t>(count, [&](int64_t i, auto... rest) {
      const Vector<acc_t> vector = load(values.data() + i, rest...);
      seen += sum_of_lanes<acc_t>(vector);
      store(copy.data() + i, vector, rest...);
    });
    expect(seen == sum, "load and sum", count);
    for (int64_t i = 0; i < count; ++i) expect(float(copy[i]) == i - 5, "store", i);
  }
}

// Whole vectors of 16-bit numbers are converted as dtype.h converts single ones.
template <typename T>
void test_conversions() {
  T values[kLanes<float>];
  const auto equal = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    for (T& value : values) value.bits = static_cast<uint16_t>(bits);
    const Vector<float> vector = load(values);
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) expect(equal(vector[lane], values[lane]), "load", values[0]);
  }
  for (uint64_t bits = 0; bits < 0x100000000u; bits += 1021) {
    const float x = bit_cast<float>(static_cast<uint32_t>(bits));
    store(values, broadcast(x));
    for (const T& value : values) expect(equal(value, static_cast<T>(x)), "store", x);
  }
}

}  // namespace

int main() {
  test_functions();
  test_loads<float>();
  test_loads<double>();
  test_loads<bfloat16>();
  test_loads<float16>();
  test_conversions<bfloat16>();
  test_conversions<float16>();
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
