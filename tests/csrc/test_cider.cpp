// The CIDEr-D scorer without Python: a case worked by hand, and many captions of different lengths in several threads,
// checked by AddressSanitizer.
#include "cider/cider.h"

#include <cstdio>
#include <random>

using namespace attncap;

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

struct Corpus {
  std::vector<int64_t> tokens, offsets = {0};

  void add(const std::vector<int64_t>& caption) {
    tokens.insert(tokens.end(), caption.begin(), caption.end());
    offsets.push_back(static_cast<int64_t>(tokens.size()));
  }
  Captions captions() const { return {tokens.data(), offsets.data(), static_cast<int64_t>(offsets.size()) - 1}; }
};

void test_worked_by_hand() {
  // The idf is ln 2, except for token 3, which occurs in both images, so its idf is 0. First caption: the clipped
  // counts of tokens 1 and 2 are 1 and 1, the norms sqrt(5) and sqrt(2); of its bigrams, (1, 2) is in the reference and
  // (1, 1) is not. The second caption has three more tokens, and bigrams of its own.
  Corpus references, captions;
  references.add({1, 2, 3});
  references.add({3, 4});
  captions.add({1, 1, 2});
  captions.add({1, 1, 2, 9, 9, 9});
  captions.add({});
  const std::vector<int64_t> images = {0, 1, 2}, image_of = {0, 0, 1};
  double scores[3];
  Cider(references.captions(), images.data(), 2, 1).score(captions.captions(), image_of.data(), scores, 1);
  const double first = 2.5 * (2 / std::sqrt(10.0) + 0.5);
  const double second = 2.5 * std::exp(-9.0 / 72) * (2 / std::sqrt(28.0) + 1 / std::sqrt(14.0));
  expect(std::fabs(scores[0] - first) < 1e-12 && std::fabs(scores[1] - second) < 1e-12, "worked by hand");
  expect(scores[2] == 0, "a caption without tokens");
}

void test_threads() {
  std::mt19937 random(0);
  const auto draw = [&](int count) { return static_cast<int64_t>(random() % count); };
  const auto caption = [&] {
    std::vector<int64_t> tokens(draw(12));
    for (int64_t& token : tokens) token = draw(300);
    return tokens;
  };
  Corpus references, captions;
  std::vector<int64_t> images = {0}, image_of;
  for (int image = 0; image < 700; ++image) {
    for (int64_t r = draw(4); r >= 0; --r) references.add(caption());
    images.push_back(references.captions().count);
  }
  for (int i = 0; i < 1000; ++i) {
    captions.add(caption());
    image_of.push_back(draw(700));
  }
  std::vector<double> truth(1000), scores(1000);
  Cider(references.captions(), images.data(), 700, 1).score(captions.captions(), image_of.data(), truth.data(), 1);
  expect(*std::max_element(truth.begin(), truth.end()) > 0.5, "some captions are similar to their references");
  for (const int64_t threads : {2, 5, 64}) {
    const Cider cider(references.captions(), images.data(), 700, threads);
    cider.score(captions.captions(), image_of.data(), scores.data(), threads);
    expect(scores == truth, "the result does not depend on the number of threads");
  }
}

}  // namespace

int main() {
  test_worked_by_hand();
  test_threads();
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
