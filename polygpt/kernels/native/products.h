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
#include <type_traits>

#include "vectors.h"

namespace polygpt {

constexpr int64_t AHEAD = 4096;  // bytes; 1024 and 2048 gained less, 8192 no more
constexpr int64_t PIECE = 512;   // inputs of a block in 4 bits, whose scaled rows stay in the L1 cache
constexpr int GROUP = 16, HALF = GROUP / 2;  // outputs of such a block, and those in the low halves of its bytes
constexpr float ZERO_STEPS = 16;

// --- Weights of 8, 16 and 32 bits -----------------------------------------------------------------------------

struct Shape {
  int64_t rows, inputs, outputs;
};

template <int R, int C, class T>
inline void tile(const float* x, const T* weights, const float* scale, float* y, const Shape& shape) {
  const int64_t inputs = shape.inputs;
  Floats sums[R][C] = {};
  int64_t i = 0;
  for (; i + LANES <= inputs; i += LANES) {
    Floats w[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      w[c] = load(weights + c * inputs + i);
      __builtin_prefetch((const char*)(weights + c * inputs + i) + AHEAD);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Floats row = load(x + r * inputs + i);
      keep(row);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[r][c] += row * w[c];
    }
  }
  for (int r = 0; r < R; r++) {
    for (int c = 0; c < C; c++) {
      float total = sum(sums[r][c]);
      for (int64_t j = i; j < inputs; j++) total += x[r * inputs + j] * one(weights[c * inputs + j]);
      y[r * shape.outputs + c] = scale ? total * scale[c] : total;
    }
  }
}

template <int R, class T>
void some_rows(const float* x, const T* weights, const float* scale, float* y, const Shape& shape, int64_t from,
               int64_t to) {
  int64_t o = from;
  for (; o + OUTPUTS <= to; o += OUTPUTS)
    tile<R, OUTPUTS>(x, weights + o * shape.inputs, scale ? scale + o : scale, y + o, shape);
  for (; o < to; o++) tile<R, 1>(x, weights + o * shape.inputs, scale ? scale + o : scale, y + o, shape);
}

// --- Weights of 4 bits, as polygpt/kernels/int4.py packs them -------------------------------------------------

struct Int4 {
  const uint8_t *nibbles, *step, *zero;  // of a layer: [blocks, 8, I], [blocks, I], [blocks, I]
  const float* unit;                     // [blocks, 16]
};

// A block's 16 outputs. Its steps are multiplied into the rows, once for all of them.
template <int R>
void int4_block(const float* x, const Int4& packed, int64_t block, float* y, const Shape& shape) {
  const int64_t inputs = shape.inputs;
  const uint8_t* nibbles = packed.nibbles + block * HALF * inputs;
  float scaled[R][PIECE], totals[R][GROUP] = {}, zeros[R] = {};
  for (int64_t start = 0; start < inputs; start += PIECE) {
    const int64_t size = std::min(PIECE, inputs - start), whole = size / LANES * LANES;
    const uint8_t *step = packed.step + block * inputs + start, *zero = packed.zero + block * inputs + start;
    for (int r = 0; r < R; r++) {
      const float* row = x + r * inputs + start;
      Floats taken = {};
      for (int64_t i = 0; i < whole; i += LANES) {
        Floats product = load(row + i) * load(step + i);
        std::memcpy(scaled[r] + i, &product, sizeof product);
        taken += product * load(zero + i);
      }
      float rest = sum(taken);
      for (int64_t i = whole; i < size; i++) rest += (scaled[r][i] = row[i] * step[i]) * zero[i];
      zeros[r] += rest;
    }
    for (int j = 0; j < HALF; j++) {
      const uint8_t* bytes = nibbles + j * inputs + start;
      Floats low[R] = {}, high[R] = {};
      for (int64_t i = 0; i < whole; i += LANES) {
        __builtin_prefetch(bytes + i + AHEAD);
        Ints both = widen(bytes + i);
        Floats first = to_floats(both & 15), second = to_floats(both >> 4);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          Floats row = load(scaled[r] + i);
          keep(row);
          low[r] += row * first;
          high[r] += row * second;
        }
      }
      for (int r = 0; r < R; r++) {
        float first = sum(low[r]), second = sum(high[r]);
        for (int64_t i = whole; i < size; i++) {
          first += scaled[r][i] * (bytes[i] & 15);
          second += scaled[r][i] * (bytes[i] >> 4);
        }
        totals[r][j] += first;
        totals[r][j + HALF] += second;
      }
    }
  }
  const int64_t first = block * GROUP, count = std::min<int64_t>(GROUP, shape.outputs - first);
  for (int r = 0; r < R; r++)
    for (int64_t o = 0; o < count; o++)
      y[r * shape.outputs + first + o] = (totals[r][o] - zeros[r] / ZERO_STEPS) * packed.unit[first + o];
}

// Calls some(std::integral_constant<int, R>(), first row) for all rows: as many at a time as a tile has.
template <class Some>
inline void all_rows(int64_t rows, Some some) {
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS) some(std::integral_constant<int, ROWS>(), row);
  if constexpr (ROWS > 4)
    for (; row + 4 <= rows; row += 4) some(std::integral_constant<int, 4>(), row);
  for (; row + 2 <= rows; row += 2) some(std::integral_constant<int, 2>(), row);
  for (; row < rows; row++) some(std::integral_constant<int, 1>(), row);
}

}  // namespace polygpt
