// CIDEr-D (Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation", section "CIDEr-D"), as
// coco-caption computes it under the name CIDEr. With g_n(x) the vector of caption x's n-grams, tf * idf each,
//
//   tf  = how often the caption has the n-gram
//   idf = log(images) - log(images that have it in a reference, at least 1)
//   CIDEr-D(c, references) = 10 / 4 / |references| * sum over references r, over n = 1 to 4 of
//       exp(-(l_c - l_r)^2 / (2 * 6^2)) * min(g_n(c), g_n(r)) . g_n(r) / (|g_n(c)| |g_n(r)|)
//
// l is counted in pairs of words, as coco-caption does. Words are ids. The references are counted once; a call then
// scores any captions against them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace attncap {

// Captions one after the other.
struct Captions {
  const int64_t* words;    // from 0 to 2^32 - 1
  const int64_t* offsets;  // [count + 1]; caption i is words[offsets[i]] up to words[offsets[i + 1]]
  int64_t count;
};

// A number for each n-gram, from `first` on: found by the number of its first n - 1 words (0: there are none) and its
// last word, so no two n-grams can share one. A hash table with open addressing, at most half full.
class NgramNumbers {
 public:
  explicit NgramNumbers(uint32_t first = 1) : first_(first), slots_(1 << 10) {}

  uint32_t end() const { return first_ + size_; }  // the next number

  // 0 where it has none.
  uint32_t find(uint32_t prefix, uint32_t word) const { return slots_[place(key(prefix, word))].number; }

  uint32_t find_or_add(uint32_t prefix, uint32_t word) {
    const uint64_t wanted = key(prefix, word);
    Slot& slot = slots_[place(wanted)];
    if (slot.number != 0) return slot.number;
    const uint32_t number = end();
    slot = {wanted, number};
    if (2 * ++size_ > slots_.size()) grow();
    return number;
  }

  void clear() {
    if (size_ > 0) std::fill(slots_.begin(), slots_.end(), Slot{});
    size_ = 0;
  }

 private:
  struct Slot {
    uint64_t key;
    uint32_t number;  // 0: empty
  };

  static uint64_t key(uint32_t prefix, uint32_t word) { return uint64_t{prefix} << 32 | word; }

  size_t place(uint64_t key) const {
    const uint64_t mixed = key * 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio: all bits of the key reach the upper half
    for (size_t i = mixed >> 32;; ++i) {
      const Slot& slot = slots_[i & (slots_.size() - 1)];
      if (slot.number == 0 || slot.key == key) return i & (slots_.size() - 1);
    }
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.number != 0) slots_[place(slot.key)] = slot;
    }
  }

  uint32_t first_, size_ = 0;
  std::vector<Slot> slots_;
};

class Cider {
 public:
  static constexpr int kLongest = 4;     // words of an n-gram
  static constexpr double kSigma = 6.0;  // words by which lengths may differ before it costs much

  // The references of image i are those from images[i] up to images[i + 1] of [image_count + 1], one or more.
  Cider(Captions references, const int64_t* images, int64_t image_count)
      : images_(images, images + image_count + 1), most_idf_(std::log(static_cast<double>(image_count))) {
    std::vector<uint32_t> scratch;
    std::vector<int64_t> images_with, last_image;  // of an n-gram
    counts_.reserve(references.count);
    for (int64_t image = 0; image < image_count; ++image) {
      for (int64_t i = images[image]; i < images[image + 1]; ++i) {
        Counts& counts = counts_.emplace_back();
        count(references, i, counts, scratch,
              [&](uint32_t prefix, uint32_t word) { return numbers_.find_or_add(prefix, word); });
        images_with.resize(numbers_.end(), 0);
        last_image.resize(numbers_.end(), -1);
        for (const Count& entry : counts.entries) {
          if (last_image[entry.ngram] != image) ++images_with[entry.ngram];
          last_image[entry.ngram] = image;
        }
      }
    }
    for (const int64_t with : images_with) idf_.push_back(most_idf_ - std::log(std::max(1.0, double(with))));
    for (Counts& counts : counts_) set_norms(counts);
  }

  int64_t image_count() const { return static_cast<int64_t>(images_.size()) - 1; }

  // scores[i]: of caption i against the references of image image_of[i]. The threads share the captions out; a score
  // does not depend on how.
  void score(Captions captions, const int64_t* image_of, double* scores, int64_t threads) const {
    threads = std::clamp<int64_t>(threads, 1, captions.count / 64 + 1);
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; ++t) {
      others.emplace_back([=, this] {
        score_range(captions, image_of, scores, captions.count * t / threads, captions.count * (t + 1) / threads);
      });
    }
    score_range(captions, image_of, scores, 0, captions.count / threads);
    for (std::thread& thread : others) thread.join();
  }

 private:
  struct Count {
    uint32_t ngram;
    uint32_t times;
  };

  // The n-grams of a caption.
  struct Counts {
    std::vector<Count> entries;   // for n = 1 to 4, by rising number within each
    size_t starts[kLongest + 1];  // where those of each n begin
    double norms[kLongest];
    int64_t pairs;  // of words, the length of the penalty
  };

  // All but the norms. `number(prefix, word)`: the number of the n-gram. `scratch` is free to use.
  template <typename Number>
  static void count(Captions captions, int64_t caption, Counts& counts, std::vector<uint32_t>& scratch,
                    const Number& number) {
    const int64_t* words = captions.words + captions.offsets[caption];
    const int64_t length = captions.offsets[caption + 1] - captions.offsets[caption];
    counts.entries.clear();
    counts.pairs = std::max<int64_t>(0, length - 1);
    scratch.assign(2 * length, 0);
    uint32_t *ngrams = scratch.data(), *sorted = ngrams + length;  // ngrams[i]: the one that begins at word i
    for (int n = 1; n <= kLongest; ++n) {
      counts.starts[n - 1] = counts.entries.size();
      const int64_t found = std::max<int64_t>(0, length - n + 1);
      for (int64_t i = 0; i < found; ++i) ngrams[i] = number(ngrams[i], static_cast<uint32_t>(words[i + n - 1]));
      std::copy(ngrams, ngrams + found, sorted);
      std::sort(sorted, sorted + found);
      for (int64_t i = 0; i < found; ++i) {
        if (i == 0 || sorted[i] != sorted[i - 1]) counts.entries.push_back({sorted[i], 0});
        ++counts.entries.back().times;
      }
    }
    counts.starts[kLongest] = counts.entries.size();
  }

  double weight(Count entry) const { return entry.times * (entry.ngram < idf_.size() ? idf_[entry.ngram] : most_idf_); }

  void set_norms(Counts& counts) const {
    for (int n = 0; n < kLongest; ++n) {
      double sum = 0;
      for (size_t i = counts.starts[n]; i < counts.starts[n + 1]; ++i) {
        sum += weight(counts.entries[i]) * weight(counts.entries[i]);
      }
      counts.norms[n] = std::sqrt(sum);
    }
  }

  double similarity(const Counts& caption, const Counts& reference) const {
    double sum = 0;
    for (int n = 0; n < kLongest; ++n) {
      const double norms = caption.norms[n] * reference.norms[n];
      if (norms == 0) continue;
      double dot = 0;
      size_t j = reference.starts[n];
      for (size_t i = caption.starts[n]; i < caption.starts[n + 1]; ++i) {
        while (j < reference.starts[n + 1] && reference.entries[j].ngram < caption.entries[i].ngram) ++j;
        if (j == reference.starts[n + 1]) break;
        if (reference.entries[j].ngram != caption.entries[i].ngram) continue;
        const double theirs = weight(reference.entries[j]);
        dot += std::min(weight(caption.entries[i]), theirs) * theirs;
      }
      sum += dot / norms;
    }
    const double delta = static_cast<double>(caption.pairs - reference.pairs);
    return sum * std::exp(-delta * delta / (2 * kSigma * kSigma));
  }

  void score_range(Captions captions, const int64_t* image_of, double* scores, int64_t begin, int64_t end) const {
    NgramNumbers unseen(numbers_.end());  // the n-grams of a caption that no reference has
    std::vector<uint32_t> scratch;
    Counts counts;
    for (int64_t i = begin; i < end; ++i) {
      unseen.clear();
      count(captions, i, counts, scratch, [&](uint32_t prefix, uint32_t word) {
        const uint32_t known = numbers_.find(prefix, word);
        return known != 0 ? known : unseen.find_or_add(prefix, word);
      });
      set_norms(counts);
      const int64_t first = images_[image_of[i]], last = images_[image_of[i] + 1];
      double sum = 0;
      for (int64_t reference = first; reference < last; ++reference) sum += similarity(counts, counts_[reference]);
      scores[i] = 10 * sum / kLongest / static_cast<double>(last - first);
    }
  }

  std::vector<int64_t> images_;  // [image_count + 1], the first reference of each
  NgramNumbers numbers_;         // of all n-grams of the references
  std::vector<Counts> counts_;   // of each reference
  std::vector<double> idf_;      // by number
  double most_idf_;              // of an n-gram that no reference has
};

}  // namespace attncap
