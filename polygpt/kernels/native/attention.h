// Attention of a few new tokens over a cache of keys and values, as polygpt/kernels/cache_blocks.py defines it.
//
// Each row reads its own slots up to its last position, in place. XLA copies each block out of the stack of layers, up
// to the end of the longest row.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vectors.h"

namespace polygpt {

constexpr int64_t KEYS = 128;      // of a block, whose scores stay in the L1 cache
constexpr int64_t HEAD_DIM = 256;  // at most

struct Cache {
  int64_t rows, tokens, heads, kv_heads, slots, dim;
};

struct Rule {
  float scale, softcap;  // softcap 0: none
  int64_t window;        // 0: none
};

// e to the power of each number <= 0, within 2 ulp: 2**n times a polynomial (Cephes, expf).
inline Floats exponential(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to a whole number in the lowest bits
  const Floats n = shifted - 12582912.0f;
  x = x - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * x + 1.3981999507e-3f;
  p = p * x + 8.3334519073e-3f;
  p = p * x + 4.1665795894e-2f;
  p = p * x + 1.6666665459e-1f;
  p = p * x + 5.0000001201e-1f;
  p = p * x * x + x + 1.0f;
  return p * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// One query of one head: softmax over the keys that it sees, block by block (Milakov and Gimelshein 2018).
template <class T>
void attend(const float* q, const T* k, const T* v, const Rule& rule, float slope, const float* sink, int64_t position,
            int64_t last, int64_t used, const Cache& cache, float* out) {
  const int64_t dim = cache.dim, whole = dim / LANES * LANES, slots = cache.slots;
  const float none = -std::numeric_limits<float>::infinity();
  float mixed[HEAD_DIM] = {}, largest = none, denominator = 0;
  for (int64_t start = 0; start < used; start += KEYS) {
    const int64_t size = std::min(KEYS, used - start);
    float scores[KEYS], block = std::numeric_limits<float>::lowest();  // finite, for scores that are not
    bool seen = false;
    for (int64_t s = 0; s < size; s++) {
      // The position that the slot holds: the last one that falls on it. Negative if there is none.
      const int64_t back = last - (start + s), held = last - (back % slots + slots) % slots, distance = position - held;
      if (held < 0 || distance < 0 || (rule.window && distance >= rule.window)) {
        scores[s] = none;
        continue;
      }
      const T* key = k + (start + s) * dim;
      Floats sums = {};
      for (int64_t i = 0; i < whole; i += LANES) sums += load(q + i) * load(key + i);
      float score = sum(sums);
      for (int64_t i = whole; i < dim; i++) score += q[i] * one(key[i]);
      score *= rule.scale;
      if (rule.softcap) score = rule.softcap * std::tanh(score / rule.softcap);
      scores[s] = score - slope * distance;
      block = std::max(block, scores[s]);
      seen = true;
    }
    if (!seen) continue;
    const float higher = std::max(largest, block), kept = std::exp(largest - higher);
    for (int64_t s = size; s < (size + LANES - 1) / LANES * LANES; s++) scores[s] = none;
    for (int64_t s = 0; s < size; s += LANES) {
      Floats weights = exponential(load(scores + s) - higher);
      weights = load(scores + s) == none ? Floats{} : weights;
      std::memcpy(scores + s, &weights, sizeof weights);
    }
    denominator *= kept;
    for (int64_t i = 0; i < dim; i++) mixed[i] *= kept;
    for (int64_t s = 0; s < size; s++) {
      const float weight = scores[s];
      if (weight == 0) continue;
      denominator += weight;
      const T* value = v + (start + s) * dim;
      for (int64_t i = 0; i < whole; i += LANES) {
        const Floats more = load(mixed + i) + weight * load(value + i);
        std::memcpy(mixed + i, &more, sizeof more);
      }
      for (int64_t i = whole; i < dim; i++) mixed[i] += weight * one(value[i]);
    }
    largest = higher;
  }
  if (sink) {
    const float higher = std::max(largest, *sink), kept = std::exp(largest - higher);
    denominator = denominator * kept + std::exp(*sink - higher);
    for (int64_t i = 0; i < dim; i++) mixed[i] *= kept;
  }
  for (int64_t i = 0; i < dim; i++) out[i] = denominator == 0 ? 0 : mixed[i] / denominator;  // NaN stays
}

}  // namespace polygpt
