// Attention of new tokens over a cache of keys and values, as polygpt/kernels/cache_blocks.py defines it.
//
// Each row reads its own slots up to its last position, in place. XLA copies each block out of the stack of layers, up
// to the end of the longest row.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "products.h"

namespace polygpt {

constexpr int64_t QUERIES = 32;    // that are taken together
constexpr int64_t KEYS = 128;      // of a block, whose scores stay in the cache with those of the queries
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

// A query of a head, and what it has gathered from the blocks so far.
struct Query {
  Row row;
  int64_t position;
  float slope;
  const float* sink;
  float largest = -std::numeric_limits<float>::infinity(), denominator = 0;
};

// The scores of a block become weights; what was gathered before counts `kept` times as much from now on.
inline float weigh(Query& query, float* scores, const int32_t* held, int64_t size, const Rule& rule) {
  const float none = -std::numeric_limits<float>::infinity();
  const int32_t position = query.position, window = rule.window ? rule.window : std::numeric_limits<int32_t>::max();
  if (rule.softcap)
    for (int64_t s = 0; s < size; s++) scores[s] = rule.softcap * std::tanh(scores[s] * rule.scale / rule.softcap);
  const float scale = rule.softcap ? 1.0f : rule.scale;
  Floats most = Floats{} + std::numeric_limits<float>::lowest();  // finite, for scores that are not
  for (int64_t s = 0; s < size; s += LANES) {
    const Ints holds = read<Ints>(held + s), distance = position - holds;
    const auto seen = (holds >= 0) & (distance >= 0) & (distance < window);
    const Floats score = seen ? load(scores + s) * scale - query.slope * to_floats(distance) : Floats{} + none;
    most = score > most ? score : most;
    std::memcpy(scores + s, &score, sizeof score);
  }
  float higher = query.largest;
  for (int i = 0; i < LANES; i++) higher = std::max(higher, most[i]);
  Floats total = {};
  for (int64_t s = 0; s < size; s += LANES) {
    const Floats score = load(scores + s), weights = score == none ? Floats{} : exponential(score - higher);
    total += weights;
    std::memcpy(scores + s, &weights, sizeof weights);
  }
  const float kept = std::exp(query.largest - higher);
  query.denominator = query.denominator * kept + sum(total);
  query.largest = higher;
  return kept;
}

// The position that each slot from `start` on holds: the last one that falls on it. Negative if there is none.
inline void positions_of(int32_t* held, int64_t start, int64_t size, int64_t padded, int64_t last, int64_t slots) {
  if (last < slots) {  // no slot was written twice: no division for each of them
    for (int32_t s = 0; s < size; s++) held[s] = start + s <= last ? start + s : -1;
  } else {
    for (int64_t s = 0; s < size; s++) held[s] = last - (last - start - s) % slots;
  }
  std::fill(held + size, held + padded, -1);
}

// What to fetch during `size` rows of an array of which those of another come next.
template <class T>
inline Ahead after(const T* rows, int64_t size, const T* next, int64_t dim) {
  const int64_t lead = std::min<int64_t>(size, std::max<int64_t>(1, AHEAD / (dim * int64_t(sizeof(T)))));
  const int64_t bytes = dim * int64_t(sizeof(T));
  return {lead * bytes, size - lead, ((const char*)next - (const char*)rows) - (size - lead) * bytes};
}

// R queries and V vectors of their output, from number h on: what was gathered, and the block's values.
template <int R, int V, class T>
inline void mix(const float* weights, const float* kept, const T* values, int64_t size, int64_t dim, float* mixed,
                Ahead ahead) {
  Floats sums[R][V] = {};
  for (int64_t s = 0; s < size; s++) {
    Floats value[V];
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) {
      value[j] = load(values + s * dim + j * LANES);
      fetch(values + s * dim + j * LANES, ahead.of(s));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Floats weight = Floats{} + weights[r * KEYS + s];
#pragma GCC unroll 8
      for (int j = 0; j < V; j++) sums[r][j] = add_product(sums[r][j], weight, value[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int j = 0; j < V; j++) {
      float* to = mixed + r * dim + j * LANES;
      const Floats all = add_product(sums[r][j], load(to), Floats{} + kept[r]);
      std::memcpy(to, &all, sizeof all);
    }
}

template <int R, class T>
void mix_rows(const float* weights, const float* kept, const T* values, int64_t size, int64_t dim, float* mixed,
              Ahead ahead) {
  int64_t h = 0;
  auto some = [&](auto vectors) {
    for (; h + vectors * LANES <= dim; h += vectors * LANES)
      mix<R, vectors>(weights, kept, values + h, size, dim, mixed + h, ahead);
  };
  // Four, where the sums leave registers for the values.
  some(std::integral_constant<int, (R * 4 <= ROWS * OUTPUTS / 2 ? 4 : 2)>());
  some(std::integral_constant<int, 2>());
  some(std::integral_constant<int, 1>());
  for (; h < dim; h++)
    for (int r = 0; r < R; r++) {
      float total = 0;
      for (int64_t s = 0; s < size; s++) total = add_product(total, weights[r * KEYS + s], one(values[s * dim + h]));
      mixed[r * dim + h] = add_product(total, mixed[r * dim + h], kept[r]);
    }
}

// Up to QUERIES queries, which share keys k and values v: softmax over the keys that each sees, block by block (Milakov
// and Gimelshein 2018), of the first `used` slots. What a query does not see adds exact zeros to its sums, so a result
// has the same bits whatever else is in the batch.
template <class T>
void attend(Query* queries, int64_t count, const T* k, const T* v, const Rule& rule, int64_t last, int64_t used,
            const Cache& cache) {
  const int64_t dim = cache.dim, slots = cache.slots;
  float mixed[QUERIES * HEAD_DIM], scores[QUERIES * KEYS], kept[QUERIES];
  int32_t held[KEYS];
  Row rows[QUERIES];
  for (int64_t n = 0; n < count; n++) {
    rows[n] = {queries[n].row.x, scores + n * KEYS};
    std::fill_n(mixed + n * dim, dim, 0.0f);
  }
  for (int64_t start = 0; start < used; start += KEYS) {
    const int64_t size = std::min(KEYS, used - start), padded = (size + LANES - 1) / LANES * LANES;
    positions_of(held, start, size, padded, last, slots);
    // After the keys come the block's values, and after those the keys of the next block, or of the next head
    // (wrong where more queries of this head follow, as in a prompt; it is only fetched).
    const T *keys = k + start * dim, *values = v + start * dim;
    const T* next = start + KEYS < used ? keys + KEYS * dim : k + slots * dim;
    const Ahead to_values = after(keys, size, values, dim), to_next = after(values, size, next, dim);
    all_rows(count, [&](auto few, int64_t n) {
      some_rows<few>(rows + n, keys, (const float*)nullptr, dim, 0, size, to_values);
      for (int64_t r = n; r < n + few; r++) {
        std::fill(scores + r * KEYS + size, scores + r * KEYS + padded, 0.0f);
        kept[r] = weigh(queries[r], scores + r * KEYS, held, padded, rule);
      }
      mix_rows<few>(scores + n * KEYS, kept + n, values, size, dim, mixed + n * dim, to_next);
    });
  }
  for (int64_t n = 0; n < count; n++) {
    Query& query = queries[n];
    float kept = 1;
    if (query.sink) {
      const float higher = std::max(query.largest, *query.sink);
      kept = std::exp(query.largest - higher);
      query.denominator = query.denominator * kept + std::exp(*query.sink - higher);
    }
    for (int64_t i = 0; i < dim; i++)  // NaN stays
      query.row.y[i] = query.denominator == 0 ? 0 : mixed[n * dim + i] * kept / query.denominator;
  }
}

}  // namespace polygpt
