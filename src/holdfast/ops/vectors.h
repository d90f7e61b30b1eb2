// Vectors of floats as wide as the processor's, and products of small matrices that stay in the cache.
//
// GCC's vector extensions, which clang has too: nothing here names an instruction.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kPanel = 2 * kLanes;  // columns of a strip
constexpr int kSums = 6;  // rows whose sums are held in registers, each as two vectors

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef int32_t LooseInts __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* x) { return *reinterpret_cast<const Loose*>(x); }
inline void store(float* x, Vec y) { *reinterpret_cast<Loose*>(x) = y; }
inline Vec all(float x) { return x - Vec{}; }  // one instruction: unlike 0 + x, x - 0 is x even for -0
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float largest(Vec x) {
  float top = x[0];
  for (int i = 1; i < kLanes; ++i) top = std::max(top, x[i]);
  return top;
}

inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// 2^x to two units in the last place for x <= 127; 0 below 2^-126; NaN for NaN.
inline Vec exp2(Vec x) {
  x = x < -127.0f ? all(-127.0f) : x;
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the sum's last bits hold the nearest integer
  const Vec rest = x - (shifted - 12582912.0f);
  Vec power = all(1.5353362e-4f);
  power = power * rest + 1.3398874e-3f;
  power = power * rest + 9.6184374e-3f;
  power = power * rest + 5.5503325e-2f;
  power = power * rest + 2.4022648e-1f;
  power = power * rest + 6.9314720e-1f;
  power = power * rest + 1.0f;
  const Ints exponent = ((Ints)shifted << 23) + (127 << 23);
  return power * (Vec)exponent;
}

constexpr float kLog2E = 1.44269504f;

// 1 / (1 + e^-x); 0 below -87, where exp2 ends.
inline Vec sigmoid(Vec x) {
  const Vec power = x * -kLog2E;
  return power < 126.0f ? 1.0f / (1.0f + exp2(power < 126.0f ? power : all(126.0f))) : Vec{};
}

// The derivative of SiLU at x, with s = sigmoid(x).
inline Vec slope(Vec x, Vec s) { return s * (1.0f + x * (1.0f - s)); }

#ifndef __has_builtin
#define __has_builtin(name) 0
#endif

#if __has_builtin(__builtin_shufflevector)
// Lanes of a and b in turn, from their first halves or from their second ones.
template <int kFirst, std::size_t... lane>
inline Vec interleave(Vec a, Vec b, std::index_sequence<lane...>) {
  return __builtin_shufflevector(a, b, int(kFirst + lane / 2 + lane % 2 * kLanes)...);
}
#endif

// to[j][i] = from[i][j] for i, j < kLanes.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if __has_builtin(__builtin_shufflevector)
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  Vec rows[kLanes], next[kLanes];
  for (int i = 0; i < kLanes; ++i) rows[i] = load(from + i * from_stride);
  for (int distance = 1; distance < kLanes; distance *= 2) {
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + kLanes / 2], lanes);
      next[2 * i + 1] = interleave<kLanes / 2>(rows[i], rows[i + kLanes / 2], lanes);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
  for (int i = 0; i < kLanes; ++i) store(to + i * to_stride, rows[i]);
#else
  for (int j = 0; j < kLanes; ++j)
    for (int i = 0; i < kLanes; ++i) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

// to[2 i] = even[i], to[2 i + 1] = odd[i]
inline void store_in_turn(float* to, Vec even, Vec odd) {
#if __has_builtin(__builtin_shufflevector)
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  store(to, interleave<0>(even, odd, lanes));
  store(to + kLanes, interleave<kLanes / 2>(even, odd, lanes));
#else
  for (int i = 0; i < kLanes; ++i) {
    to[2 * i] = even[i];
    to[2 * i + 1] = odd[i];
  }
#endif
}

// c[i][0 .. kPanel) = (kAdd ? c : 0) + sum over k < depth of a(i, k) * b[k][0 .. kPanel), for i < N, where a(i, k) is
// a[i][k], or a[k][i] if kTurned.
template <int N, bool kTurned, bool kAdd>
void sums(int depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  Vec left[N], right[N];
  for (int i = 0; i < N; ++i) {
    left[i] = kAdd ? load(c + i * c_stride) : Vec{};
    right[i] = kAdd ? load(c + i * c_stride + kLanes) : Vec{};
  }
  for (int k = 0; k < depth; ++k, b += b_stride) {
    const Vec b_left = load(b), b_right = load(b + kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) {
      const Vec factor = all(kTurned ? a[k * a_stride + i] : a[i * a_stride + k]);
      left[i] += factor * b_left;
      right[i] += factor * b_right;
    }
  }
  for (int i = 0; i < N; ++i) {
    store(c + i * c_stride, left[i]);
    store(c + i * c_stride + kLanes, right[i]);
  }
}

// The same for any number of rows, and for `strips` of kPanel columns that lie `b_strip` apart in b.
template <bool kTurned, bool kAdd>
void multiply(int rows, int depth, int strips, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
              int64_t b_strip, float* c, int64_t c_stride) {
  for (int strip = 0; strip < strips; ++strip, b += b_strip, c += kPanel) {
    int i = 0;
    for (; i + kSums <= rows; i += kSums)
      sums<kSums, kTurned, kAdd>(depth, a + i * (kTurned ? 1 : a_stride), a_stride, b, b_stride, c + i * c_stride,
                                 c_stride);
    const float* rest = a + i * (kTurned ? 1 : a_stride);
    float* last = c + i * c_stride;
    switch (rows - i) {
      case 5: sums<5, kTurned, kAdd>(depth, rest, a_stride, b, b_stride, last, c_stride); break;
      case 4: sums<4, kTurned, kAdd>(depth, rest, a_stride, b, b_stride, last, c_stride); break;
      case 3: sums<3, kTurned, kAdd>(depth, rest, a_stride, b, b_stride, last, c_stride); break;
      case 2: sums<2, kTurned, kAdd>(depth, rest, a_stride, b, b_stride, last, c_stride); break;
      case 1: sums<1, kTurned, kAdd>(depth, rest, a_stride, b, b_stride, last, c_stride); break;
    }
  }
}

}  // namespace
