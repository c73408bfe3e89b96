// Few tokens through a layer on a CPU, float32: what a step of generation computes.
//
// cpu_rows.py compiles this file and calls its functions, and says what each computes in torch. With a token or a few, a layer is
// a walk over its weights, and in torch the overhead of some forty small operations is most of the time. Here a layer is two
// calls.
//
// Every number of a token is summed in an order that depends on nothing but the sizes of the model: not on the tokens beside it,
// not on the tile that it is in, not on the number of threads. So a token is the same, to the last bit, in every batch.
//
// Letters: T tokens, D width, O outputs, A heads, C head width, N experts, K of a token, H hidden width.

#include <algorithm>
#include <limits>
#include <vector>

#include <omp.h>

#include "cpu_vectors.h"

namespace {

inline float reduce(Vector sum) {
  float lanes[LANES];
  std::memcpy(lanes, &sum, sizeof lanes);
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

constexpr int OUTPUTS_OF_TILE = 4;

// a * b + c, rounded once where vectors are. Written out: in one copy of a loop the compiler may fuse what it does not in another.
inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// y[t][o] = sum over k of x[t][k] * w[o * w_row + k]. The order of a sum is the same for every tile.
template <int TOKENS, int OUTPUTS>
inline void dots(const float* const* x, const float* w, int64_t w_row, int64_t depth, float (*y)[OUTPUTS]) {
  Vector sum[TOKENS][OUTPUTS] = {};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    Vector right[OUTPUTS];
#pragma GCC unroll 8
    for (int o = 0; o < OUTPUTS; ++o) right[o] = *reinterpret_cast<const Vector*>(w + o * w_row + k);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      const Vector left = *reinterpret_cast<const Vector*>(x[t] + k);
#pragma GCC unroll 8
      for (int o = 0; o < OUTPUTS; ++o) sum[t][o] += left * right[o];
    }
  }
  for (int t = 0; t < TOKENS; ++t)
    for (int o = 0; o < OUTPUTS; ++o) {
      float total = reduce(sum[t][o]);
      for (int64_t j = k; j < depth; ++j) total = fused(x[t][j], w[o * w_row + j], total);
      y[t][o] = total;
    }
}

// Calls use(t, o, value) for every token and the outputs [from, to), value = x[t] . w[o].
template <typename Use>
inline void products(const float* const* x, int64_t T, const float* w, int64_t w_row, int64_t depth, int64_t from, int64_t to, Use use) {
  int64_t o = from;
  for (; o + 4 <= to; o += 4) {
    for (int64_t t = 0; t < T; t += 4) {
      const int64_t tokens = std::min<int64_t>(4, T - t);
      const float* bank = w + o * w_row;
      float y[4][4];
      if (tokens == 4)
        dots<4, 4>(x + t, bank, w_row, depth, y);
      else if (tokens == 3)
        dots<3, 4>(x + t, bank, w_row, depth, y);
      else if (tokens == 2)
        dots<2, 4>(x + t, bank, w_row, depth, y);
      else
        dots<1, 4>(x + t, bank, w_row, depth, y);
      for (int64_t i = 0; i < tokens; ++i)
        for (int j = 0; j < 4; ++j) use(t + i, o + j, y[i][j]);
    }
  }
  for (; o < to; ++o)
    for (int64_t t = 0; t < T; ++t) {
      float y[1][1];
      dots<1, 1>(x + t, w + o * w_row, w_row, depth, y);
      use(t, o, y[0][0]);
    }
}

// y[r][d] += sum over h of by[r][h] * w[h * w_row + d], one after the other.
template <int ROWS, int VECTORS>
inline void combine_columns(const float* const* by, int64_t depth, const float* w, int64_t w_row, int64_t d, float* const* y) {
  Vector sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r) std::memcpy(sum[r], y[r] + d, sizeof sum[r]);
  for (int64_t h = 0; h < depth; ++h) {
    Vector right[VECTORS];
    std::memcpy(right, w + h * w_row + d, sizeof right);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) sum[r][i] += by[r][h] * right[i];
  }
  for (int r = 0; r < ROWS; ++r) std::memcpy(y[r] + d, sum[r], sizeof sum[r]);
}

template <int ROWS>
inline void combine(const float* const* by, int64_t depth, const float* w, int64_t w_row, int64_t width, float* const* y) {
  constexpr int VECTORS = ROWS > 2 ? 2 : 4;
  int64_t d = 0;
  for (; d + VECTORS * LANES <= width; d += VECTORS * LANES) combine_columns<ROWS, VECTORS>(by, depth, w, w_row, d, y);
  for (; d + LANES <= width; d += LANES) combine_columns<ROWS, 1>(by, depth, w, w_row, d, y);
  for (; d < width; ++d)
    for (int r = 0; r < ROWS; ++r) {
      float sum = y[r][d];
      for (int64_t h = 0; h < depth; ++h) sum = fused(by[r][h], w[h * w_row + d], sum);
      y[r][d] = sum;
    }
}

// The part [from, to) of `count` items of one thread, whole groups of `grain` but at the end: whether an item is in a tile or a
// vector, or is one of those left over, does not depend on the number of threads.
struct Part {
  int64_t from, to;
  Part(int64_t count, int64_t grain) {
    const int64_t groups = (count + grain - 1) / grain, thread = omp_get_thread_num(), threads = omp_get_num_threads();
    from = std::min(count, groups * thread / threads * grain);
    to = std::min(count, groups * (thread + 1) / threads * grain);
  }
};

std::vector<const float*> rows_of(const float* x, int64_t T, int64_t width) {
  std::vector<const float*> rows(T);
  for (int64_t t = 0; t < T; ++t) rows[t] = x + t * width;
  return rows;
}

// y = x / rms(x) * weight
void normalize(const float* x, const float* weight, float eps, int64_t D, float* y) {
  Vector squares = {};
  int64_t k = 0;
  for (; k + LANES <= D; k += LANES) {
    const Vector part = *reinterpret_cast<const Vector*>(x + k);
    squares += part * part;
  }
  float sum = reduce(squares);
  for (; k < D; ++k) sum += x[k] * x[k];
  const float scale = 1.0f / std::sqrt(sum / D + eps);
  for (int64_t j = 0; j < D; ++j) y[j] = x[j] * scale * weight[j];
}

// Turns the pairs (i, i + C / 2) of `heads` heads by the angles of a position.
void rotate(float* x, int64_t heads, int64_t C, const float* cos, const float* sin) {
  for (int64_t a = 0; a < heads; ++a)
    for (int64_t i = 0; i < C / 2; ++i) {
      float &first = x[a * C + i], &second = x[a * C + C / 2 + i];
      const float turned = first * cos[i] - second * sin[i];
      second = second * cos[i] + first * sin[i];
      first = turned;
    }
}

// Sizes of a call, and where the cache keeps what: `store` is [pages, page, 2 * kv_heads, C].
struct Shape {
  int64_t T, D, heads, kv_heads, C, page, pages_of_sequence, routed_and_shared;
};

// One query head over the tokens of its sequence, up to its own position.
void attend_head(const float* q, const float* store, const int64_t* pages, int64_t length, int64_t kv_head, const Shape& s, float* score, float* y) {
  const int64_t row = 2 * s.kv_heads * s.C;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.C));
  float most = -std::numeric_limits<float>::infinity();
  for (int64_t p = 0; p * s.page < length; ++p) {
    const float* keys = store + pages[p] * s.page * row + kv_head * s.C;
    const int64_t count = std::min(s.page, length - p * s.page);
    products(&q, 1, keys, row, s.C, 0, count, [&](int64_t, int64_t j, float value) {
      score[p * s.page + j] = value * scale;
      most = std::max(most, value * scale);
    });
  }
  float sum = 0;
  for (int64_t j = 0; j < length; ++j) score[j] = exponential(score[j] - most);
  for (int64_t j = 0; j < length; ++j) sum += score[j];
  std::fill(y, y + s.C, 0.0f);
  for (int64_t p = 0; p * s.page < length; ++p) {
    const float* values = store + pages[p] * s.page * row + (s.kv_heads + kv_head) * s.C;
    const float* weights = score + p * s.page;
    combine<1>(&weights, std::min(s.page, length - p * s.page), values, row, s.C, &y);
  }
  for (int64_t c = 0; c < s.C; ++c) y[c] /= sum;
}

}  // namespace

extern "C" {

// y[T, O] = x[T, D] w[O, D]^T
void linear(const float* x, const float* w, float* y, int64_t T, int64_t D, int64_t O, int64_t threads) {
  const auto rows = rows_of(x, T, D);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const Part part(O, OUTPUTS_OF_TILE);
    products(rows.data(), T, w, D, D, part.from, part.to, [=](int64_t t, int64_t o, float value) { y[t * O + o] = value; });
  }
}

// x += attention(norm(x)); normed = moe_norm(x); logits = normed router^T. Keys and values of the tokens go to the cache first.
// A token sees the first position + 1 tokens of its sequence, whose pages are a row of `pages`.
void attend(float* x, const float* norm, const float* qkv_w, const float* out_w, const float* moe_norm, const float* router, const float* cos,
            const float* sin, float* store, const int64_t* position, const int64_t* cache_row, const int64_t* sequence, const int64_t* pages,
            float* normed, float* logits, float* scratch, const Shape* shape, float eps, int64_t threads) {
  const Shape s = *shape;
  const int64_t width = s.heads * s.C, kv_width = 2 * s.kv_heads * s.C, F = width + kv_width;
  float *qkv = scratch, *y = qkv + s.T * F;
  int64_t longest = 0;
  for (int64_t t = 0; t < s.T; ++t) longest = std::max(longest, position[t] + 1);
  const auto normed_rows = rows_of(normed, s.T, s.D), y_rows = rows_of(y, s.T, width);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const Part tokens(s.T, 1);
    for (int64_t t = tokens.from; t < tokens.to; ++t) normalize(x + t * s.D, norm, eps, s.D, normed + t * s.D);
#pragma omp barrier
    const Part inputs(F, OUTPUTS_OF_TILE);
    products(normed_rows.data(), s.T, qkv_w, s.D, s.D, inputs.from, inputs.to, [=](int64_t t, int64_t o, float value) { qkv[t * F + o] = value; });
#pragma omp barrier
    for (int64_t t = tokens.from; t < tokens.to; ++t) {
      rotate(qkv + t * F, s.heads + s.kv_heads, s.C, cos + position[t] * s.C / 2, sin + position[t] * s.C / 2);
      std::memcpy(store + cache_row[t] * kv_width, qkv + t * F + width, sizeof(float) * kv_width);
    }
#pragma omp barrier
    std::vector<float> score(longest);
    const Part heads(s.T * s.heads, 1);
    for (int64_t i = heads.from; i < heads.to; ++i) {
      const int64_t t = i / s.heads, a = i % s.heads;
      attend_head(qkv + t * F + a * s.C, store, pages + sequence[t] * s.pages_of_sequence, position[t] + 1, a * s.kv_heads / s.heads, s, score.data(),
                  y + t * width + a * s.C);
    }
#pragma omp barrier
    const Part outputs(s.D, OUTPUTS_OF_TILE);
    products(y_rows.data(), s.T, out_w, width, width, outputs.from, outputs.to, [=](int64_t t, int64_t o, float value) { x[t * s.D + o] += value; });
#pragma omp barrier
    for (int64_t t = tokens.from; t < tokens.to; ++t) normalize(x + t * s.D, moe_norm, eps, s.D, normed + t * s.D);
#pragma omp barrier
    const Part experts(s.routed_and_shared, OUTPUTS_OF_TILE);
    products(normed_rows.data(), s.T, router, s.D, s.D, experts.from, experts.to,
             [=](int64_t t, int64_t o, float value) { logits[t * s.routed_and_shared + o] = value; });
  }
}

// The K experts of highest probability of each token, best first, of equals the lowest number: `route` of the router, with
// `mask` (0, or -inf for experts that a seat may not use; a row a seat) added to the logits, and `bias`, if any, to the
// probabilities where experts are chosen. N marks an empty slot.
void route(const float* logits, int64_t E, const float* mask, const int64_t* seat, const float* bias, float* weights, int64_t* chosen, int64_t T,
           int64_t N, int64_t K, int64_t sigmoid, int64_t normalize) {
  std::vector<float> p(N), score(N);
  for (int64_t t = 0; t < T; ++t) {
    const float infinite = std::numeric_limits<float>::infinity();
    float most = -infinite, sum = 0;
    for (int64_t n = 0; n < N; ++n) p[n] = logits[t * E + n] + (mask ? mask[seat[t] * N + n] : 0.0f), most = std::max(most, p[n]);
    for (int64_t n = 0; n < N; ++n) {
      p[n] = p[n] == -infinite ? 0.0f : sigmoid ? 1.0f / (1.0f + exponential(-p[n])) + 1e-7f : exponential(p[n] - most);
      sum += p[n];
    }
    for (int64_t n = 0; n < N; ++n) score[n] = p[n] <= 0 ? -infinite : bias ? (sigmoid ? p[n] : p[n] / sum) + bias[n] : p[n];
    float together = 0;
    for (int64_t k = 0; k < K; ++k) {
      const int64_t best = std::max_element(score.begin(), score.end()) - score.begin();
      const bool empty = score[best] == -infinite;
      chosen[t * K + k] = empty ? N : best;
      together += weights[t * K + k] = empty ? 0.0f : sigmoid ? p[best] : p[best] / sum;
      score[best] = -infinite;
    }
    for (int64_t k = 0; normalize && k < K; ++k) weights[t * K + k] /= together;
  }
}

// y[t] += sum over the experts of token t, in the order of their numbers, of weight * SwiGLU of the expert. Weights of expert e
// lie in row place[e] of the banks; -1 leaves it out, and without `place` it is row e. Without `chosen` every token uses all K
// experts; without `weights` each has weight 1.
void experts(const float* x, const float* weights, const int64_t* chosen, const int64_t* place, const float* gate_up, const float* down, float* y,
             int64_t T, int64_t K, int64_t N, int64_t D, int64_t H, int64_t threads) {
  std::vector<int64_t> end(N + 1), token(T * K);
  std::vector<float> weight(T * K);
  auto expert_of = [=](int64_t t, int64_t k) { return chosen ? std::min(chosen[t * K + k], N) : k; };
  auto used = [=](int64_t e) { return e < N && (!place || place[e] >= 0); };
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k)
      if (const int64_t e = expert_of(t, k); used(e)) ++end[e + 1];
  for (int64_t e = 0; e < N; ++e) end[e + 1] += end[e];
  std::vector<int64_t> next(end.begin(), end.end());
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k)
      if (const int64_t e = expert_of(t, k); used(e)) {
        token[next[e]] = t;
        weight[next[e]++] = weights ? weights[t * K + k] : 1.0f;
      }
  const int64_t slots = end[N];
  std::vector<const float*> rows(slots);
  for (int64_t r = 0; r < slots; ++r) rows[r] = x + token[r] * D;
  std::vector<float> hidden(slots * 2 * H);
  float* hidden_rF = hidden.data();
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const Part inner(H, LANES), outer(D, LANES);
    for (int64_t e = 0; e < N; ++e) {
      const int64_t first = end[e], count = end[e + 1] - first;
      if (!count) continue;
      const float* bank = gate_up + (place ? place[e] : e) * 2 * H * D;
      for (int64_t half = 0; half < 2; ++half)
        products(rows.data() + first, count, bank + half * H * D, D, D, inner.from, inner.to,
                 [=](int64_t r, int64_t h, float value) { hidden_rF[(first + r) * 2 * H + half * H + h] = value; });
      for (int64_t r = first; r < first + count; ++r) {
        float *gate = hidden_rF + r * 2 * H, *up = gate + H;
        for (int64_t h = inner.from; h < inner.to; ++h) gate[h] = weight[r] * up[h] * gate[h] / (1.0f + exponential(-gate[h]));
      }
    }
#pragma omp barrier
    for (int64_t e = 0; e < N; ++e) {
      const float* bank = down + (place ? place[e] : e) * H * D + outer.from;
      for (int64_t r = end[e]; r < end[e + 1]; r += 4) {
        const int64_t count = std::min<int64_t>(4, end[e + 1] - r), width = outer.to - outer.from;
        const float* by[4];
        float* to[4];
        for (int64_t i = 0; i < count; ++i) by[i] = hidden_rF + (r + i) * 2 * H, to[i] = y + token[r + i] * D + outer.from;
        if (count == 4)
          combine<4>(by, H, bank, D, width, to);
        else if (count == 3)
          combine<3>(by, H, bank, D, width, to);
        else if (count == 2)
          combine<2>(by, H, bank, D, width, to);
        else
          combine<1>(by, H, bank, D, width, to);
      }
    }
  }
}

}  // extern "C"
