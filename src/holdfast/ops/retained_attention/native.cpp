// Retained attention on a CPU in fp32: one tile of queries at a time, one pass over the scores, which never leave the
// cache. What it computes is said in blocked.py; what differs is that far keys are not gathered anew for each tile.
//
// Keys come in panels of kPanel. A tile of queries reads the panels of the near keys where they lie, and those of the
// far keys in `Far`, a table of slots: a key takes a slot when it falls behind the window and gives it back when no later
// query sees it, so that each key is copied once. A panel is skipped where the tile sees nothing of it and masked where
// it sees a part.
//
// A row is one KV head of one sequence. Query rows are queries times groups, as in blocked.py; they carry scale/ln 2.
// Channels are padded to a multiple of kPanel, keys to whole panels, both with zeros.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../vectors.h"

namespace {

constexpr int kTile = 96;            // query rows of a tile
constexpr int kBlock = 64 / kPanel;  // panels that are read at once
constexpr int kColumns = kBlock * kPanel;

}  // namespace

extern "C" {

struct Sizes {
  int64_t queries, keys, padded_keys, groups, dim, value_dim, window;
  int64_t until_stride;  // between the rows of `until`; 0 if they share one
};

// All rows of a tensor, contiguous. Turned: [rows, panels, channels, kPanel]. What a pass does not need is null.
struct Tensors {
  const float *q;               // [rows, queries * groups, dim]
  const float *k, *k_turned;    // [rows, padded_keys, dim]
  const float *v, *v_turned;    // [rows, padded_keys, value_dim]
  const int32_t *until;         // [rows or 1, padded_keys]: the last query that sees each key, -1 where none does
  float *out, *log_sum;         // [rows, queries * groups, value_dim], [rows, queries * groups] base 2
  const float *grad_out, *inner;  // like out; sum of out * grad_out, like log_sum
  float *dq, *dk, *dv;          // like q, k, v; dk and dv hold zeros
};

int holdfast_panel() { return kPanel; }
}

namespace {

// Keys in panels, as a tile reads them.
struct Keys {
  const float *k, *k_turned, *v, *v_turned;
  const int32_t* until;
  const int32_t *earliest, *latest;  // of `until`, for each panel
  float *dk, *dv;
  bool far;  // all before the tile's first query
};

void summarise(const int32_t* until, int panels, std::vector<int32_t>& earliest, std::vector<int32_t>& latest) {
  earliest.resize(panels);
  latest.resize(panels);
  for (int panel = 0; panel < panels; ++panel) {
    const auto ends = std::minmax_element(until + panel * kPanel, until + (panel + 1) * kPanel);
    earliest[panel] = *ends.first;
    latest[panel] = *ends.second;
  }
}

// The far keys that some query of the tile sees, in slots without gaps.
class Far {
 public:
  Far(const Keys& near, int dim, int value_dim, bool backward)
      : near_(near), dim_(dim), value_dim_(value_dim), backward_(backward) {}

  // Move on to a tile that begins with query `first` and whose near keys begin with `end`.
  void advance(int end, int first) {
    for (int slot = count_ - 1; slot >= 0; --slot)
      if (until_[slot] < first) drop(slot);
    for (; entered_ < end; ++entered_)
      if (near_.until[entered_] >= first) take(entered_);
    summarise(until_.data(), panels(), earliest_, latest_);
  }

  void finish() {
    while (count_) drop(count_ - 1);
  }

  int panels() const { return (count_ + kPanel - 1) / kPanel; }

  Keys keys() {
    return {k_.data(),       k_turned_.data(), v_.data(), v_turned_.data(), until_.data(), earliest_.data(),
            latest_.data(), dk_.data(),       dv_.data(), true};
  }

 private:
  void take(int key) {
    const int slot = count_++;
    if (slot == static_cast<int>(until_.size())) grow();
    until_[slot] = near_.until[key];
    index_[slot] = key;
    turn(near_.k + key * dim_, k_turned_, slot, dim_);
    if (backward_) {
      turn(near_.v + key * value_dim_, v_turned_, slot, value_dim_);
      std::copy_n(near_.k + key * dim_, dim_, k_.data() + slot * dim_);
      std::fill_n(dk_.data() + slot * dim_, dim_, 0.0f);
      std::fill_n(dv_.data() + slot * value_dim_, value_dim_, 0.0f);
    } else {
      std::copy_n(near_.v + key * value_dim_, value_dim_, v_.data() + slot * value_dim_);
    }
  }

  // Give the slot to the last key, after its gradients have been added to those of the row.
  void drop(int slot) {
    const int last = --count_;
    if (backward_) {
      add(dk_.data() + slot * dim_, near_.dk + index_[slot] * dim_, dim_);
      add(dv_.data() + slot * value_dim_, near_.dv + index_[slot] * value_dim_, value_dim_);
    }
    until_[slot] = until_[last];
    index_[slot] = index_[last];
    until_[last] = -1;
    if (slot == last) return;
    turn(near_.k + index_[slot] * dim_, k_turned_, slot, dim_);
    if (backward_) {
      turn(near_.v + index_[slot] * value_dim_, v_turned_, slot, value_dim_);
      std::copy_n(k_.data() + last * dim_, dim_, k_.data() + slot * dim_);
      std::copy_n(dk_.data() + last * dim_, dim_, dk_.data() + slot * dim_);
      std::copy_n(dv_.data() + last * value_dim_, value_dim_, dv_.data() + slot * value_dim_);
    } else {
      std::copy_n(v_.data() + last * value_dim_, value_dim_, v_.data() + slot * value_dim_);
    }
  }

  void grow() {
    const size_t slots = until_.size() + kColumns;
    until_.resize(slots, -1);
    index_.resize(slots);
    k_turned_.resize(slots * dim_);
    if (backward_) {
      v_turned_.resize(slots * value_dim_);
      k_.resize(slots * dim_);
      dk_.resize(slots * dim_);
      dv_.resize(slots * value_dim_);
    } else {
      v_.resize(slots * value_dim_);
    }
  }

  static void turn(const float* from, std::vector<float>& to, int slot, int channels) {
    float* column = to.data() + (slot / kPanel) * kPanel * channels + slot % kPanel;
    for (int c = 0; c < channels; ++c) column[c * kPanel] = from[c];
  }

  static void add(const float* from, float* to, int channels) {
    for (int c = 0; c < channels; ++c) to[c] += from[c];
  }

  const Keys& near_;
  const int64_t dim_, value_dim_;
  const bool backward_;
  int entered_ = 0, count_ = 0;
  std::vector<float> k_, k_turned_, v_, v_turned_, dk_, dv_;
  std::vector<int32_t> until_, index_, earliest_, latest_;
};

// What one pass does with a block of keys; scores [rows of the tile, kColumns].
struct Block {
  const Keys& keys;
  int panel, panels;  // the first and how many
  int begin, rows;    // query rows of the tile that see any of them
};

// One tile of queries: first ... last, in `rows` query rows.
struct Tile {
  int first, last, groups;
  const float* q;
  float scores[kTile * kColumns];

  // The scores of the block; -inf where a query does not see a key.
  void score(const Block& block, int dim, float* into) const {
    multiply<false, false>(block.rows, dim, block.panels, q + block.begin * dim, dim,
                           block.keys.k_turned + int64_t(block.panel) * kPanel * dim, kPanel, int64_t(kPanel) * dim,
                           into, kColumns);
    for (int panel = 0; panel < block.panels; ++panel)
      if (partly_seen(block.keys, block.panel + panel)) hide(block, panel, into);
  }

  bool partly_seen(const Keys& keys, int panel) const {
    return keys.earliest[panel] < last || (!keys.far && (panel + 1) * kPanel - 1 > first);
  }

  void hide(const Block& block, int panel, float* scores) const {
    const int key = (block.panel + panel) * kPanel;
    for (int half = 0; half < 2; ++half) {
      const Ints until = *reinterpret_cast<const LooseInts*>(block.keys.until + key + half * kLanes);
      Ints index;
      for (int lane = 0; lane < kLanes; ++lane) index[lane] = block.keys.far ? -1 : key + half * kLanes + lane;
      for (int row = 0; row < block.rows; ++row) {
        float* at = scores + row * kColumns + panel * kPanel + half * kLanes;
        const int query = first + (block.begin + row) / groups;
        const Ints seen = (index <= query) & (until >= query);
        store(at, seen ? load(at) : all(-std::numeric_limits<float>::infinity()));
      }
    }
  }

  // Call `visit` with the blocks that this tile sees of the panels begin ... end - 1.
  template <class Visit>
  void each_block(const Keys& keys, int begin, int end, const Visit& visit) const {
    for (int panel = begin; panel < end;) {
      if (keys.latest[panel] < first) {
        ++panel;
        continue;
      }
      // Narrow blocks where the tile sees a part, for the rows are the same for all panels of a block.
      const bool edge = !keys.far && partly_seen(keys, panel);
      const int most = edge ? std::max(1, kBlock / 2) : kBlock;
      int latest = -1, panels = 0;
      while (panels < most && panel + panels < end && keys.latest[panel + panels] >= first &&
             (edge || keys.far || !partly_seen(keys, panel + panels)))
        latest = std::max(latest, keys.latest[panel + panels++]);
      const int from = keys.far ? 0 : std::max(0, panel * kPanel - first);
      const int to = std::min(last, latest) - first + 1;
      if (from < to) visit(Block{keys, panel, panels, from * groups, (to - from) * groups});
      panel += panels;
    }
  }
};

// The tiles of one row, in order; `work` gets each with the far keys and the panels of the near ones.
template <class Work>
void walk(const Sizes& sizes, const Keys& near, bool backward, const Work& work) {
  Far far(near, sizes.dim, sizes.value_dim, backward);
  std::vector<Tile> tile(1);
  const int length = kTile / sizes.groups;
  for (int64_t start = 0; start < sizes.queries; start += length) {
    const int first = sizes.keys - sizes.queries + start;
    const int last = std::min(first + length, int(sizes.keys)) - 1;
    const int panel = std::max(0, first - int(sizes.window)) / kPanel;
    tile[0].first = first;
    tile[0].last = last;
    tile[0].groups = sizes.groups;
    far.advance(panel * kPanel, first);
    work(tile[0], start * sizes.groups, far, panel, last / kPanel + 1);
  }
  far.finish();
}

// The rows of queries that a tile has begun to answer.
struct Answer {
  float highest[kTile], total[kTile];

  // Scores of a block -> weights, and what was summed before brought to the same scale.
  void add(const Block& block, float* scores, float* out, int value_dim) {
    const int vectors = 2 * block.panels;
    for (int row = 0; row < block.rows; ++row, scores += kColumns) {
      Vec top = load(scores);
      for (int i = 1; i < vectors; ++i) top = larger(top, load(scores + i * kLanes));
      const int at = block.begin + row;
      const float height = std::max(highest[at], largest(top));
      if (height > highest[at]) {
        const float shrink = std::exp2(highest[at] - height);
        highest[at] = height;
        total[at] *= shrink;
        for (int c = 0; c < value_dim; ++c) out[at * value_dim + c] *= shrink;
      }
      Vec sum_of_weights{};
      for (int i = 0; i < vectors; ++i) {
        const Vec weights = exp2(load(scores + i * kLanes) - height);
        store(scores + i * kLanes, weights);
        sum_of_weights += weights;
      }
      total[at] += sum(sum_of_weights);
    }
  }
};

void forward_row(const Sizes& sizes, const Tensors& t, int64_t row, const Keys& near) {
  const int64_t query_rows = sizes.queries * sizes.groups, dim = sizes.dim, value_dim = sizes.value_dim;
  walk(sizes, near, false, [&](Tile& tile, int64_t start, Far& far, int begin, int end) {
    const int rows = (tile.last - tile.first + 1) * sizes.groups;
    tile.q = t.q + (row * query_rows + start) * dim;
    float* out = t.out + (row * query_rows + start) * value_dim;
    std::fill_n(out, rows * value_dim, 0.0f);
    Answer answer;
    std::fill_n(answer.highest, rows, -1e30f);  // finite, so that a query that sees nothing has weights of 0
    std::fill_n(answer.total, rows, 0.0f);
    const auto visit = [&](const Block& block) {
      tile.score(block, dim, tile.scores);
      answer.add(block, tile.scores, out, value_dim);
      multiply<false, true>(block.rows, block.panels * kPanel, value_dim / kPanel, tile.scores, kColumns,
                            block.keys.v + int64_t(block.panel) * kPanel * value_dim, value_dim, kPanel,
                            out + block.begin * value_dim, value_dim);
    };
    tile.each_block(far.keys(), 0, far.panels(), visit);
    tile.each_block(near, begin, end, visit);
    for (int i = 0; i < rows; ++i) {
      const float total = answer.total[i];
      const float share = total == 0 ? 0 : 1 / total;
      for (int c = 0; c < value_dim; ++c) out[i * value_dim + c] *= share;
      t.log_sum[row * query_rows + start + i] =
          total == 0 ? std::numeric_limits<float>::infinity() : answer.highest[i] + std::log2(total);
    }
  });
}

// Scores and gradients of weights -> weights and gradients of scores, in place.
void differentiate(const Block& block, float* scores, float* grads, const float* log_sum, const float* inner) {
  for (int row = 0; row < block.rows; ++row) {
    const Vec log = all(log_sum[block.begin + row]), mean = all(inner[block.begin + row]);
    for (int i = row * kColumns; i < row * kColumns + block.panels * kPanel; i += kLanes) {
      const Vec weights = exp2(load(scores + i) - log);
      store(scores + i, weights);
      store(grads + i, weights * (load(grads + i) - mean));
    }
  }
}

void backward_row(const Sizes& sizes, const Tensors& t, int64_t row, const Keys& near) {
  const int64_t query_rows = sizes.queries * sizes.groups, dim = sizes.dim, value_dim = sizes.value_dim;
  const int strips = dim / kPanel, value_strips = value_dim / kPanel;
  std::vector<float> grads(kTile * kColumns);
  walk(sizes, near, true, [&](Tile& tile, int64_t start, Far& far, int begin, int end) {
    const int64_t at = row * query_rows + start;
    tile.q = t.q + at * dim;
    const float* grad_out = t.grad_out + at * value_dim;
    float* dq = t.dq + at * dim;
    std::fill_n(dq, (tile.last - tile.first + 1) * sizes.groups * dim, 0.0f);
    const auto visit = [&](const Block& block) {
      const int64_t key = int64_t(block.panel) * kPanel;
      const int columns = block.panels * kPanel;
      const float* grad = grad_out + block.begin * value_dim;
      tile.score(block, dim, tile.scores);
      multiply<false, false>(block.rows, value_dim, block.panels, grad, value_dim, block.keys.v_turned + key * value_dim,
                             kPanel, int64_t(kPanel) * value_dim, grads.data(), kColumns);
      differentiate(block, tile.scores, grads.data(), t.log_sum + at, t.inner + at);
      multiply<true, true>(columns, block.rows, value_strips, tile.scores, kColumns, grad, value_dim, kPanel,
                           block.keys.dv + key * value_dim, value_dim);
      multiply<true, true>(columns, block.rows, strips, grads.data(), kColumns, tile.q + block.begin * dim, dim, kPanel,
                           block.keys.dk + key * dim, dim);
      multiply<false, true>(block.rows, columns, strips, grads.data(), kColumns, block.keys.k + key * dim, dim, kPanel,
                            dq + block.begin * dim, dim);
    };
    tile.each_block(far.keys(), 0, far.panels(), visit);
    tile.each_block(near, begin, end, visit);
  });
}

template <class Pass>
void each_row(const Sizes& sizes, const Tensors& t, int64_t first, int64_t end, const Pass& pass) {
  std::vector<int32_t> earliest, latest;
  for (int64_t row = first; row < end; ++row) {
    const int64_t keys = row * sizes.padded_keys * sizes.dim, values = row * sizes.padded_keys * sizes.value_dim;
    const auto at = [](auto* pointer, int64_t offset) { return pointer ? pointer + offset : nullptr; };
    const int32_t* until = t.until + row * sizes.until_stride;
    summarise(until, sizes.padded_keys / kPanel, earliest, latest);
    const Keys near{at(t.k, keys), at(t.k_turned, keys), at(t.v, values), at(t.v_turned, values), until,
                    earliest.data(), latest.data(), at(t.dk, keys), at(t.dv, values), false};
    pass(sizes, t, row, near);
  }
}

}  // namespace

extern "C" {

void holdfast_forward(const Sizes* sizes, const Tensors* tensors, int64_t first, int64_t end) {
  each_row(*sizes, *tensors, first, end, forward_row);
}

void holdfast_backward(const Sizes* sizes, const Tensors* tensors, int64_t first, int64_t end) {
  each_row(*sizes, *tensors, first, end, backward_row);
}
}
