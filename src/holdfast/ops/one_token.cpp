// What a decoded token costs outside of the matrix products, in fp32: each function does in one call what takes PyTorch
// some ten to sixty operations on a few hundred numbers. All tensors are contiguous; shapes as in one_token.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// out[i] = a . b[i] for N rows of b, `size` long, one behind the other.
template <int N>
void dots(const float* a, const float* b, int64_t size, float* out) {
  Vec sums[N] = {};
  int64_t c = 0;
  for (; c + kLanes <= size; c += kLanes)
    for (int i = 0; i < N; ++i) sums[i] += load(a + c) * load(b + i * size + c);
  for (int i = 0; i < N; ++i) {
    out[i] = sum(sums[i]);
    for (int64_t rest = c; rest < size; ++rest) out[i] += a[rest] * b[i * size + rest];
  }
}

void dots(int64_t rows, const float* a, const float* b, int64_t size, float* out) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) dots<4>(a, b + i * size, size, out + i);
  for (; i < rows; ++i) dots<1>(a, b + i * size, size, out + i);
}

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
inline float silu(float x) { return x * sigmoid(x); }

// One row of slots; see window_step/slots.py.
struct Row {
  float *keys, *values, *scores;
  int32_t* positions;
  int64_t budget, ring, dim;

  // Move the pair in ring slot `slot` into the store if its score has the right to stay.
  void retire(int64_t slot, int64_t position, int64_t sinks) {
    const float own = position < sinks ? kInfinity : scores[slot];
    int64_t target = 0;
    for (int64_t n = 1; n < budget; ++n)
      if (scores[n] < scores[target] || (scores[n] == scores[target] && positions[n] > positions[target])) target = n;
    if (!(own > 0 && own > scores[target])) return;
    scores[target] = own;
    positions[target] = static_cast<int32_t>(position);
    std::copy_n(keys + slot * dim, dim, keys + target * dim);
    std::copy_n(values + slot * dim, dim, values + target * dim);
  }

  bool holds(int64_t slot, int64_t seen) const { return slot < budget ? positions[slot] >= 0 : slot - budget < seen; }

  // Softmax attention of one query over what is held after `seen` tokens; `weights` has room for all slots.
  void attend(const float* query, float scale, int64_t seen, float* weights, float* out) const {
    const int64_t slots = budget + ring;
    float highest = -kInfinity;
    dots(slots, query, keys, dim, weights);
    for (int64_t n = 0; n < slots; ++n) {
      weights[n] = holds(n, seen) ? weights[n] * scale : -kInfinity;
      highest = std::max(highest, weights[n]);
    }
    std::fill_n(out, dim, 0.0f);
    if (highest == -kInfinity) return;
    Vec sums{};
    int64_t n = 0;
    for (; n + kLanes <= slots; n += kLanes) {
      const Vec powers = exp2(load(weights + n) - highest);
      store(weights + n, powers);
      sums += powers;
    }
    float total = sum(sums);
    for (; n < slots; ++n) total += weights[n] = std::exp2(weights[n] - highest);
    for (n = 0; n + 4 <= slots; n += 4) add_four(weights + n, values + n * dim, out);
    for (; n < slots; ++n)
      for (int64_t c = 0; c < dim; ++c) out[c] += weights[n] * values[n * dim + c];
    for (int64_t c = 0; c < dim; ++c) out[c] /= total;
  }

  void add_four(const float* weights, const float* rows, float* __restrict__ out) const {
    for (int64_t c = 0; c < dim; ++c)
      out[c] += weights[0] * rows[c] + weights[1] * rows[dim + c] + weights[2] * rows[2 * dim + c] +
                weights[3] * rows[3 * dim + c];
  }
};

}  // namespace

extern "C" {

// out [rows] = weight [rows, size] x [size] + bias [rows], if given; in as many threads as `workers` says.
void holdfast_linear(const float* x, const float* weight, const float* bias, float* out, int64_t rows, int64_t size,
                     const Team* team, int64_t workers) {
  divide(team, workers, rows, [=](int64_t first, int64_t end) {
    dots(end - first, x, weight + first * size, size, out + first);
    if (bias)
      for (int64_t i = first; i < end; ++i) out[i] += bias[i];
  });
}

// x [batch, channels] behind state [batch, channels, width - 1], weight [channels, width] -> out, new_state.
void holdfast_convolve(const float* x, const float* weight, const float* state, float* out, float* new_state,
                       int64_t batch, int64_t channels, int64_t width, int64_t activate) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t c = 0; c < channels; ++c, state += width - 1, new_state += width - 1) {
      const float* taps = weight + c * width;
      const float now = x[b * channels + c];
      float y = taps[width - 1] * now;
      for (int64_t i = 0; i + 1 < width; ++i) {
        y += taps[i] * state[i];
        new_state[i] = i + 2 < width ? state[i + 1] : now;
      }
      out[b * channels + c] = activate ? silu(y) : y;
    }
}

// q, k [batch, key_heads, keys], v [batch, heads, values], g, beta [batch, heads], state [batch, heads, keys, values].
void holdfast_delta(const float* q, const float* k, const float* v, const float* g, const float* beta,
                    const float* state, float* out, float* new_state, int64_t batch, int64_t key_heads, int64_t heads,
                    int64_t keys, int64_t values, float scale) {
  std::vector<float> correction(values);
  float* __restrict__ change = correction.data();
  for (int64_t row = 0; row < batch * heads; ++row) {
    const int64_t key_row = row / heads * key_heads + row % heads / (heads / key_heads);
    const float *query = q + key_row * keys, *key = k + key_row * keys, *old = state + row * keys * values;
    float* __restrict__ fresh = new_state + row * keys * values;
    float* __restrict__ answer = out + row * values;
    const float decay = std::exp(g[row]);
    std::fill_n(change, values, 0.0f);
    std::fill_n(answer, values, 0.0f);
    for (int64_t i = 0; i < keys; ++i)
      for (int64_t c = 0; c < values; ++c) change[c] += key[i] * old[i * values + c];
    for (int64_t c = 0; c < values; ++c) change[c] = beta[row] * (v[row * values + c] - decay * change[c]);
    for (int64_t i = 0; i < keys; ++i)
      for (int64_t c = 0; c < values; ++c) {
        const float now = decay * old[i * values + c] + key[i] * change[c];
        fresh[i * values + c] = now;
        answer[c] += scale * query[i] * now;
      }
  }
}

// The score of the middle one of `length` tokens, or with `causal`, where each tap lies in the past, of the last one:
// features [batch, length, heads, channels]; where valid [batch, length] is false, every layer but the last reads zeros; valid_stride is 0 if one row holds for all. weights[l] [heads or 1, outputs, inputs, kernels[l]], the last one the map
// to a logit (kernel 1); biases likewise. out [batch, heads].
void holdfast_score(const float* features, const bool* valid, const float* const* weights, const float* const* biases,
                    const int64_t* kernels, const int64_t* dilations, const int64_t* outputs, int64_t layers,
                    int64_t valid_stride, int64_t batch, int64_t length, int64_t heads, int64_t channels,
                    int64_t shared, int64_t causal, float threshold, float* out) {
  const int64_t scored = causal ? length - 1 : length / 2;
  const auto ahead = [&](int64_t kernel) { return causal ? kernel - 1 : kernel / 2; };
  // Which tokens each layer must answer for, the last layer first: with dilation, not all.
  std::vector<std::vector<int64_t>> needed(layers + 1);
  needed[layers] = {scored};
  for (int64_t l = layers - 1; l >= 0; --l) {
    for (const int64_t token : needed[l + 1])
      for (int64_t tap = 0; tap < kernels[l]; ++tap)
        needed[l].push_back(token + (tap - ahead(kernels[l])) * dilations[l]);
    std::sort(needed[l].begin(), needed[l].end());
    needed[l].erase(std::unique(needed[l].begin(), needed[l].end()), needed[l].end());
  }
  std::vector<float> inputs(length * channels), results(length * channels), sums(length), taps;
  for (int64_t row = 0; row < batch * heads; ++row) {
    const int64_t b = row / heads, head = row % heads, net = shared ? 0 : head;
    for (const int64_t token : needed[0])
      std::copy_n(features + ((b * length + token) * heads + head) * channels, channels, &inputs[token * channels]);
    int64_t width = channels;
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t kernel = kernels[l], size = width * kernel;
      const float* weight = weights[l] + net * outputs[l] * size;
      const int64_t count = needed[l + 1].size();
      taps.assign(count * size, 0.0f);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t tap = 0; tap < kernel; ++tap) {
          const int64_t token = needed[l + 1][t] + (tap - ahead(kernel)) * dilations[l];
          if (l + 1 < layers && !valid[b * valid_stride + token]) continue;
          for (int64_t c = 0; c < width; ++c) taps[t * size + c * kernel + tap] = inputs[token * channels + c];
        }
      for (int64_t o = 0; o < outputs[l]; ++o) {
        dots(count, weight + o * size, taps.data(), size, sums.data());
        for (int64_t t = 0; t < count; ++t) {
          const float y = sums[t] + biases[l][net * outputs[l] + o];
          results[needed[l + 1][t] * channels + o] = l + 1 < layers ? silu(y) : y;
        }
      }
      std::swap(inputs, results);
      width = outputs[l];
    }
    out[row] = sigmoid(inputs[scored * channels]) - threshold;
  }
}

// `rows` are batch * heads; see window_step. `seen` is not advanced.
void holdfast_step(const float* q, const float* key, const float* value, const float* score, const bool* real,
                   float* keys, float* values, const int64_t* seen, float* scores, int32_t* positions, float* out,
                   int64_t heads, int64_t groups, int64_t budget, int64_t ring, int64_t dim, int64_t sinks,
                   int64_t delay, float scale, int64_t rows, const Team* team, int64_t workers) {
  divide(team, workers, rows, [=](int64_t first, int64_t end) {
    std::vector<float> weights(budget + ring);
    for (int64_t n = first; n < end; ++n) {
      const int64_t slots = n * (budget + ring), count = seen[n / heads];
      const bool fresh = !real || real[n / heads];
      Row row{keys + slots * dim, values + slots * dim, scores ? scores + slots : nullptr,
              positions ? positions + n * budget : nullptr, budget, ring, dim};
      const int64_t slot = budget + count % ring;
      const bool final = fresh && budget && count >= delay;
      if (final && delay) row.scores[budget + (count - delay) % ring] = score[n];
      if (fresh && budget && count >= ring) row.retire(slot, count - ring, sinks);
      if (final && !delay) row.scores[slot] = score[n];
      if (fresh) {
        std::copy_n(key + n * dim, dim, row.keys + slot * dim);
        std::copy_n(value + n * dim, dim, row.values + slot * dim);
      }
      for (int64_t g = n * groups; g < (n + 1) * groups; ++g)
        row.attend(q + g * dim, scale * kLog2E, count + fresh, weights.data(), out + g * dim);
    }
  });
}
}
