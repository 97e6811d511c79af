// Vectors of floats in the registers of this processor: GCC's and Clang's vector extensions.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace polygpt {

// LANES floats in a register; a tile of ROWS x OUTPUTS sums, which fills most of the registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, OUTPUTS = 3;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4, OUTPUTS = 3;
#else
constexpr int LANES = 4, ROWS = 4, OUTPUTS = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

template <class Vector, class T>
inline Vector read(const T* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

// GCC 12 converts vectors of bytes one by one, hence the intrinsics; GCC 11 has no __builtin_shufflevector (`sum`).
inline Ints widen(const int8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  Ints wide;
  for (int i = 0; i < LANES; i++) wide[i] = from[i];
  return wide;
#endif
}

inline Ints widen(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  Ints wide;
  for (int i = 0; i < LANES; i++) wide[i] = from[i];
  return wide;
#endif
}

inline Floats to_floats(Ints numbers) { return __builtin_convertvector(numbers, Floats); }

inline Floats load(const float* from) { return read<Floats>(from); }
inline Floats load(const int8_t* from) { return to_floats(widen(from)); }
inline Floats load(const uint8_t* from) { return to_floats(widen(from)); }
// bfloat16
inline Floats load(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(read<Halves>(from), Ints) << 16);
}

inline float one(float number) { return number; }
inline float one(int8_t number) { return number; }
inline float one(uint16_t bits) {
  uint32_t wide = uint32_t(bits) << 16;
  float number;
  std::memcpy(&number, &wide, sizeof number);
  return number;
}

// sum + a * b with a single rounding wherever processors have it. The compiler is not free to choose: for some
// processors GCC takes two roundings in a loop with a single sum, and in one that it turns into vectors itself.
inline float add_product(float sum, float a, float b) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

inline Floats add_product(Floats sum, Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__FMA__)
  return (Floats)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)sum);
#else
  return sum + a * b;
#endif
}

template <int N>
inline float sum_of(const float* numbers) {
  if constexpr (N == 1) return *numbers;
  else return sum_of<N / 2>(numbers) + sum_of<N / 2>(numbers + N / 2);
}

#if defined(__AVX2__)
typedef float Four __attribute__((vector_size(16)));

inline Four quarter(Floats v) {
#if defined(__AVX512F__)
  typedef float Eight __attribute__((vector_size(32)));
  const __m512d whole = (__m512d)v;
  const __m256 half = (__m256)((Eight)_mm512_castpd512_pd256(whole) + (Eight)_mm512_extractf64x4_pd(whole, 1));
#else
  const __m256 half = (__m256)v;
#endif
  return (Four)_mm256_castps256_ps128(half) + (Four)_mm256_extractf128_ps(half, 1);
}

inline float sum(Floats v) {
  const Four four = quarter(v);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
#else
inline float sum(Floats v) {
  float numbers[LANES];
  std::memcpy(numbers, &v, sizeof numbers);
  return sum_of<LANES>(numbers);
}
#endif

// The sum of each of N vectors, four at a time in less than half the time, to the same bits.
template <int N>
inline void sums_of(const Floats (&vectors)[N], float (&totals)[N]) {
  int n = 0;
#if defined(__AVX2__)
#pragma GCC unroll 2
  for (; n + 4 <= N; n += 4) {
    const __m128 a = (__m128)quarter(vectors[n]), b = (__m128)quarter(vectors[n + 1]);
    const __m128 c = (__m128)quarter(vectors[n + 2]), d = (__m128)quarter(vectors[n + 3]);
    const __m128 ab = (__m128)((Four)_mm_movelh_ps(a, b) + (Four)_mm_movehl_ps(b, a));
    const __m128 cd = (__m128)((Four)_mm_movelh_ps(c, d) + (Four)_mm_movehl_ps(d, c));
    const Four four = (Four)_mm_shuffle_ps(ab, cd, 0x88) + (Four)_mm_shuffle_ps(ab, cd, 0xdd);
    std::memcpy(totals + n, &four, sizeof four);
  }
#endif
  for (; n < N; n++) totals[n] = sum(vectors[n]);
}

// Fetches what lies so many bytes ahead into the L2 cache.
inline void fetch(const void* from, int64_t ahead) { __builtin_prefetch((const char*)from + ahead, 0, 2); }

// Keeps a vector in a register for all products with it: GCC would load it anew for each.
inline void keep(Floats& vector) {
#if defined(__x86_64__)
  asm("" : "+v"(vector));
#endif
}

}  // namespace polygpt
