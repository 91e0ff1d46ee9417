// Calls one of csrc's launchers with random inputs of the given sizes: the driver of ptx.count(), whose documentation
// lists the cases.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define USE_CUDA
#include "beam_search_step/beam_search_step.h"
#include "fake_cudart.h"
#include "lstm_step/lstm_step.h"
#include "soft_attention/soft_attention.h"

using namespace attncap;

namespace {

// The arguments after the name of the case.
struct Arguments {
  std::vector<std::string> words;
  size_t next = 0;

  std::string word() {
    if (next == words.size()) throw std::runtime_error("too few arguments");
    return words[next++];
  }
  int64_t number() { return std::stoll(word()); }
  Activation activation() { return word() == "relu" ? Activation::relu : Activation::tanh; }
  bool has(const std::string& flag) const {
    for (size_t i = next; i < words.size(); ++i) {
      if (words[i] == flag) return true;
    }
    return false;
  }
};

std::mt19937 generator(0);

// Arrays that live as long as the program, aligned as torch's are.
template <typename T>
T* array(int64_t count) {
  return static_cast<T*>(std::aligned_alloc(512, (count * sizeof(T) + 511) / 512 * 512));
}
template <typename T>
T* normal(int64_t count, double scale = 1) {
  std::normal_distribution<double> distribution(0, scale);
  T* const values = array<T>(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(static_cast<float>(distribution(generator)));
  return values;
}
template <typename T>
T* filled(int64_t count, T value) {
  T* const values = array<T>(count);
  std::fill_n(values, count, value);
  return values;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(fake_cudart::error);
}

template <typename T>
void soft_attention(Arguments& arguments) {
  const int64_t B = arguments.number(), K = arguments.number(), P = arguments.number(), D = arguments.number();
  const int64_t A = arguments.number(), N = B * K;
  SoftAttentionForward<T> params{};
  params.sizes = {B, K, P, D, A};
  params.activation = arguments.activation();
  params.features_stride = P * D, params.keys_stride = P * A, params.query_stride = A, params.gate_stride = D;
  params.features = normal<T>(B * P * D), params.keys = normal<T>(B * P * A), params.query = normal<T>(N * A);
  params.score_weight = normal<T>(A, 0.05);
  if (arguments.has("mask")) params.mask = filled<bool>(B * P, true);
  if (arguments.has("gate")) params.gate = normal<T>(N * D);
  params.context = array<T>(N * D), params.weights = array<T>(N * P);
  params.scores = array<accumulate_t<T>>(N * P);
  params.context_parts = array<accumulate_t<T>>(soft_attention_parts_cuda<T>(params.sizes) * N * D);
  check(soft_attention_forward_cuda(params, nullptr));
}

template <typename T>
void soft_attention_backward(Arguments& arguments) {
  using acc_t = accumulate_t<T>;
  const int64_t B = arguments.number(), K = arguments.number(), P = arguments.number(), D = arguments.number();
  const int64_t A = arguments.number(), N = B * K;
  SoftAttentionBackward<T> params{};
  params.sizes = {B, K, P, D, A};
  params.activation = arguments.activation();
  params.features_stride = P * D, params.keys_stride = P * A, params.query_stride = A;
  params.gate_stride = params.gate_grad_stride = D;
  params.context_grad = normal<T>(N * D), params.weights_grad = normal<T>(N * P);
  params.features = normal<T>(B * P * D), params.keys = normal<T>(B * P * A), params.query = normal<T>(N * A);
  params.score_weight = normal<T>(A, 0.05);
  params.context = normal<T>(N * D), params.weights = filled<T>(N * P, static_cast<T>(1.0f / P));
  if (arguments.has("features")) params.features_grad = array<T>(B * P * D);
  if (arguments.has("keys")) {
    params.keys_grad = array<T>(B * P * A), params.score_weight_grad = array<acc_t>(B * A);
  }
  if (arguments.has("gate")) params.gate = normal<T>(N * D), params.gate_grad = array<T>(N * D);
  params.query_grad = array<acc_t>(N * A);
  params.gated_grad = array<acc_t>(N * D), params.score_grad = array<acc_t>(N * P);
  check(soft_attention_backward_cuda(params, nullptr));
}

template <typename T>
void soft_attention_keys_backward(Arguments& arguments) {
  const int64_t B = arguments.number(), rows = arguments.number(), P = arguments.number(), A = arguments.number();
  SoftAttentionKeysBackward<T> params{};
  params.sizes = {B, 0, P, 0, A};
  params.activation = arguments.activation();
  params.keys_stride = P * A, params.query_stride = A;
  params.keys = normal<T>(B * P * A), params.query = normal<T>(B * rows * A), params.score_weight = normal<T>(A, 0.05);
  params.score_grad = normal<accumulate_t<T>>(B * rows * P);
  int64_t* const row_starts = array<int64_t>(B + 1);
  for (int64_t b = 0; b <= B; ++b) row_starts[b] = b * rows;
  params.row_starts = row_starts;
  params.keys_grad = array<T>(B * P * A), params.score_weight_grad = array<accumulate_t<T>>(B * A);
  check(soft_attention_keys_backward_cuda(params, nullptr));
}

template <typename T>
void beam_search_step(Arguments& arguments) {
  const int64_t B = arguments.number(), J = arguments.number(), K = arguments.number(), V = arguments.number();
  BeamSearchStep<T> params{};
  params.sizes = {B, J, K, V};
  params.inverse_temperature = params.length_penalty = params.last_length_penalty = 1;
  params.end_allowed = true, params.shrink = !arguments.has("fixed");
  params.logits_stride = V;
  params.logits = normal<T>(B * J * V, 2);
  float* const scores = filled<float>(B * J, 0);
  for (int64_t i = 0; i < B * J; ++i) scores[i] = -0.1f * (i % J);
  params.scores = scores, params.finished = filled<float>(B * K, -INFINITY);
  params.tokens = array<int64_t>(B * K), params.parents = array<int64_t>(B * K);
  params.next_scores = array<float>(B * K), params.ended = array<float>(B * J);
  params.next_finished = array<float>(B * K);
  check(beam_search_step_cuda(params, nullptr));
}

template <typename T>
void lstm_step(Arguments& arguments) {
  const int64_t N = arguments.number(), H = arguments.number(), E = arguments.number(), V = 9490;
  LstmStep<T> params{};
  params.N = N, params.H = H, params.E = E;
  params.recurrent_stride = 4 * H, params.context_stride = 4 * H + E;
  params.recurrent = normal<T>(N * 4 * H), params.context_part = normal<T>(N * (4 * H + E));
  params.word_table = filled<T>(V * (4 * H + E), static_cast<T>(0.5f)), params.c = normal<T>(N * H);
  int64_t *const parents = array<int64_t>(N), *const tokens = array<int64_t>(N);
  for (int64_t n = 0; n < N; ++n) parents[n] = n, tokens[n] = generator() % V;
  params.parents = parents, params.tokens = tokens;
  params.next_h = array<T>(N * H), params.next_c = array<T>(N * H), params.output = array<T>(N * E);
  check(lstm_step_cuda(params, nullptr));
}

template <typename T>
void lstm_step_backward(Arguments& arguments) {
  const int64_t N = arguments.number(), H = arguments.number();
  LstmStepBackward<T> params{};
  params.N = N, params.H = H;
  params.recurrent_stride = params.context_stride = params.gates_grad_stride = 4 * H;
  params.recurrent = normal<T>(N * 4 * H), params.context_part = normal<T>(N * 4 * H);
  params.word_inputs = normal<T>(N * 4 * H), params.c = normal<T>(N * H);
  params.next_h_grad = normal<T>(N * H), params.next_c_grad = normal<T>(N * H);
  params.gates_grad = array<T>(N * 4 * H), params.c_grad = array<T>(N * H);
  check(lstm_step_backward_cuda(params, nullptr));
}

#define WITHOUT_FLOAT64(op) \
  {#op " float32", op<float>}, {#op " bfloat16", op<bfloat16>}, { #op " float16", op<float16> }
#define ALL_DTYPES(op) {#op " float64", op<double>}, WITHOUT_FLOAT64(op)
const std::map<std::string, void (*)(Arguments&)> cases = {
    ALL_DTYPES(soft_attention),   ALL_DTYPES(soft_attention_backward), ALL_DTYPES(soft_attention_keys_backward),
    ALL_DTYPES(lstm_step),        ALL_DTYPES(lstm_step_backward),      WITHOUT_FLOAT64(beam_search_step),
};

}  // namespace

int main(int count, char** words) {
  try {
    if (count < 3) throw std::runtime_error("usage: count OP DTYPE SIZES...");
    Arguments arguments{{words + 3, words + count}};
    cases.at(std::string(words[1]) + " " + words[2])(arguments);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
