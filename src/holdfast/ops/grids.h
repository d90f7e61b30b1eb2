// Small matrices that stay in the cache: rows padded with zeros to whole panels of columns, an odd number of cache lines
// apart, so that a column does not fall into few sets of the cache.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

// Rows of floats, `stride` apart.
struct Grid {
  float* data;
  int64_t stride;
  float* row(int64_t i) const { return data + i * stride; }
};

int64_t padded(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }

int64_t spread(int64_t columns) {
  const int64_t lines = padded(columns) / 16;
  return 16 * (lines + 1 - lines % 2);
}

// Memory for grids, zeroed, at the beginning of a cache line.
class Arena {
 public:
  Grid grid(int64_t rows, int64_t columns) {
    const int64_t stride = spread(columns), most = 16;
    blocks_.emplace_back(rows * stride + most);
    float* data = blocks_.back().data();
    const auto past = reinterpret_cast<std::uintptr_t>(data) % 64;
    return {past ? data + (64 - past) / sizeof(float) : data, stride};
  }

 private:
  std::vector<std::vector<float>> blocks_;
};

// to[i] = factor * from[i]
inline void scaled(const float* from, float factor, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
}

// c (+)= a b, or a^T b: as in vectors.h, with whole panels of columns.
template <bool kTurned, bool kAdd>
void product(int64_t rows, int64_t depth, int64_t columns, const Grid& a, const Grid& b, const Grid& c) {
  multiply<kTurned, kAdd>(rows, depth, padded(columns) / kPanel, a.data, a.stride, b.data, b.stride, kPanel, c.data,
                          c.stride);
}

Grid from(const Grid& grid, int64_t row, int64_t column = 0) { return {grid.row(row) + column, grid.stride}; }

}  // namespace
