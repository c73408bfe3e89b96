// The routed experts on a CPU, float32: forward and backward in one pass over chunks of an expert's rows.
//
// cpu_grouped_mlp.py compiles this file and calls its two functions; grouped_mlp.py is the readable twin. A thread takes a
// chunk, copies its tokens into memory that stays in its cache, and does everything there: GEMMs, SwiGLU, gradients. No BLAS:
// matrices as small as an expert's run faster on a tile that is kept in registers, and the copy that a GEMM makes of its operands
// is the gather, which has to be made anyway.
//
// A matrix [rows, columns] is copied as panels [columns / PANEL][rows][PANEL], so that a tile reads memory in order whether
// rows or columns are summed over. Chunks add to the output in their order, so that threads change no bit of the result.
//
// Letters: D width, H hidden width, F = 2 H (gate columns, then up columns), P columns of a panel.

#include <atomic>
#include <thread>
#include <vector>

#include <omp.h>

#include "cpu_vectors.h"

namespace {

// A tile is TILE x PANEL sums in registers: 16 of 32 with AVX-512, 8 of 16 with AVX2, 16 of 32 with NEON.
constexpr int TILE = LANES == 8 ? 4 : 8;
constexpr int PANEL = 2 * LANES;
typedef int32_t Indices __attribute__((vector_size(4 * LANES)));

struct Chunk {
  int64_t expert;
  int64_t first, rows;    // sorted slots [first, first + rows) of that expert
  int64_t hidden_row;     // where its rows of `hidden` start
  int64_t padded;         // rows, rounded up to whole tiles; what is in the rows added is never used
  int64_t starts_expert;  // whether it writes the gradients of the expert's weights, and does not add to them
};

// c[i][:] = sum over p, k of a[p * a_panel + i * A_ROW + k * A_DEPTH] * b[p * depth + k][:]
template <int A_ROW, int A_DEPTH>
inline void tile(const float* a, int64_t a_panel, int64_t panels, int64_t depth, const float* b, float* c, int64_t c_row) {
  Vector sum[TILE][2] = {};
  for (int64_t p = 0; p < panels; ++p, a += a_panel) {
    const float* a_k = a;
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k, a_k += A_DEPTH, b += PANEL) {
      const Vector left = *reinterpret_cast<const Vector*>(b), right = *reinterpret_cast<const Vector*>(b + LANES);
#pragma GCC unroll 8
      for (int i = 0; i < TILE; ++i) {
        sum[i][0] += a_k[i * A_ROW] * left;
        sum[i][1] += a_k[i * A_ROW] * right;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < TILE; ++i) {
    *reinterpret_cast<Vector*>(c + i * c_row) = sum[i][0];
    *reinterpret_cast<Vector*>(c + i * c_row + LANES) = sum[i][1];
  }
}

// c[m, n] = a[m, k] b[k, n], all in panels; m is a multiple of TILE.
void multiply(int64_t m, int64_t n, int64_t k, const float* a, const float* b, float* c) {
  for (int64_t j = 0; j < n / PANEL; ++j)
    for (int64_t i = 0; i < m; i += TILE)
      tile<PANEL, 1>(a + i * PANEL, m * PANEL, k / PANEL, PANEL, b + j * k * PANEL, c + (j * m + i) * PANEL, PANEL);
}

// c[m, n] = a[k, m]^T b[k, n]: the gradient of weights. a and b are in panels of `padded` rows, c is row after row.
void multiply_transposed(int64_t m, int64_t n, int64_t k, int64_t padded, const float* a, const float* b, float* c) {
  for (int64_t p = 0; p < m / PANEL; ++p)
    for (int64_t j = 0; j < n / PANEL; ++j)
      for (int64_t i = 0; i < PANEL; i += TILE)
        tile<1, PANEL>(a + p * padded * PANEL + i, 0, 1, k, b + j * padded * PANEL, c + (p * PANEL + i) * n + j * PANEL, n);
}

void copy_row(const float* row, int64_t r, int64_t columns, int64_t padded, float* panels) {
  for (int64_t p = 0; p < columns / PANEL; ++p) std::memcpy(panels + (p * padded + r) * PANEL, row + p * PANEL, sizeof(float) * PANEL);
}

void gather(const float* x_TD, const int64_t* token_r, const Chunk& chunk, int64_t D, float* panels) {
  for (int64_t r = 0; r < chunk.rows; ++r) copy_row(x_TD + token_r[r] * D, r, D, chunk.padded, panels);
}

// Adds rows to those of their tokens. A token's first row is stored instead: y need not be zero, nor be read for it.
void scatter_add(const float* panels, const int64_t* token_r, const Chunk& chunk, int64_t D, uint8_t* seen_T, float* y_TD) {
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const bool seen = seen_T[token_r[r]];
    seen_T[token_r[r]] = 1;
    for (int64_t p = 0; p < D / PANEL; ++p) {
      const float* __restrict from = panels + (p * chunk.padded + r) * PANEL;
      float* __restrict to = y_TD + token_r[r] * D + p * PANEL;
      if (seen)
        for (int j = 0; j < PANEL; ++j) to[j] += from[j];
      else
        std::memcpy(to, from, sizeof(float) * PANEL);
    }
  }
}

void clear_unseen(const uint8_t* seen_T, int64_t T, int64_t D, float* y_TD) {
  for (int64_t t = 0; t < T; ++t)
    if (!seen_T[t]) std::memset(y_TD + t * D, 0, sizeof(float) * D);
}

void copy_weights(const float* weights, int64_t rows, int64_t columns, float* panels) {
  for (int64_t r = 0; r < rows; ++r) copy_row(weights + r * columns, r, columns, rows, panels);
}

// Panels of the transpose: [rows / PANEL][columns][PANEL]. Squares of LANES x LANES are turned in registers: swap the two
// off-diagonal blocks of half the size, and so on inside each block.
void copy_weights_transposed(const float* weights, int64_t rows, int64_t columns, float* panels) {
  for (int64_t row = 0; row < rows; row += LANES)
    for (int64_t column = 0; column < columns; column += LANES) {
      Vector square[LANES];
      for (int i = 0; i < LANES; ++i) square[i] = *reinterpret_cast<const Vector*>(weights + (row + i) * columns + column);
#pragma GCC unroll 4
      for (int half = LANES / 2; half > 0; half /= 2) {
        Indices upper, lower;
        for (int lane = 0; lane < LANES; ++lane) {
          upper[lane] = lane & half ? LANES + lane - half : lane;
          lower[lane] = lane & half ? LANES + lane : lane + half;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) {
          if (i & half) continue;
          const Vector above = square[i], below = square[i + half];
          square[i] = __builtin_shuffle(above, below, upper);
          square[i + half] = __builtin_shuffle(above, below, lower);
        }
      }
      float* to = panels + (row / PANEL * columns + column) * PANEL + row % PANEL;
      for (int i = 0; i < LANES; ++i) *reinterpret_cast<Vector*>(to + i * PANEL) = square[i];
    }
}

void add(const float* __restrict from, int64_t count, float* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// act = weight * silu(gate) * up
void swiglu(const float* hidden_rF, const float* weights_S, const int64_t* slot_r, const Chunk& chunk, int64_t H, float* act_rH) {
  for (int64_t p = 0; p < H / PANEL; ++p)
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const float weight = weights_S[slot_r[r]];
      const int64_t at = (p * chunk.padded + r) * PANEL;
      const float* __restrict gate = hidden_rF + at;
      const float* __restrict up = gate + chunk.padded * H;
      float* __restrict act = act_rH + at;
      for (int j = 0; j < PANEL; ++j) act[j] = weight * up[j] * gate[j] / (1.0f + exponential(-gate[j]));
    }
}

// The same activation again, and from the gradient of silu(gate) * up the gradients of gate and up, and of the slots' weights.
void swiglu_backward(const float* hidden_rF, const float* weights_S, const int64_t* slot_r, const Chunk& chunk, int64_t H,
                     const float* grad_act_rH, float* act_rH, float* grad_hidden_rF, float* grad_weights_S) {
  for (int64_t p = 0; p < H / PANEL; ++p)
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const float weight = weights_S[slot_r[r]];
      const int64_t at = (p * chunk.padded + r) * PANEL;
      const float* __restrict gate = hidden_rF + at;
      const float* __restrict up = gate + chunk.padded * H;
      const float* __restrict grad_act = grad_act_rH + at;
      float* __restrict act = act_rH + at;
      float* __restrict grad_gate = grad_hidden_rF + at;
      float* __restrict grad_up = grad_gate + chunk.padded * H;
      float grad_weight = 0;
#pragma omp simd reduction(+ : grad_weight)
      for (int j = 0; j < PANEL; ++j) {
        const float sigmoid = 1.0f / (1.0f + exponential(-gate[j])), silu = gate[j] * sigmoid;
        const float grad = weight * grad_act[j];
        grad_weight += silu * up[j] * grad_act[j];
        act[j] = weight * silu * up[j];
        grad_up[j] = grad * silu;
        grad_gate[j] = grad * up[j] * (sigmoid + silu * (1.0f - sigmoid));
      }
      grad_weights_S[slot_r[r]] += grad_weight;
    }
}

// Calls compute(chunk, scratch) for every chunk on any thread, and after it add(chunk, scratch) in the order of the chunks.
// A chunk waits only for chunks that were taken before it, so that one of the threads can always go on.
template <typename Compute, typename Add>
void for_chunks(const Chunk* chunks, int64_t num_chunks, float* scratch, int64_t scratch_size, int64_t threads, Compute compute, Add add) {
  std::atomic<int64_t> next{0}, turn{0};
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    float* own = scratch + omp_get_thread_num() * scratch_size;
    for (int64_t c; (c = next.fetch_add(1)) < num_chunks;) {
      compute(chunks[c], own);
      while (turn.load(std::memory_order_acquire) != c) std::this_thread::yield();
      add(chunks[c], own);
      turn.store(c + 1, std::memory_order_release);
    }
  }
}

}  // namespace

extern "C" {

// Floats of scratch memory that a thread of `backward` uses, which is more than `forward` does.
int64_t scratch_size(int64_t D, int64_t H, int64_t rows) { return rows * (2 * D + 4 * H) + 5 * H * D; }

int64_t tile_rows() { return TILE; }

// Writes y, and `hidden` in the layout of the chunks for `backward`. seen_T says to which tokens earlier calls have added.
void forward(const float* x_TD, const float* weights_S, const int64_t* token_R, const int64_t* slot_R, const float* gate_up_NFD,
             const float* down_NHD, const Chunk* chunks, int64_t num_chunks, int64_t T, int64_t D, int64_t H, int64_t chunk_rows,
             float* hidden, float* y_TD, uint8_t* seen_T, float* scratch, int64_t threads) {
  auto compute = [=](const Chunk& chunk, float* own) {
    float *x_rD = own, *act_rH = x_rD + chunk_rows * D, *y_rD = act_rH + chunk_rows * H, *weights = y_rD + chunk_rows * D;
    float* hidden_rF = hidden + chunk.hidden_row * 2 * H;
    gather(x_TD, token_R + chunk.first, chunk, D, x_rD);
    copy_weights_transposed(gate_up_NFD + chunk.expert * 2 * H * D, 2 * H, D, weights);
    multiply(chunk.padded, 2 * H, D, x_rD, weights, hidden_rF);
    swiglu(hidden_rF, weights_S, slot_R + chunk.first, chunk, H, act_rH);
    copy_weights(down_NHD + chunk.expert * H * D, H, D, weights);
    multiply(chunk.padded, D, H, act_rH, weights, y_rD);
  };
  auto add_rows = [=](const Chunk& chunk, const float* own) {
    scatter_add(own + chunk_rows * (D + H), token_R + chunk.first, chunk, D, seen_T, y_TD);
  };
  for_chunks(chunks, num_chunks, scratch, scratch_size(D, H, chunk_rows), threads, compute, add_rows);
  clear_unseen(seen_T, T, D, y_TD);
}

// grad_weights must be zero, and the gradients of weights of experts without a chunk: those are not written.
void backward(const float* x_TD, const float* weights_S, const int64_t* token_R, const int64_t* slot_R, const float* gate_up_NFD,
              const float* down_NHD, const Chunk* chunks, int64_t num_chunks, int64_t T, int64_t D, int64_t H, int64_t chunk_rows,
              const float* hidden, const float* grad_TD, float* grad_x_TD, float* grad_weights_S, float* grad_gate_up_NFD,
              float* grad_down_NHD, float* scratch, int64_t threads) {
  const int64_t own_gate_up = chunk_rows * (2 * D + 4 * H), own_down = own_gate_up + 2 * H * D;
  auto compute = [=](const Chunk& chunk, float* own) {
    float *grad_rD = own, *x_rD = grad_rD + chunk_rows * D, *act_rH = x_rD + chunk_rows * D;
    float *grad_act_rH = act_rH + chunk_rows * H, *grad_hidden_rF = grad_act_rH + chunk_rows * H;
    const int64_t gate_up = chunk.expert * 2 * H * D, down = chunk.expert * H * D;
    float* grad_gate_up_FD = chunk.starts_expert ? grad_gate_up_NFD + gate_up : own + own_gate_up;
    float* grad_down_HD = chunk.starts_expert ? grad_down_NHD + down : own + own_down;
    float* weights = own + own_gate_up + 3 * H * D;
    gather(grad_TD, token_R + chunk.first, chunk, D, grad_rD);
    copy_weights_transposed(down_NHD + down, H, D, weights);
    multiply(chunk.padded, H, D, grad_rD, weights, grad_act_rH);
    swiglu_backward(hidden + chunk.hidden_row * 2 * H, weights_S, slot_R + chunk.first, chunk, H, grad_act_rH, act_rH,
                    grad_hidden_rF, grad_weights_S);
    multiply_transposed(H, D, chunk.rows, chunk.padded, act_rH, grad_rD, grad_down_HD);
    gather(x_TD, token_R + chunk.first, chunk, D, x_rD);
    multiply_transposed(2 * H, D, chunk.rows, chunk.padded, grad_hidden_rF, x_rD, grad_gate_up_FD);
    copy_weights(gate_up_NFD + gate_up, 2 * H, D, weights);
    multiply(chunk.padded, D, 2 * H, grad_hidden_rF, weights, grad_rD);  // grad_rD has been used, and now holds the gradient of x
  };
  std::vector<uint8_t> seen(T);
  uint8_t* seen_T = seen.data();
  auto add_rows = [=](const Chunk& chunk, const float* own) {
    scatter_add(own, token_R + chunk.first, chunk, D, seen_T, grad_x_TD);
    if (!chunk.starts_expert) {
      add(own + own_gate_up, 2 * H * D, grad_gate_up_NFD + chunk.expert * 2 * H * D);
      add(own + own_down, H * D, grad_down_NHD + chunk.expert * H * D);
    }
  };
  for_chunks(chunks, num_chunks, scratch, scratch_size(D, H, chunk_rows), threads, compute, add_rows);
  clear_unseen(seen_T, T, D, grad_x_TD);
}

}  // extern "C"
