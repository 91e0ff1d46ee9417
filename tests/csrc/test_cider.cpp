// The CIDEr-D scorer without Python: a case worked by hand, and, so that AddressSanitizer sees it, many captions of any
// length, in threads.
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
  std::vector<int64_t> words, offsets = {0};

  void add(const std::vector<int64_t>& caption) {
    words.insert(words.end(), caption.begin(), caption.end());
    offsets.push_back(static_cast<int64_t>(words.size()));
  }
  Captions captions() const { return {words.data(), offsets.data(), static_cast<int64_t>(offsets.size()) - 1}; }
};

void test_worked_by_hand() {
  // idf is ln 2 but for word 3, which both images have: 0. Words clipped: 1 and 1, over norms sqrt(5) and sqrt(2); of
  // the pairs 11 and 12 one is the reference's. The second caption has three more words and pairs of its own.
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
  expect(scores[2] == 0, "a caption without words");
}

void test_threads() {
  std::mt19937 random(0);
  const auto draw = [&](int most) { return static_cast<int64_t>(random() % most); };
  const auto caption = [&] {
    std::vector<int64_t> words(draw(12));
    for (int64_t& word : words) word = draw(300);
    return words;
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
  expect(*std::max_element(truth.begin(), truth.end()) > 0.5, "some captions are like their references");
  for (const int64_t threads : {2, 5, 64}) {
    const Cider cider(references.captions(), images.data(), 700, threads);
    cider.score(captions.captions(), image_of.data(), scores.data(), threads);
    expect(scores == truth, "threads change no bit");
  }
}

}  // namespace

int main() {
  test_worked_by_hand();
  test_threads();
  if (failures == 0) std::printf("ok\n");
  return failures != 0;
}
