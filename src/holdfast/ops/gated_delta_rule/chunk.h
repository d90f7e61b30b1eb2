// What both passes of native.cpp read of a chunk of tokens.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../grids.h"

extern "C" {

struct Sizes {
  int64_t batch, tokens, key_heads, groups, dim, value_dim, chunk;
  int64_t sequences, slots;  // slots: chunks that `states` has room for
  float scale;
};

// All contiguous. What a pass does not need is null.
struct Tensors {
  const float *q, *k;           // [batch, tokens, key_heads, dim]
  const float *v, *g, *beta;    // [batch, tokens, key_heads * groups, value_dim], and without value_dim
  const int64_t* offsets;       // [sequences + 1]; sequences start from zero, and there is no initial state, if not null
  const float* initial;         // [batch, key_heads * groups, dim, value_dim]
  float *out, *final_state;     // like v, like initial
  float *errors, *states;       // like v; [batch, key_heads * groups, slots, dim, value_dim], may be null
  const float *d_out, *d_final;
  float *dq, *dk, *dv, *dg, *dbeta, *d_initial;
};
}

namespace {

constexpr int kRows = 2 * kSums;  // rows of a triangle that are computed at once
// Below this, a factor e^g is 0 in any case. Bounded sums keep -inf out of differences.
const float kLowest = 1.2f * std::log(std::numeric_limits<float>::min());

struct Chunk {
  int64_t begin, length;
  bool opens, closes;  // whether a sequence begins with it, or ends
};

std::vector<Chunk> chunks_of(const Sizes& sizes, const Tensors& t) {
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < (t.offsets ? sizes.sequences : 1); ++s) {
    const int64_t begin = t.offsets ? t.offsets[s] : 0, end = t.offsets ? t.offsets[s + 1] : sizes.tokens;
    for (int64_t at = begin; at < end; at += sizes.chunk)
      chunks.push_back({at, std::min(sizes.chunk, end - at), at == begin, at + sizes.chunk >= end});
  }
  return chunks;
}

// to[i] += factor * from[i], in whole vectors
inline void add_scaled(const float* from, float factor, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(to + i) + factor * load(from + i));
}

// In whole vectors.
inline float dot(const float* a, const float* b, int64_t count) {
  Vec total{};
  for (int64_t i = 0; i < count; i += kLanes) total += load(a + i) * load(b + i);
  return sum(total);
}

// to[j][i] = from[i][j]
void turn(const Grid& from, int64_t rows, int64_t columns, const Grid& to) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t height = std::min<int64_t>(kLanes, rows - i), width = std::min<int64_t>(kLanes, columns - j);
      if (height == kLanes && width == kLanes) {
        transpose(from.row(i) + j, from.stride, to.row(j) + i, to.stride);
        continue;
      }
      for (int64_t y = j; y < j + width; ++y)
        for (int64_t x = i; x < i + height; ++x) to.row(y)[x] = from.row(x)[y];
    }
}

// A state [dim, value_dim] as a grid; zeros where there is none.
void load_state(const Sizes& sizes, const float* from, const Grid& to) {
  std::fill_n(to.data, sizes.dim * to.stride, 0.0f);
  for (int64_t c = 0; from && c < sizes.dim; ++c) std::copy_n(from + c * sizes.value_dim, sizes.value_dim, to.row(c));
}

void save_state(const Sizes& sizes, const Grid& from, float* to) {
  for (int64_t c = 0; c < sizes.dim; ++c) std::copy_n(from.row(c), sizes.value_dim, to + c * sizes.value_dim);
}

// What both passes need of a chunk and a value head.
class Head {
 public:
  explicit Head(const Sizes& sizes)
      : sizes_(sizes),
        q(arena.grid(sizes.chunk, sizes.dim)),
        k(arena.grid(sizes.chunk, sizes.dim)),
        k_turned(arena.grid(sizes.dim, sizes.chunk)),
        system(arena.grid(sizes.chunk, sizes.chunk)),
        attention(arena.grid(sizes.chunk, sizes.chunk)),
        decay(arena.grid(sizes.chunk, sizes.chunk)),
        written(arena.grid(sizes.chunk, sizes.value_dim)),
        total_(sizes.chunk),
        entry(sizes.chunk),
        exit(sizes.chunk),
        beta(sizes.chunk) {}

  // Positions of a token of this task in q and k, v, and g and beta.
  int64_t key_at(int64_t token) const { return ((batch * sizes_.tokens + token) * sizes_.key_heads + key_head) * sizes_.dim; }
  int64_t value_at(int64_t token) const { return scalar_at(token) * sizes_.value_dim; }
  int64_t scalar_at(int64_t token) const { return (batch * sizes_.tokens + token) * value_heads() + value_head(); }
  int64_t state_at() const { return (batch * value_heads() + value_head()) * sizes_.dim * sizes_.value_dim; }
  int64_t slot_at(int64_t slot) const {
    return ((batch * value_heads() + value_head()) * sizes_.slots + slot) * sizes_.dim * sizes_.value_dim;
  }

  // Queries, keys, decays, the system A and the attention e^(G_i - G_j) q_i.k_j for j <= i of a chunk.
  void read(const Tensors& t, const Chunk& chunk) {
    length = chunk.length;
    double sum = 0;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t token = chunk.begin + i;
      std::copy_n(t.q + key_at(token), sizes_.dim, q.row(i));
      std::copy_n(t.k + key_at(token), sizes_.dim, k.row(i));
      beta[i] = t.beta[scalar_at(token)];
      sum += std::max(t.g[scalar_at(token)], kLowest) * double(kLog2E);
      total_[i] = sum;
    }
    turn(k, length, sizes_.dim, k_turned);
    find_decays();
    for (int64_t i = 0; i < length; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, length - i), columns = i + rows;
      product<false, false>(rows, sizes_.dim, columns, from(k, i), k_turned, from(system, i));
      product<false, false>(rows, sizes_.dim, columns, from(q, i), k_turned, from(attention, i));
      for (int64_t row = i; row < columns; ++row) {
        for (int64_t j = 0; j < padded(length); j += kLanes) {
          const Vec factors = load(decay.row(row) + j);  // 0 after the diagonal, where other numbers are of no meaning
          store(system.row(row) + j, factors != 0 ? -factors * load(system.row(row) + j) : Vec{});
          store(attention.row(row) + j, factors != 0 ? factors * load(attention.row(row) + j) : Vec{});
        }
        system.row(row)[row] = 0;
      }
    }
  }

 private:
  void find_decays() {
    const double last = total_[length - 1];
    for (int64_t i = 0; i < length; ++i) {
      float* row = decay.row(i);
      for (int64_t j = 0; j <= i; ++j) row[j] = total_[i] - total_[j];
      std::fill(row + i + 1, row + padded(length), -1e30f);
      for (int64_t j = 0; j < padded(length); j += kLanes) store(row + j, exp2(load(row + j)));
      entry[i] = std::exp2(float(total_[i]));
      exit[i] = std::exp2(float(last - total_[i]));
    }
  }

  int64_t value_heads() const { return sizes_.key_heads * sizes_.groups; }
  int64_t value_head() const { return key_head * sizes_.groups + group; }

  const Sizes sizes_;

 public:
  Arena arena;
  int64_t batch, key_head, group, length;
  Grid q, k, k_turned, system, attention, decay;
  Grid written;  // beta e
 private:
  std::vector<double> total_;  // G in base 2

 public:
  std::vector<float> entry, exit, beta;  // e^G from the chunk's entry, and to its end
  float across() const { return entry[length - 1]; }
};

}  // namespace
