// Element by element what PyTorch does in several passes over memory, in fp32, forward and backward. All tensors are
// contiguous; shapes as in fused.py.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "team.h"
#include "vectors.h"

namespace {

// body(load, store, c) for c = 0, kLanes, ... < count. What does not fill a vector goes through memory that does.
template <class Body>
inline void each(int64_t count, const Body& body) {
  const auto whole = [](const float* x) { return load(x); };
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) body(whole, [](float* x, Vec y) { store(x, y); }, c);
  if (const int64_t rest = count - c) {
    const auto part = [rest](const float* x) {
      float lanes[kLanes] = {};
      std::copy_n(x, rest, lanes);
      return load(lanes);
    };
    const auto keep = [rest](float* x, Vec y) {
      float lanes[kLanes];
      store(lanes, y);
      std::copy_n(lanes, rest, x);
    };
    body(part, keep, c);
  }
}

}  // namespace

extern "C" {

// out = SiLU(gate) * up, [count] each.
void holdfast_swiglu(const float* gate, const float* up, float* out, int64_t count, const Team* team,
                     int64_t workers) {
  divide(team, workers, count, [=](int64_t first, int64_t end) {
    each(end - first, [=](auto read, auto write, int64_t c) {
      const Vec x = read(gate + first + c);
      write(out + first + c, x * sigmoid(x) * read(up + first + c));
    });
  });
}

void holdfast_swiglu_backward(const float* gate, const float* up, const float* grad, float* d_gate, float* d_up,
                              int64_t count, const Team* team, int64_t workers) {
  divide(team, workers, count, [=](int64_t first, int64_t end) {
    each(end - first, [=](auto read, auto write, int64_t c) {
      const Vec x = read(gate + first + c), s = sigmoid(x), dy = read(grad + first + c);
      write(d_gate + first + c, dy * read(up + first + c) * slope(x, s));
      write(d_up + first + c, dy * x * s);
    });
  });
}

// Pairs (x[c], x[half + c]) of x [tokens, heads, 2 * half] rotated by angles of cos, sin [tables, half], which serve
// tables, tables, ... tokens; out alike. turn is 1, or -1 for the way back.
void holdfast_rotate(const float* x, const float* cos, const float* sin, float* out, int64_t tokens, int64_t heads,
                     int64_t half, int64_t tables, float turn, const Team* team, int64_t workers) {
  divide(team, workers, tokens, [=](int64_t first, int64_t end) {
    for (int64_t row = first * heads; row < end * heads; ++row) {
      const int64_t angle = row / heads % tables * half;
      const float* from = x + row * 2 * half;
      float* to = out + row * 2 * half;
      each(half, [=](auto read, auto write, int64_t c) {
        const Vec cosine = read(cos + angle + c), sine = turn * read(sin + angle + c);
        const Vec left = read(from + c), right = read(from + half + c);
        write(to + c, left * cosine - right * sine);
        write(to + half + c, right * cosine + left * sine);
      });
    }
  });
}

// Row t of sums [batch, tokens, width] = sum over i < taps of weight[i] * row t - taps + 1 + i of x [batch, tokens,
// width], where what lies before row 0 is past [batch, taps - 1, width]; out = SiLU(sums). weight [taps, width]. sums
// may be missing: only the backward pass reads them.
void holdfast_convolution(const float* x, const float* past, const float* weight, float* sums, float* out,
                          int64_t batch, int64_t tokens, int64_t width, int64_t taps, const Team* team,
                          int64_t workers) {
  divide(team, workers, batch * tokens, [=](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const int64_t b = row / tokens, t = row % tokens;
      each(width, [=](auto read, auto write, int64_t c) {
        Vec total{};
        for (int64_t i = 0; i < taps; ++i) {
          const int64_t at = t - taps + 1 + i;
          const float* from = at < 0 ? past + (b * (taps - 1) + taps - 1 + at) * width : x + (b * tokens + at) * width;
          total += read(weight + i * width + c) * read(from + c);
        }
        if (sums) write(sums + row * width + c, total);
        write(out + row * width + c, total * sigmoid(total));
      });
    }
  });
}

// d_sums [batch, tokens, width] is room for the gradient of sums; d_weights [workers, taps, width] begin as zeros, or are
// missing.
void holdfast_convolution_backward(const float* x, const float* past, const float* weight, const float* sums,
                                   const float* grad, float* d_sums, float* dx, float* d_weights, int64_t batch,
                                   int64_t tokens, int64_t width, int64_t taps, const Team* team, int64_t workers) {
  const int64_t count = batch * tokens * width;
  divide(team, workers, count, [=](int64_t first, int64_t end) {
    each(end - first, [=](auto read, auto write, int64_t c) {
      const Vec z = read(sums + first + c);
      write(d_sums + first + c, read(grad + first + c) * slope(z, sigmoid(z)));
    });
  });
  divide(team, workers, batch * tokens, [=](int64_t first, int64_t end) {
    float* d_weight = d_weights ? d_weights + (workers > 1 ? team->thread() : 0) * taps * width : nullptr;
    for (int64_t row = first; row < end; ++row) {
      const int64_t b = row / tokens, t = row % tokens;
      each(width, [=](auto read, auto write, int64_t c) {
        Vec total{};
        const Vec own = read(d_sums + row * width + c);
        for (int64_t i = 0; i < taps; ++i) {
          const int64_t back = taps - 1 - i, at = t - back;
          if (t + back < tokens) total += read(weight + i * width + c) * read(d_sums + (row + back) * width + c);
          if (!d_weight) continue;
          const float* from = at < 0 ? past + (b * (taps - 1) + taps - 1 + at) * width : x + (b * tokens + at) * width;
          write(d_weight + i * width + c, read(d_weight + i * width + c) + own * read(from + c));
        }
        write(dx + row * width + c, total);
      });
    }
  });
}

// out = x * scale * weight * SiLU(gate), where scale = (sum of squares / divisor + eps)^-1/2 of each row of x [rows,
// width]; weight [width] and gate [rows, width] may be missing, and scales [rows], which only the backward pass reads.
void holdfast_scaled(const float* x, const float* weight, const float* gate, float* out, float* scales, int64_t rows,
                     int64_t width, float divisor, float eps, const Team* team, int64_t workers) {
  divide(team, workers, rows, [=](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      const float* from = x + row * width;
      Vec squares{};
      each(width, [&](auto read, auto, int64_t c) {
        const Vec value = read(from + c);
        squares += value * value;
      });
      const float scale = 1 / std::sqrt(sum(squares) / divisor + eps);
      if (scales) scales[row] = scale;
      each(width, [=](auto read, auto write, int64_t c) {
        Vec y = read(from + c) * scale;
        if (weight) y *= read(weight + c);
        if (gate) {
          const Vec g = read(gate + row * width + c);
          y *= g * sigmoid(g);
        }
        write(out + row * width + c, y);
      });
    }
  });
}

// d_weights [workers, width] begin as zeros; their sum over the workers is the gradient of weight. They may be missing.
void holdfast_scaled_backward(const float* x, const float* weight, const float* gate, const float* scales,
                              const float* grad, float* dx, float* d_weights, float* d_gate, int64_t rows,
                              int64_t width, float divisor, const Team* team, int64_t workers) {
  divide(team, workers, rows, [=](int64_t first, int64_t end) {
    float* d_weight = d_weights ? d_weights + (workers > 1 ? team->thread() : 0) * width : nullptr;
    for (int64_t row = first; row < end; ++row) {
      const int64_t at = row * width;
      const float scale = scales[row];
      Vec inner{};  // of x and the gradient of x * scale, which dx holds until it is known
      each(width, [&](auto read, auto write, int64_t c) {
        const Vec value = read(x + at + c);
        Vec dy = read(grad + at + c);
        if (gate) {
          const Vec g = read(gate + at + c), s = sigmoid(g);
          const Vec ungated = value * scale * (weight ? read(weight + c) : all(1.0f));
          write(d_gate + at + c, dy * ungated * slope(g, s));
          dy *= g * s;
        }
        if (d_weight) write(d_weight + c, read(d_weight + c) + dy * value * scale);
        if (weight) dy *= read(weight + c);
        inner += dy * value;
        write(dx + at + c, dy);
      });
      const float along = sum(inner) * scale * scale * scale / divisor;
      each(width, [=](auto read, auto write, int64_t c) {
        write(dx + at + c, read(dx + at + c) * scale - read(x + at + c) * along);
      });
    }
  });
}
}
