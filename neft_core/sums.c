/* Sums over pairs of neurons; neft_core/sums.py has the order of additions and compiles this.

   base and tuned are float32 or bfloat16, as in the function's name. n neurons of d weights; step:
   bytes from one row of storage to the next; out: w.w, (v-w).w, (v-w).(v-w), n of each; room: for
   3 * LANES * WIDTH numbers. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define STRIP 128  /* weights of a row converted at once: they stay in registers and L1 */
#define WIDTH 2048 /* columns at once: whole pages of each row, and sums of one lane that fill L1 */

typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef uint16_t bf16;

static inline double from_float(float stored) { return stored; }

static inline double from_bf16(bf16 stored) {
  uint32_t bits = (uint32_t)stored << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static double halved(double *sum) {
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) sum[l] += sum[l + half];
  return sum[0];
}

/* Neurons that are rows of storage, and neurons that are columns. */
#define DEFINE(BASE, TUNED)                                                                        \
  void rows_##BASE##_##TUNED(const char *base, const char *tuned, size_t n, size_t d,              \
                             size_t base_step, size_t tuned_step, double *out) {                   \
    for (size_t r = 0; r < n; r++, base += base_step, tuned += tuned_step) {                       \
      const BASE *restrict w = (const BASE *)base;                                                 \
      const TUNED *restrict v = (const TUNED *)tuned;                                              \
      lanes sum[3] = {{0}};                                                                        \
      size_t i = 0;                                                                                \
      for (; i + STRIP <= d; i += STRIP) {                                                         \
        double x[STRIP] __attribute__((aligned(8 * LANES)));                                       \
        double y[STRIP] __attribute__((aligned(8 * LANES)));                                       \
        for (int k = 0; k < STRIP; k++) {                                                          \
          x[k] = from_##BASE(w[i + k]);                                                            \
          y[k] = from_##TUNED(v[i + k]) - x[k];                                                    \
        }                                                                                          \
        for (int k = 0; k < STRIP; k += LANES) {                                                   \
          lanes a, b;                                                                              \
          memcpy(&a, x + k, sizeof a);                                                             \
          memcpy(&b, y + k, sizeof b);                                                             \
          sum[0] += a * a;                                                                         \
          sum[1] += b * a;                                                                         \
          sum[2] += b * b;                                                                         \
        }                                                                                          \
      }                                                                                            \
      double apart[3][LANES];                                                                      \
      memcpy(apart, sum, sizeof apart);                                                            \
      for (; i < d; i++) {                                                                         \
        double a = from_##BASE(w[i]), b = from_##TUNED(v[i]) - a;                                  \
        apart[0][i % LANES] += a * a;                                                              \
        apart[1][i % LANES] += b * a;                                                              \
        apart[2][i % LANES] += b * b;                                                              \
      }                                                                                            \
      for (int k = 0; k < 3; k++) out[k * n + r] = halved(apart[k]);                               \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  static inline void add_##BASE##_##TUNED(const char *base, const char *tuned, size_t base_step,   \
                                          size_t tuned_step, size_t rows, size_t width,            \
                                          double *restrict ww, double *restrict dw,                \
                                          double *restrict dd) {                                   \
    for (size_t c = 0; c < width; c++) {                                                           \
      double x = ww[c], y = dw[c], z = dd[c];                                                      \
      for (size_t r = 0; r < rows; r++) {                                                          \
        double a = from_##BASE(((const BASE *)(base + r * base_step))[c]);                         \
        double b = from_##TUNED(((const TUNED *)(tuned + r * tuned_step))[c]) - a;                 \
        x += a * a;                                                                                \
        y += b * a;                                                                                \
        z += b * b;                                                                                \
      }                                                                                            \
      ww[c] = x;                                                                                   \
      dw[c] = y;                                                                                   \
      dd[c] = z;                                                                                   \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  void columns_##BASE##_##TUNED(const char *base, const char *tuned, size_t n, size_t d,           \
                                size_t base_step, size_t tuned_step, double *out, double *room) {  \
    double(*sum)[3][WIDTH] = (double(*)[3][WIDTH])room;                                            \
    size_t base_far = LANES * base_step, tuned_far = LANES * tuned_step;                           \
    for (size_t first = 0; first < n; first += WIDTH) {                                            \
      size_t width = n - first < WIDTH ? n - first : WIDTH;                                        \
      memset(sum, 0, LANES * sizeof *sum);                                                         \
      for (size_t l = 0; l < LANES && l < d; l++) {                                                \
        double *ww = sum[l][0], *dw = sum[l][1], *dd = sum[l][2];                                  \
        const char *w = base + l * base_step + first * sizeof(BASE);                               \
        const char *v = tuned + l * tuned_step + first * sizeof(TUNED);                            \
        size_t left = (d - l + LANES - 1) / LANES;                                                 \
        /* The lane's sums are fetched and put back once for four rows. */                         \
        for (; left >= 4; left -= 4, w += 4 * base_far, v += 4 * tuned_far)                        \
          add_##BASE##_##TUNED(w, v, base_far, tuned_far, 4, width, ww, dw, dd);                   \
        add_##BASE##_##TUNED(w, v, base_far, tuned_far, left, width, ww, dw, dd);                  \
      }                                                                                            \
      for (size_t half = LANES / 2; half; half /= 2)                                               \
        for (size_t l = 0; l < half; l++)                                                          \
          for (size_t k = 0; k < 3; k++)                                                           \
            for (size_t c = 0; c < width; c++) sum[l][k][c] += sum[l + half][k][c];                \
      for (size_t k = 0; k < 3; k++)                                                               \
        memcpy(out + k * n + first, sum[0][k], width * sizeof(double));                            \
    }                                                                                              \
  }                                                                                                \

DEFINE(float, float)
DEFINE(float, bf16)
DEFINE(bf16, float)
DEFINE(bf16, bf16)
