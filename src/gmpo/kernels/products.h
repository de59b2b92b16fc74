/* Products of small fp32 matrices, and the rows of a softmax; what attention is made of.

   A product's result is made in tiles of TILE_ROWS x TILE_COLUMNS that stay in registers, so results
   are padded to whole tiles; the inner dimension is never padded. */
#ifndef GMPO_PRODUCTS_H
#define GMPO_PRODUCTS_H

#include "common.h"

/* Columns that lie together in a panel; a padded number of columns is a multiple of it. */
#define PANEL 32

#ifdef __AVX512F__
#define LANES 16
#define TILE_ROWS 8
#else
#define LANES 8
#define TILE_ROWS 4
#endif
#define TILE_COLUMNS (2 * LANES)

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Element (i, k) is first[i * row + k * column]. */
typedef struct {
    const float *first;
    int64_t row, column;
} Left;

/* Element (k, j) is first[(j / PANEL) * panel + k * row + j % PANEL]. */
typedef struct {
    const float *first;
    int64_t panel, row;
} Right;

static inline int64_t padded_to(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

static inline void tile(
    Left a, const float *restrict b, int64_t b_row, float *restrict c, int64_t c_row, int64_t inner, int adds
) {
    lanes sums[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++) sums[i][0] = sums[i][1] = (lanes){0};
    for (int64_t k = 0; k < inner; k++) {
        lanes first = *(const lanes *)(b + k * b_row), second = *(const lanes *)(b + k * b_row + LANES);
        const float *x = a.first + k * a.column;
#pragma GCC unroll 8
        for (int i = 0; i < TILE_ROWS; i++) {
            float factor = x[i * a.row];
            sums[i][0] += factor * first;
            sums[i][1] += factor * second;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i++) {
        lanes *out = (lanes *)(c + i * c_row);
        if (adds) sums[i][0] += out[0], sums[i][1] += out[1];
        out[0] = sums[i][0], out[1] = sums[i][1];
    }
}

/* c = a b, or c += a b. c has rows padded to TILE_ROWS and columns padded to PANEL. */
static void product(
    Left a, Right b, float *c, int64_t c_row, int64_t rows, int64_t columns, int64_t inner, int adds
) {
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
        const float *panel = b.first + j / PANEL * b.panel + j % PANEL;
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
            Left of = {a.first + i * a.row, a.row, a.column};
            tile(of, panel, b.row, c + i * c_row + j, c_row, inner, adds);
        }
    }
}

/* Scores of one query become exp(score - new maximum), 0 from `allowed` on; `mass` is their sum with
   what was there, and what was summed before is to be multiplied by the value returned. */
static inline float softmax_step(float *restrict scores, int64_t allowed, int64_t columns, float *maximum, float *mass) {
    for (int64_t j = allowed; j < columns; j++) scores[j] = -INFINITY;
    float largest = *maximum, sum = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < columns; j++) largest = scores[j] > largest ? scores[j] : largest;
    float shrunk = fast_exp(*maximum - largest);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < columns; j++) {
        float p = fast_exp(scores[j] - largest);
        scores[j] = p;
        sum += p;
    }
    *maximum = largest;
    *mass = *mass * shrunk + sum;
    return shrunk;
}

/* Scores become probabilities p, and slopes (dL/dp) become p (slope - mean): dL/dscore. */
static inline void softmax_slopes(
    float *restrict scores, float *restrict slopes, int64_t allowed, int64_t columns, float log_sum, float mean
) {
    for (int64_t j = allowed; j < columns; j++) scores[j] = -INFINITY;
#pragma omp simd
    for (int64_t j = 0; j < columns; j++) {
        float p = fast_exp(scores[j] - log_sum);
        scores[j] = p;
        slopes[j] = p * (slopes[j] - mean);
    }
}

#endif
