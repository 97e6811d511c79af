// Products of a few rows with packed weights: y [M, O] = x [M, I] times the transpose of weights [O, I].
//
// XLA's CPU backend has no product that converts its weights as it reads them for more than one row, and its float32
// products of 8 rows take twice as long as reading the weights. Here each weight is read once for 8 rows, converted in
// registers, and the next weights are fetched meanwhile (figures in benchmarks/README.md).
//
// A row's sums are taken in the same order whatever the number of rows, so that a text has the same bits alone and
// among others.

#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "vectors.h"

namespace polygpt {

// Bytes ahead of the product at which weights are fetched into the L2 cache: at least those of the tile that is being
// multiplied. With fewer (4096, tiles of 6912) 8 rows of float32 took 23 ms where reading takes 17, into the L1 cache 26.
constexpr int64_t AHEAD = 8192;
constexpr int64_t PIECE = 512;  // inputs of a block in 4 bits, whose scaled rows stay in the L1 cache
constexpr int GROUP = 16, HALF = GROUP / 2;  // outputs of such a block, and those in the low halves of its bytes
constexpr float ZERO_STEPS = 16;

// A row of x and its place in y.
struct Row {
  const float* x;
  float* y;
};

// Calls some(std::integral_constant<int, R>(), first row) for all rows: as many at a time as a tile has.
template <int R = ROWS - 1, class Some>
inline void all_rows(int64_t rows, Some some, int64_t row = 0) {
  for (; row + ROWS <= rows; row += ROWS) some(std::integral_constant<int, ROWS>(), row);
  if (rows - row == R) some(std::integral_constant<int, R>(), row);
  else if constexpr (R > 1) all_rows<R - 1>(rows, some, row);
}

// --- Weights of 8, 16 and 32 bits -----------------------------------------------------------------------------

// R rows and C outputs, from the output `o` on; what lies `ahead` bytes from the weights is fetched.
template <int R, int C, class T>
inline void tile(const Row* rows, const T* weights, const float* scale, int64_t inputs, int64_t o, int64_t ahead) {
  const float* x[R];
  for (int r = 0; r < R; r++) x[r] = rows[r].x;
  weights += o * inputs;
  Floats sums[C][R] = {};
  int64_t i = 0;
  for (; i + LANES <= inputs; i += LANES) {
    Floats w[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      w[c] = load(weights + c * inputs + i);
      fetch(weights + c * inputs + i, ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Floats row = load(x[r] + i);
      keep(row);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[c][r] = add_product(sums[c][r], row, w[c]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; c++) {
    float totals[R];
    sums_of(sums[c], totals);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      for (int64_t j = i; j < inputs; j++) totals[r] = add_product(totals[r], x[r][j], one(weights[c * inputs + j]));
      rows[r].y[o + c] = scale ? totals[r] * scale[o + c] : totals[r];
    }
  }
}

// How far ahead of row n of an array lies what is fetched: `bytes`, and from row `turn` on `then`, in another array.
struct Ahead {
  int64_t bytes, turn = std::numeric_limits<int64_t>::max(), then = 0;

  int64_t of(int64_t n) const { return n < turn ? bytes : then; }
};

// At least the size of a tile.
template <class T>
inline Ahead beyond_a_tile(int64_t inputs) { return {std::max<int64_t>(AHEAD, OUTPUTS * inputs * sizeof(T))}; }

template <int R, class T>
void some_rows(const Row* rows, const T* weights, const float* scale, int64_t inputs, int64_t from, int64_t to,
               Ahead ahead) {
  int64_t o = from;
  for (; o + OUTPUTS <= to; o += OUTPUTS) tile<R, OUTPUTS>(rows, weights, scale, inputs, o, ahead.of(o));
  for (; o < to; o++) tile<R, 1>(rows, weights, scale, inputs, o, ahead.of(o));
}

// --- Weights of 4 bits, as polygpt/kernels/int4.py packs them -------------------------------------------------

struct Int4 {
  const uint8_t *nibbles, *step, *zero;  // of a layer: [blocks, 8, I], [blocks, I], [blocks, I]
  const float* unit;                     // [blocks, 16]
};

// A block's 16 outputs. Its steps are multiplied into the rows, once for all of them.
template <int R>
void int4_block(const Row* rows, const Int4& packed, int64_t block, int64_t inputs, int64_t outputs) {
  const uint8_t* nibbles = packed.nibbles + block * HALF * inputs;
  float scaled[R][PIECE], totals[R][GROUP] = {}, zeros[R] = {};
  for (int64_t start = 0; start < inputs; start += PIECE) {
    const int64_t size = std::min(PIECE, inputs - start), whole = size / LANES * LANES;
    const uint8_t *step = packed.step + block * inputs + start, *zero = packed.zero + block * inputs + start;
    for (int r = 0; r < R; r++) {
      const float* row = rows[r].x + start;
      Floats taken = {};
      for (int64_t i = 0; i < whole; i += LANES) {
        Floats product = load(row + i) * load(step + i);
        std::memcpy(scaled[r] + i, &product, sizeof product);
        taken = add_product(taken, product, load(zero + i));
      }
      float rest = sum(taken);
      for (int64_t i = whole; i < size; i++) rest = add_product(rest, scaled[r][i] = row[i] * step[i], zero[i]);
      zeros[r] += rest;
    }
    for (int j = 0; j < HALF; j++) {
      const uint8_t* bytes = nibbles + j * inputs + start;
      Floats low[R] = {}, high[R] = {};
      for (int64_t i = 0; i < whole; i += LANES) {
        fetch(bytes + i, AHEAD);
        Ints both = widen(bytes + i);
        Floats first = to_floats(both & 15), second = to_floats(both >> 4);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          Floats row = load(scaled[r] + i);
          keep(row);
          low[r] = add_product(low[r], row, first);
          high[r] = add_product(high[r], row, second);
        }
      }
      float first[R], second[R];
      sums_of(low, first);
      sums_of(high, second);
      for (int r = 0; r < R; r++) {
        for (int64_t i = whole; i < size; i++) {
          first[r] = add_product(first[r], scaled[r][i], bytes[i] & 15);
          second[r] = add_product(second[r], scaled[r][i], bytes[i] >> 4);
        }
        totals[r][j] += first[r];
        totals[r][j + HALF] += second[r];
      }
    }
  }
  const int64_t first = block * GROUP, count = std::min<int64_t>(GROUP, outputs - first);
  for (int r = 0; r < R; r++)
    for (int64_t o = 0; o < count; o++)
      rows[r].y[first + o] = (totals[r][o] - zeros[r] / ZERO_STEPS) * packed.unit[first + o];
}

}  // namespace polygpt
