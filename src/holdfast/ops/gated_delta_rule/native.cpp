// The gated delta rule on a CPU in fp32, one chunk of tokens at a time, which never leaves the cache. The mathematics is
// that of chunked.py; what differs:
//
// - The errors e_i = v_i - k_i^T S_i, with S_i the decayed state that token i meets, are found by substitution:
//       e = (v - e^G (k S)) + A (beta e)        A_ij = -e^(G_i - G_j) k_i.k_j for j < i
//   and the tokens write beta e. The backward pass reads e and the chunks' states, and computes the rest anew.
// - A chunk ends where a sequence ends, so that packed sequences need no masks.
//
// One task is one key head of one sequence row, with the value heads that share it. Matrices of a chunk are
// grids (grids.h), with zeros beyond their columns.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "chunk.h"

namespace {

class Forward {
 public:
  Forward(const Sizes& sizes, const Tensors& tensors)
      : sizes_(sizes),
        t_(tensors),
        head(sizes),
        chunks_(chunks_of(sizes, tensors)),
        state_(head.arena.grid(sizes.dim, sizes.value_dim)),
        errors_(head.arena.grid(sizes.chunk, sizes.value_dim)),
        out_(head.arena.grid(sizes.chunk, sizes.value_dim)) {}

  void run() {
    load_state(sizes_, t_.offsets ? nullptr : t_.initial + head.state_at(), state_);
    for (size_t n = 0; n < chunks_.size(); ++n) {
      const Chunk& chunk = chunks_[n];
      if (chunk.opens && n) load_state(sizes_, nullptr, state_);
      if (t_.states) save_state(sizes_, state_, t_.states + head.slot_at(n));
      head.read(t_, chunk);
      find_errors(chunk);
      answer(chunk);
      leave();
    }
    save_state(sizes_, state_, t_.final_state + head.state_at());
    const int64_t used = chunks_.size(), size = sizes_.dim * sizes_.value_dim;
    if (t_.states) std::fill_n(t_.states + head.slot_at(used), (sizes_.slots - used) * size, 0.0f);
  }

 private:
  const Sizes& sizes_;
  const Tensors& t_;

 public:
  Head head;

 private:
  // By substitution, some rows at a time.
  void find_errors(const Chunk& chunk) {
    const int64_t length = head.length, width = padded(sizes_.value_dim);
    product<false, false>(length, sizes_.dim, sizes_.value_dim, head.k, state_, errors_);
    for (int64_t i = 0; i < length; ++i) {
      const float* v = t_.v + head.value_at(chunk.begin + i);
      float* row = errors_.row(i);
      for (int64_t c = 0; c < sizes_.value_dim; ++c) row[c] = v[c] - head.entry[i] * row[c];
    }
    for (int64_t i = 0; i < length; i += kRows) {
      const int64_t end = std::min(i + kRows, length);
      product<false, true>(end - i, i, sizes_.value_dim, from(head.system, i), head.written, from(errors_, i));
      for (int64_t row = i; row < end; ++row) {
        for (int64_t j = i; j < row; ++j) add_scaled(head.written.row(j), head.system.row(row)[j], errors_.row(row), width);
        scaled(errors_.row(row), head.beta[row], head.written.row(row), width);
      }
    }
    if (t_.errors)
      for (int64_t i = 0; i < length; ++i)
        std::copy_n(errors_.row(i), sizes_.value_dim, t_.errors + head.value_at(chunk.begin + i));
  }

  void answer(const Chunk& chunk) {
    product<false, false>(head.length, sizes_.dim, sizes_.value_dim, head.q, state_, out_);
    for (int64_t i = 0; i < head.length; ++i) scaled(out_.row(i), head.entry[i], out_.row(i), padded(sizes_.value_dim));
    for (int64_t i = 0; i < head.length; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, head.length - i);
      product<false, true>(rows, i + rows, sizes_.value_dim, from(head.attention, i), head.written, from(out_, i));
    }
    for (int64_t i = 0; i < head.length; ++i)
      scaled(out_.row(i), sizes_.scale, t_.out + head.value_at(chunk.begin + i), sizes_.value_dim);
  }

  void leave() {
    const int64_t width = padded(sizes_.value_dim);
    for (int64_t i = 0; i < head.length; ++i) scaled(head.written.row(i), head.exit[i], head.written.row(i), width);
    for (int64_t c = 0; c < sizes_.dim; ++c) scaled(state_.row(c), head.across(), state_.row(c), width);
    product<true, true>(sizes_.dim, head.length, sizes_.value_dim, head.k, head.written, state_);
  }

  const std::vector<Chunk> chunks_;
  Grid state_, errors_, out_;
};

class Backward {
 public:
  Backward(const Sizes& sizes, const Tensors& tensors)
      : sizes_(sizes),
        t_(tensors),
        head(sizes),
        chunks_(chunks_of(sizes, tensors)),
        state_turned_(head.arena.grid(sizes.value_dim, sizes.dim)),
        d_state_(head.arena.grid(sizes.dim, sizes.value_dim)),
        d_state_turned_(head.arena.grid(sizes.value_dim, sizes.dim)),
        errors_(head.arena.grid(sizes.chunk, sizes.value_dim)),
        written_turned_(head.arena.grid(sizes.value_dim, sizes.chunk)),
        d_out_(head.arena.grid(sizes.chunk, sizes.value_dim)),
        d_written_(head.arena.grid(sizes.chunk, sizes.value_dim)),
        d_errors_(head.arena.grid(sizes.chunk, sizes.value_dim)),
        d_system_(head.arena.grid(sizes.chunk, sizes.chunk)),
        d_attention_(head.arena.grid(sizes.chunk, sizes.chunk)),
        dq_(head.arena.grid(sizes.chunk, sizes.dim)),
        dk_(head.arena.grid(sizes.chunk, sizes.dim)),
        through_(padded(sizes.chunk)),
        d_total_(sizes.chunk) {}

  void run() {
    load_state(sizes_, t_.d_final && !t_.offsets ? t_.d_final + head.state_at() : nullptr, d_state_);
    for (size_t n = chunks_.size(); n-- > 0;) {
      const Chunk& chunk = chunks_[n];
      if (chunk.closes && n + 1 < chunks_.size()) load_state(sizes_, nullptr, d_state_);
      head.read(t_, chunk);
      read(chunk, t_.states + head.slot_at(n));
      differentiate_written(chunk);
      differentiate_products();
      differentiate_states();
      write(chunk);
    }
    if (t_.offsets) load_state(sizes_, nullptr, d_state_);  // there was no initial state
    save_state(sizes_, d_state_, t_.d_initial + head.state_at());
  }

 private:
  const Sizes& sizes_;
  const Tensors& t_;

 public:
  Head head;

 private:
  void read(const Chunk& chunk, float* state) {
    const int64_t value_dim = sizes_.value_dim;
    for (int64_t i = 0; i < head.length; ++i) {
      const int64_t at = head.value_at(chunk.begin + i);
      std::copy_n(t_.errors + at, value_dim, errors_.row(i));
      scaled(t_.errors + at, head.beta[i], head.written.row(i), value_dim);
      scaled(t_.d_out + at, sizes_.scale, d_out_.row(i), value_dim);
    }
    turn(head.written, head.length, value_dim, written_turned_);
    turn({state, value_dim}, sizes_.dim, value_dim, state_turned_);
    turn(d_state_, sizes_.dim, value_dim, d_state_turned_);
  }

  // Gradients of what the tokens write, from the last token to the first, and through it of the errors and of beta.
  void differentiate_written(const Chunk& chunk) {
    const int64_t length = head.length, width = padded(sizes_.value_dim);
    product<false, false>(length, sizes_.dim, sizes_.value_dim, head.k, d_state_, d_written_);
    double after = 0;
    for (int64_t i = 0; i < length; ++i) {
      scaled(d_written_.row(i), head.exit[i], d_written_.row(i), width);
      const float through_exit = dot(d_written_.row(i), head.written.row(i), width);
      d_total_[i] = -through_exit;
      after += through_exit;
    }
    for (int64_t c = 0; c < sizes_.value_dim; ++c)
      after += head.across() * dot(state_turned_.row(c), d_state_turned_.row(c), padded(sizes_.dim));
    d_total_[length - 1] += after;
    for (int64_t i = 0; i < length; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, length - i);
      product<true, true>(rows, length - i, sizes_.value_dim, from(head.attention, i, i), from(d_out_, i), from(d_written_, i));
    }
    for (int64_t end = length; end > 0;) {
      const int64_t first = (end - 1) / kRows * kRows;
      product<true, true>(end - first, length - end, sizes_.value_dim, from(head.system, end, first), from(d_errors_, end),
                          from(d_written_, first));
      for (int64_t i = end; i-- > first;) {
        t_.dbeta[head.scalar_at(chunk.begin + i)] = dot(d_written_.row(i), errors_.row(i), width);
        scaled(d_written_.row(i), head.beta[i], d_errors_.row(i), width);
        for (int64_t j = first; j < i; ++j)
          add_scaled(d_errors_.row(i), head.system.row(i)[j], d_written_.row(j), width);
      }
      end = first;
    }
  }

  // Gradients of q_i.k_j and k_i.k_j, and of the decays between tokens.
  void differentiate_products() {
    const int64_t length = head.length, value_dim = sizes_.value_dim;
    for (int64_t i = 0; i < length; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, length - i), columns = i + rows;
      product<false, false>(rows, value_dim, columns, from(d_out_, i), written_turned_, from(d_attention_, i));
      product<false, false>(rows, value_dim, columns, from(d_errors_, i), written_turned_, from(d_system_, i));
    }
    std::vector<float>& through = through_;  // of e^G_j
    std::fill(through.begin(), through.end(), 0.0f);
    for (int64_t i = 0; i < length; ++i) {
      head.attention.row(i)[i] = 0;  // whose decay is 1, whatever G
      Vec through_row{};
      for (int64_t j = 0; j < padded(length); j += kLanes) {
        const auto at = [&](const Grid& grid) { return grid.row(i) + j; };
        const Vec decay = load(at(head.decay));  // 0 after the diagonal, where other numbers are of no meaning
        const Vec d_attention = decay != 0 ? load(at(d_attention_)) : Vec{};
        const Vec d_system = decay != 0 ? load(at(d_system_)) : Vec{};
        const Vec both = d_attention * load(at(head.attention)) + d_system * load(at(head.system));
        through_row += both;
        store(&through[j], load(&through[j]) + both);
        store(at(d_attention_), d_attention * decay);
        store(at(d_system_), -d_system * decay);
      }
      d_total_[i] += sum(through_row);
      d_system_.row(i)[i] = 0;
    }
    for (int64_t i = 0; i < length; ++i) d_total_[i] -= through[i];
  }

  void differentiate_states() {
    const int64_t length = head.length, dim = sizes_.dim, value_dim = sizes_.value_dim, width = padded(value_dim);
    // Not beyond value_dim, where zeros must stay zeros whatever the factor.
    for (int64_t i = 0; i < length; ++i) scaled(d_out_.row(i), head.entry[i], d_out_.row(i), value_dim);
    product<false, false>(length, value_dim, dim, d_out_, state_turned_, dq_);
    for (int64_t i = 0; i < length; ++i) d_total_[i] += dot(dq_.row(i), head.q.row(i), padded(dim));
    for (int64_t i = 0; i < length; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, length - i);
      product<false, true>(rows, i + rows, dim, from(d_attention_, i), head.k, from(dq_, i));
    }
    // d_errors_ itself is the gradient of v.
    for (int64_t i = 0; i < length; ++i) scaled(d_errors_.row(i), -head.entry[i], d_written_.row(i), width);
    product<false, false>(length, value_dim, dim, d_written_, state_turned_, dk_);
    for (int64_t i = 0; i < length; ++i) d_total_[i] += dot(dk_.row(i), head.k.row(i), padded(dim));
    for (int64_t i = 0; i < length; ++i) scaled(head.written.row(i), head.exit[i], head.written.row(i), value_dim);
    product<false, true>(length, value_dim, dim, head.written, d_state_turned_, dk_);
    for (int64_t i = 0; i < length; i += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, length - i);
      product<false, true>(rows, i + rows, dim, from(d_system_, i), head.k, from(dk_, i));
      product<true, true>(rows, length - i, dim, from(d_system_, i, i), from(head.k, i), from(dk_, i));
      product<true, true>(rows, length - i, dim, from(d_attention_, i, i), from(head.q, i), from(dk_, i));
    }
    for (int64_t c = 0; c < dim; ++c) scaled(d_state_.row(c), head.across(), d_state_.row(c), width);
    product<true, true>(dim, length, value_dim, head.q, d_out_, d_state_);
    product<true, true>(dim, length, value_dim, head.k, d_written_, d_state_);
  }

  void write(const Chunk& chunk) {
    double d_sum = 0;
    for (int64_t i = head.length; i-- > 0;) {
      const int64_t token = chunk.begin + i;
      d_sum += d_total_[i];
      t_.dg[head.scalar_at(token)] = t_.g[head.scalar_at(token)] < kLowest ? 0 : d_sum;
      std::copy_n(d_errors_.row(i), sizes_.value_dim, t_.dv + head.value_at(token));
      give(dq_.row(i), t_.dq + head.key_at(token));
      give(dk_.row(i), t_.dk + head.key_at(token));
    }
  }

  // The value heads of a key head share its gradient.
  void give(const float* gradient, float* to) const {
    for (int64_t c = 0; c < sizes_.dim; ++c) to[c] = head.group ? to[c] + gradient[c] : gradient[c];
  }

  const std::vector<Chunk> chunks_;
  Grid state_turned_, d_state_, d_state_turned_, errors_, written_turned_, d_out_, d_written_, d_errors_;
  Grid d_system_, d_attention_, dq_, dk_;
  std::vector<float> through_;
  std::vector<double> d_total_;  // of G
};

template <class Pass>
void each_task(const Sizes& sizes, const Tensors& tensors, int64_t first, int64_t end) {
  Pass pass(sizes, tensors);
  for (int64_t task = first; task < end; ++task) {
    pass.head.batch = task / sizes.key_heads;
    pass.head.key_head = task % sizes.key_heads;
    for (pass.head.group = 0; pass.head.group < sizes.groups; ++pass.head.group) pass.run();
  }
}

}  // namespace

extern "C" {

void holdfast_forward(const Sizes* sizes, const Tensors* tensors, int64_t first, int64_t end) {
  each_task<Forward>(*sizes, *tensors, first, end);
}

void holdfast_backward(const Sizes* sizes, const Tensors* tensors, int64_t first, int64_t end) {
  each_task<Backward>(*sizes, *tensors, first, end);
}
}
