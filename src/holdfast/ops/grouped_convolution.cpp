// The scorer's convolution over time: masked columns, dropout, products and SiLU in one pass, a tile of columns at a time;
// shapes as in grouped_convolution.py.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "grids.h"
#include "team.h"

extern "C" {

struct Sizes {
  int64_t groups, batch, length, channels, outputs, kernel, dilation;
  int64_t segment;                                  // columns of a task
  int64_t group_stride, batch_stride, time_stride;  // of x
  int64_t valid_stride;                             // 0 where the batch shares one row
  uint64_t seed;
  int64_t dropped;  // in 65,536
  float factor;     // of what stays
};

// Contiguous, but for x. What a pass does not need is null.
struct Tensors {
  const float* x;                 // [groups, batch, length, channels]
  const uint8_t* valid;           // [batch or 1, length]
  const float *weight, *bias;     // [groups, outputs, channels, kernel], [groups, outputs]
  float *sums, *out;              // [groups, batch, length - reach, outputs]; sums, before SiLU, for the backward pass
  const float* d_out;
  float* dx;                      // as x, but contiguous
  float *d_weight, *d_bias;       // [workers, ...] like weight and bias, which begin as zeros
};
}

namespace {

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

constexpr int64_t kTile = 96;  // columns

int64_t reach(const Sizes& sizes) { return (sizes.kernel - 1) * sizes.dilation; }
int64_t segments(const Sizes& sizes) { return (sizes.length + sizes.segment - 1) / sizes.segment; }

// SplitMix64 (Steele, Lea & Flood, 2014) of a counter.
uint64_t random(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + (counter + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// What dropout multiplies the numbers of a row with, in whole panels. Each takes 16 bits of a hash (Wellons' triple32) of
// its place with two keys of the row, so that the backward pass draws the same again, in any order.
void find_factors(const Sizes& sizes, int64_t row, float* factors) {
  const uint64_t keys = random(sizes.seed, row);
  Words first, second;
  for (int lane = 0; lane < kLanes; ++lane) {
    first[lane] = static_cast<uint32_t>(keys) + lane;
    second[lane] = static_cast<uint32_t>(keys >> 32);
  }
  const Ints factor = (Ints)all(sizes.factor);
  const uint32_t dropped = sizes.dropped;
  for (int64_t c = 0; c < sizes.channels; c += kPanel, first += kLanes) {
    Words x = first;
    x = (x ^ (x >> 17)) * 0xed5ad4bbu;
    x = ((x ^ (x >> 11)) + second) * 0xac4c1b51u;
    x = (x ^ (x >> 15)) * 0x31848babu;
    x ^= x >> 14;
    const Vec even = (Vec)(((x & 0xffffu) >= dropped) & factor), odd = (Vec)(((x >> 16) >= dropped) & factor);
    store_in_turn(factors + c, even, odd);  // the same numbers whatever the width of vectors
  }
}

// Tiles of one group after another.
class Pass {
 public:
  Pass(const Sizes& sizes, const Tensors& tensors)
      : sizes_(sizes),
        t_(tensors),
        reach_(reach(sizes)),
        out_length_(sizes.length - reach_),
        input_(arena_.grid(kTile + reach_, sizes.channels)),
        factors_(arena_.grid(kTile + reach_, sizes.channels)) {}

 protected:
  int64_t row(int64_t group, int64_t b, int64_t time) const { return (group * sizes_.batch + b) * sizes_.length + time; }
  int64_t out_row(int64_t group, int64_t b, int64_t time) const { return (group * sizes_.batch + b) * out_length_ + time; }
  bool is_valid(int64_t b, int64_t time) const { return t_.valid[b * sizes_.valid_stride + time]; }

  // The columns first ... first + count - 1 as the products read them.
  void read(int64_t group, int64_t b, int64_t first, int64_t count) {
    const float* x = t_.x + group * sizes_.group_stride + b * sizes_.batch_stride;
    for (int64_t i = 0; i < count; ++i) {
      float* to = input_.row(i);
      const float* from = x + (first + i) * sizes_.time_stride;
      if (!is_valid(b, first + i)) {
        std::fill_n(to, sizes_.channels, 0.0f);
      } else if (sizes_.dropped) {
        find_factors(sizes_, row(group, b, first + i), factors_.row(i));
        for (int64_t c = 0; c < sizes_.channels; ++c) to[c] = from[c] * factors_.row(i)[c];
      } else {
        std::copy_n(from, sizes_.channels, to);
      }
    }
  }

  const Sizes& sizes_;
  const Tensors& t_;
  Arena arena_;
  const int64_t reach_, out_length_;
  Grid input_, factors_;
};

class Forward : Pass {
 public:
  Forward(const Sizes& sizes, const Tensors& tensors, int64_t)
      : Pass(sizes, tensors), sums_(arena_.grid(kTile, sizes.outputs)) {
    for (int64_t tap = 0; tap < sizes.kernel; ++tap) weights_.push_back(arena_.grid(sizes.channels, sizes.outputs));
  }

  void begin(int64_t group) {
    const float* weight = t_.weight + group * sizes_.outputs * sizes_.channels * sizes_.kernel;
    for (int64_t o = 0; o < sizes_.outputs; ++o)
      for (int64_t c = 0; c < sizes_.channels; ++c)
        for (int64_t tap = 0; tap < sizes_.kernel; ++tap) weights_[tap].row(c)[o] = *weight++;
  }

  void end(int64_t) {}

  // Columns of the output.
  void run(int64_t group, int64_t b, int64_t first, int64_t end) {
    end = std::min(end, out_length_);
    for (; first < end; first += kTile) tile(group, b, first, std::min(kTile, end - first));
  }

 private:
  void tile(int64_t group, int64_t b, int64_t first, int64_t count) {
    const int64_t outputs = sizes_.outputs;
    read(group, b, first, count + reach_);
    for (int64_t i = 0; i < count; ++i) std::copy_n(t_.bias + group * outputs, outputs, sums_.row(i));
    for (int64_t tap = 0; tap < sizes_.kernel; ++tap)
      product<false, true>(count, sizes_.channels, outputs, from(input_, tap * sizes_.dilation), weights_[tap], sums_);
    for (int64_t i = 0; i < count; ++i) {
      float* row = sums_.row(i);
      const int64_t at = out_row(group, b, first + i) * outputs;
      if (t_.sums) std::copy_n(row, outputs, t_.sums + at);
      for (int64_t o = 0; o < padded(outputs); o += kLanes) store(row + o, load(row + o) * sigmoid(load(row + o)));
      std::copy_n(row, outputs, t_.out + at);
    }
  }

  Grid sums_;
  std::vector<Grid> weights_;
};

class Backward : Pass {
 public:
  Backward(const Sizes& sizes, const Tensors& tensors, int64_t worker)
      : Pass(sizes, tensors),
        d_sums_(arena_.grid(kTile + reach_, sizes.outputs)),
        d_input_(arena_.grid(kTile, sizes.channels)),
        worker_(worker),
        d_bias_(sizes.outputs) {
    for (int64_t tap = 0; tap < sizes.kernel; ++tap) {
      weights_.push_back(arena_.grid(sizes.outputs, sizes.channels));
      d_weights_.push_back(arena_.grid(sizes.channels, sizes.outputs));
    }
  }

  void begin(int64_t group) {
    const float* weight = t_.weight + group * sizes_.outputs * sizes_.channels * sizes_.kernel;
    for (int64_t o = 0; o < sizes_.outputs; ++o)
      for (int64_t c = 0; c < sizes_.channels; ++c)
        for (int64_t tap = 0; tap < sizes_.kernel; ++tap) weights_[tap].row(o)[c] = *weight++;
    for (const Grid& grid : d_weights_) std::fill_n(grid.data, sizes_.channels * grid.stride, 0.0f);
    std::fill(d_bias_.begin(), d_bias_.end(), 0.0);
  }

  void end(int64_t group) {
    if (!t_.d_weight) return;
    const int64_t at = (worker_ * sizes_.groups + group) * sizes_.outputs;
    float* to = t_.d_weight + at * sizes_.channels * sizes_.kernel;
    for (int64_t o = 0; o < sizes_.outputs; ++o)
      for (int64_t c = 0; c < sizes_.channels; ++c)
        for (int64_t tap = 0; tap < sizes_.kernel; ++tap) *to++ += d_weights_[tap].row(c)[o];
    for (int64_t o = 0; o < sizes_.outputs; ++o) t_.d_bias[at + o] += d_bias_[o];
  }

  // Columns of the input.
  void run(int64_t group, int64_t b, int64_t first, int64_t end) {
    for (; first < end; first += kTile) tile(group, b, first, std::min(kTile, end - first));
  }

 private:
  void tile(int64_t group, int64_t b, int64_t first, int64_t count) {
    read_gradients(group, b, first, count);
    read(group, b, first, count);
    for (int64_t tap = 0; t_.d_weight && tap < sizes_.kernel; ++tap)
      product<true, true>(sizes_.channels, count, sizes_.outputs, input_, d_sums(tap), d_weights_[tap]);
    if (!t_.dx) return;
    for (int64_t i = 0; i < count; ++i) std::fill_n(d_input_.row(i), padded(sizes_.channels), 0.0f);
    for (int64_t tap = 0; tap < sizes_.kernel; ++tap)
      product<false, true>(count, sizes_.outputs, sizes_.channels, d_sums(tap), weights_[tap], d_input_);
    for (int64_t i = 0; i < count; ++i) {
      float* to = t_.dx + row(group, b, first + i) * sizes_.channels;
      const float* d_input = d_input_.row(i);
      if (!is_valid(b, first + i)) {
        std::fill_n(to, sizes_.channels, 0.0f);
      } else if (sizes_.dropped) {
        for (int64_t c = 0; c < sizes_.channels; ++c) to[c] = d_input[c] * factors_.row(i)[c];
      } else {
        std::copy_n(d_input, sizes_.channels, to);
      }
    }
  }

  // Of the sums that read the tile's columns at a tap.
  Grid d_sums(int64_t tap) const { return from(d_sums_, reach_ - tap * sizes_.dilation); }

  // Gradients of the sums that read the columns, those first - reach ... first + count - 1; zeros beyond the ends.
  void read_gradients(int64_t group, int64_t b, int64_t first, int64_t count) {
    const int64_t outputs = sizes_.outputs;
    for (int64_t i = 0; i < count + reach_; ++i) {
      const int64_t time = first - reach_ + i;
      float* to = d_sums_.row(i);
      std::fill_n(to, outputs, 0.0f);
      if (time < 0 || time >= out_length_) continue;
      const int64_t at = out_row(group, b, time) * outputs;
      std::copy_n(t_.sums + at, outputs, to);
      for (int64_t o = 0; o < padded(outputs); o += kLanes) store(to + o, slope(load(to + o), sigmoid(load(to + o))));
      for (int64_t o = 0; o < outputs; ++o) to[o] *= t_.d_out[at + o];
      std::fill(to + outputs, to + padded(outputs), 0.0f);
      if (i >= reach_)
        for (int64_t o = 0; o < outputs; ++o) d_bias_[o] += to[o];
    }
  }

  Grid d_sums_, d_input_;
  const int64_t worker_;
  std::vector<double> d_bias_;
  std::vector<Grid> weights_, d_weights_;
};

template <class Work>
void run(const Sizes& sizes, const Tensors& tensors, const Team* team, int64_t workers) {
  const int64_t per_group = sizes.batch * segments(sizes);
  divide(team, workers, sizes.groups * per_group, [&](int64_t first, int64_t end) {
    if (first == end) return;
    Work work(sizes, tensors, workers > 1 ? team->thread() : 0);
    for (int64_t task = first; task < end; ++task) {
      const int64_t group = task / per_group, b = task % per_group / segments(sizes);
      const int64_t begin = task % segments(sizes) * sizes.segment;
      if (task == first || task % per_group == 0) work.begin(group);
      work.run(group, b, begin, std::min(begin + sizes.segment, sizes.length));
      if (task + 1 == end || (task + 1) % per_group == 0) work.end(group);
    }
  });
}

}  // namespace

extern "C" {

void holdfast_grouped_convolution(const Sizes* sizes, const Tensors* tensors, const Team* team, int64_t workers) {
  run<Forward>(*sizes, *tensors, team, workers);
}

void holdfast_grouped_convolution_backward(const Sizes* sizes, const Tensors* tensors, const Team* team, int64_t workers) {
  run<Backward>(*sizes, *tensors, team, workers);
}

// factors [groups, batch, length, channels] that dropout multiplies x with.
void holdfast_dropout_factors(const Sizes* sizes, float* factors) {
  std::vector<float> panels(padded(sizes->channels));
  for (int64_t row = 0; row < sizes->groups * sizes->batch * sizes->length; ++row) {
    find_factors(*sizes, row, panels.data());
    std::copy_n(panels.data(), sizes->channels, factors + row * sizes->channels);
  }
}
}
