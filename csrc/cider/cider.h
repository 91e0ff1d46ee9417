// CIDEr-D (Vedantam et al. 2015, "CIDEr: Consensus-based Image Description Evaluation", section "CIDEr-D"), as
// coco-caption computes it under the name CIDEr. With g_n(x) the vector of caption x's n-grams, tf * idf each,
//
//   tf  = how often the n-gram occurs in the caption
//   idf = log(number of images) - log(max(1, number of images with the n-gram in a reference))
//   CIDEr-D(c, references) = 10 / 4 / |references| * sum over references r, over n = 1 to 4 of
//       exp(-(l_c - l_r)^2 / (2 * 6^2)) * min(g_n(c), g_n(r)) . g_n(r) / (|g_n(c)| |g_n(r)|)
//
// l is the number of tokens. (coco-caption takes the difference of the numbers of bigrams instead. The two differ only
// if one caption has no token, and then the score is 0 either way.) Tokens are integer ids. The constructor counts the
// references once; `score` then scores any captions against them.
//
// An n-gram is represented by a 64-bit hash. With ten million distinct n-grams (COCO has fewer), the probability of any
// collision is 3 in a million.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

namespace attncap {

// Captions, concatenated.
struct Captions {
  const int64_t* tokens;
  const int64_t* offsets;  // [count + 1]; caption i is tokens[offsets[i] .. offsets[i + 1] - 1]
  int64_t count;

  int64_t length(int64_t i) const { return offsets[i + 1] - offsets[i]; }
};

// Splits [0, count) into one range per thread and calls body(begin, end) on each.
template <typename Body>
void share_out(int64_t threads, int64_t count, const Body& body) {
  threads = std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, count));
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) {
    others.emplace_back([=, &body] { body(count * t / threads, count * (t + 1) / threads); });
  }
  body(0, count / threads);
  for (std::thread& thread : others) thread.join();
}

// The number of images in which each n-gram occurs: a hash table with open addressing, at most half full.
class DocumentFrequencies {
 public:
  DocumentFrequencies() : slots_(1 << 10) {}

  uint32_t operator[](uint64_t ngram) const { return slots_[find(ngram)].images; }

  // Images must be numbered from 1 and added in order.
  void add(uint64_t ngram, uint32_t image) {
    Slot& slot = slots_[find(ngram)];
    if (slot.last == image) return;
    const bool is_new = slot.images == 0;
    slot = {ngram, slot.images + 1, image};
    if (is_new && 2 * ++size_ > slots_.size()) grow();
  }

 private:
  struct Slot {
    uint64_t ngram;
    uint32_t images;  // 0: an empty slot
    uint32_t last;    // image that was counted last
  };

  // The slot of an n-gram, or the empty slot where it belongs.
  size_t find(uint64_t ngram) const {
    size_t i = ngram & (slots_.size() - 1);
    while (slots_[i].images != 0 && slots_[i].ngram != ngram) i = (i + 1) & (slots_.size() - 1);
    return i;
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.images != 0) slots_[find(slot.ngram)] = slot;
    }
  }

  size_t size_ = 0;
  std::vector<Slot> slots_;
};

class Cider {
 public:
  static constexpr int kMaxNgram = 4;    // longest n-gram, in tokens
  static constexpr double kSigma = 6.0;  // of the length penalty, in tokens

  // The references of image i are numbers images[i] to images[i + 1] - 1, at least one. images: [image_count + 1].
  Cider(Captions references, const int64_t* images, int64_t image_count, int64_t threads)
      : images_(images, images + image_count + 1),
        offsets_(references.offsets, references.offsets + references.count + 1),
        idf_(image_count + 1),
        norms_(references.count) {
    for (int64_t frequency = 0; frequency <= image_count; ++frequency) {
      idf_[frequency] =
          std::log(static_cast<double>(image_count)) - std::log(std::max(1.0, static_cast<double>(frequency)));
    }
    for (auto& ngrams : ngrams_) ngrams.resize(offsets_.back());
    share_out(threads, references.count, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t* tokens = references.tokens + offsets_[r];
        for (int n = 1; n <= kMaxNgram; ++n)
          make_ngrams(tokens, references.length(r), n, ngrams_[n - 1].data() + offsets_[r]);
      }
    });
    share_out(threads, kMaxNgram, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t image = 0; image < image_count; ++image) {
          for (int64_t r = images[image]; r < images[image + 1]; ++r) {
            const uint64_t* ngrams = ngrams_[k].data() + offsets_[r];
            const int64_t count = ngram_count(references.length(r), k + 1);
            for (int64_t i = 0; i < count; ++i) frequencies_[k].add(ngrams[i], image + 1);
          }
        }
      }
    });
    share_out(threads, references.count, [&](int64_t begin, int64_t end) {
      std::vector<Term> terms;
      for (int n = 1; n <= kMaxNgram; ++n) {
        for (int64_t r = begin; r < end; ++r) {
          norms_[r][n - 1] = weigh(ngrams_[n - 1].data() + offsets_[r], references.length(r), n, terms);
        }
      }
    });
  }

  int64_t image_count() const { return static_cast<int64_t>(images_.size()) - 1; }

  // Writes scores[i], of caption i against the references of image image_of[i]. The result does not depend on the
  // number of threads.
  void score(Captions captions, const int64_t* image_of, double* scores, int64_t threads) const {
    threads = std::min(threads, captions.count / 64 + 1);  // a thread needs at least 64 captions to pay off
    share_out(threads, captions.count, [&](int64_t begin, int64_t end) {
      std::vector<uint64_t> ngrams;
      std::vector<Term> terms;
      std::fill(scores + begin, scores + end, 0);
      for (int n = 1; n <= kMaxNgram; ++n) {  // the outer loop, so that only one hash table is in use at a time
        for (int64_t i = begin; i < end; ++i) {
          const int64_t length = captions.length(i), first = images_[image_of[i]], last = images_[image_of[i] + 1];
          ngrams.resize(length);
          make_ngrams(captions.tokens + captions.offsets[i], length, n, ngrams.data());
          const double norm = weigh(ngrams.data(), length, n, terms);
          double sum = 0;
          for (int64_t r = first; r < last; ++r) {
            const double norms = norm * norms_[r][n - 1];
            if (norms > 0) sum += dot(terms, r, n) / norms * penalty(length, offsets_[r + 1] - offsets_[r]);
          }
          scores[i] += 10 * sum / kMaxNgram / static_cast<double>(last - first);
        }
      }
    });
  }

 private:
  // An n-gram of a caption, how often it occurs there, and its idf.
  struct Term {
    uint64_t ngram;
    double times, idf;
  };

  static int64_t ngram_count(int64_t length, int n) { return std::max<int64_t>(0, length - n + 1); }

  // The n-grams of a caption, sorted.
  static void make_ngrams(const int64_t* tokens, int64_t length, int n, uint64_t* ngrams) {
    const int64_t count = ngram_count(length, n);
    for (int64_t i = 0; i < count; ++i) {
      uint64_t hash = 0;
      for (int j = 0; j < n; ++j) {  // the finalizer of SplitMix64 after each token
        hash += static_cast<uint64_t>(tokens[i + j]) + 0x9E3779B97F4A7C15u;
        hash = (hash ^ hash >> 30) * 0xBF58476D1CE4E5B9u;
        hash = (hash ^ hash >> 27) * 0x94D049BB133111EBu;
        hash ^= hash >> 31;
      }
      ngrams[i] = hash;
    }
    std::sort(ngrams, ngrams + count);
  }

  // Computes the terms of a caption of `length` tokens from its n-grams. Returns the norm of its vector.
  double weigh(const uint64_t* ngrams, int64_t length, int n, std::vector<Term>& terms) const {
    terms.clear();
    const int64_t count = ngram_count(length, n);
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || ngrams[i] != ngrams[i - 1]) terms.push_back({ngrams[i], 0, idf_[frequencies_[n - 1][ngrams[i]]]});
      ++terms.back().times;
    }
    double squares = 0;
    for (const Term& term : terms) squares += term.times * term.idf * (term.times * term.idf);
    return std::sqrt(squares);
  }

  // The dot product of a caption's vector, clipped to the reference's, and the reference's.
  double dot(const std::vector<Term>& terms, int64_t reference, int n) const {
    const uint64_t* ngrams = ngrams_[n - 1].data() + offsets_[reference];
    const uint64_t* end = ngrams + ngram_count(offsets_[reference + 1] - offsets_[reference], n);
    double sum = 0;
    for (const Term& term : terms) {
      while (ngrams < end && *ngrams < term.ngram) ++ngrams;
      double times = 0;
      for (; ngrams < end && *ngrams == term.ngram; ++ngrams) ++times;
      sum += std::min(term.times, times) * times * (term.idf * term.idf);
    }
    return sum;
  }

  static double penalty(int64_t length, int64_t reference_length) {
    const double difference = static_cast<double>(length - reference_length);
    return std::exp(-difference * difference / (2 * kSigma * kSigma));
  }

  std::vector<int64_t> images_;                             // [image_count + 1], first reference of each image
  std::vector<int64_t> offsets_;                            // [references + 1], first token of each reference
  std::array<std::vector<uint64_t>, kMaxNgram> ngrams_;     // [n - 1]: sorted n-grams, reference r's from offsets_[r]
  std::array<DocumentFrequencies, kMaxNgram> frequencies_;  // [n - 1]: of n-grams
  std::vector<double> idf_;                                 // [image_count + 1], by document frequency
  std::vector<std::array<double, kMaxNgram>> norms_;        // [references][n - 1], norms of the vectors
};

}  // namespace attncap
