/* Sums over pairs of neurons; neft_core/sums.py has the order of additions and compiles this.

   base and tuned are float32 or bfloat16, as in the function's name. n neurons of d weights; step:
   bytes from one row of storage to the next; out: w.w, (v-w).w, (v-w).(v-w), n of each. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define STRIP 128  /* weights of a row converted at once: they stay in registers and L1 */
#define WIDTH 64   /* columns at once: their lanes fill half of L1 */
#define BLOCK 256  /* columns whose lanes stay in L2: more of each page, to save the TLB */
#define TILE 32    /* rows gone through for one WIDTH after the other, while the next are fetched */

typedef double lanes __attribute__((vector_size(8 * LANES)));
typedef uint16_t bf16;

static inline double from_float(float stored) { return stored; }

static inline double from_bf16(bf16 stored) {
  uint32_t bits = (uint32_t)stored << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline void ask_for(const char *start, size_t bytes) {
  for (size_t k = 0; k < bytes; k += 64) __builtin_prefetch(start + k);
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
  static inline void add_##BASE##_##TUNED(const BASE *restrict w, const TUNED *restrict v,         \
                                          double *restrict ww, double *restrict dw,                \
                                          double *restrict dd, size_t width) {                     \
    for (size_t c = 0; c < width; c++) {                                                           \
      double a = from_##BASE(w[c]), b = from_##TUNED(v[c]) - a;                                    \
      ww[c] += a * a;                                                                              \
      dw[c] += b * a;                                                                              \
      dd[c] += b * b;                                                                              \
    }                                                                                              \
  }                                                                                                \
                                                                                                   \
  void columns_##BASE##_##TUNED(const char *base, const char *tuned, size_t n, size_t d,           \
                                size_t base_step, size_t tuned_step, double *out) {                \
    static const size_t behind = TILE / (BLOCK / WIDTH);                                           \
    double sum[BLOCK / WIDTH][3][LANES][WIDTH] __attribute__((aligned(64)));                       \
    for (size_t first = 0; first < n; first += BLOCK) {                                            \
      size_t last = n - first < BLOCK ? n : first + BLOCK;                                         \
      memset(sum, 0, sizeof sum);                                                                  \
      for (size_t top = 0; top < d; top += TILE) {                                                 \
        size_t bottom = d - top < TILE ? d : top + TILE, next = bottom;                            \
        for (size_t c = first; c < last; c += WIDTH) {                                             \
          double(*mine)[LANES][WIDTH] = sum[(c - first) / WIDTH];                                  \
          for (size_t k = 0; k < behind && next < d; k++, next++) {                                \
            ask_for(base + next * base_step + first * sizeof(BASE), (last - first) * sizeof(BASE));\
            ask_for(tuned + next * tuned_step + first * sizeof(TUNED), (last - first) * sizeof(TUNED));\
          }                                                                                        \
          for (size_t i = top; i < bottom; i++) {                                                  \
            const BASE *w = (const BASE *)(base + i * base_step) + c;                              \
            const TUNED *v = (const TUNED *)(tuned + i * tuned_step) + c;                          \
            size_t l = i % LANES;                                                                  \
            if (last - c >= WIDTH)                                                                 \
              add_##BASE##_##TUNED(w, v, mine[0][l], mine[1][l], mine[2][l], WIDTH);               \
            else                                                                                   \
              add_##BASE##_##TUNED(w, v, mine[0][l], mine[1][l], mine[2][l], last - c);            \
          }                                                                                        \
        }                                                                                          \
      }                                                                                            \
      for (size_t c = first; c < last; c++)                                                        \
        for (size_t k = 0; k < 3; k++) {                                                           \
          double apart[LANES];                                                                     \
          for (int l = 0; l < LANES; l++)                                                          \
            apart[l] = sum[(c - first) / WIDTH][k][l][(c - first) % WIDTH];                        \
          out[k * n + c] = halved(apart);                                                          \
        }                                                                                          \
    }                                                                                              \
  }

DEFINE(float, float)
DEFINE(float, bf16)
DEFINE(bf16, float)
DEFINE(bf16, bf16)
