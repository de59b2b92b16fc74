/* A linear layer of few rows in fp32, a GEMM whose weight is packed into panels: for PANEL_OUTPUTS
   outputs at a time, the weights of one input after the other's, so that a step reads them end to
   end. Each result is one sum in the order of the inputs, whatever the number of rows or threads. */
#ifndef GMPO_LINEAR_H
#define GMPO_LINEAR_H

#include "products.h"

/* Two registers of outputs for as many rows as there are registers for their sums. */
#define PANEL_OUTPUTS (2 * LANES)
#if LANES == 16
#define MOST_ROWS 12
#else
#define MOST_ROWS 6
#endif
/* Inputs whose panel stays in the second cache while all rows pass. */
#define MOST_INPUTS 2048

/* The micro-kernel: results = start + inputs * panel, for n rows; start is one row for all where `start_row` is 0. */
ALWAYS_INLINE void some_rows(
    const float *inputs, int64_t input_row, const float *panel, const float *start, int64_t start_row,
    float *results, int64_t result_row, int64_t count, const int n
) {
    lanes sums[MOST_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < n; i++)
        for (int half = 0; half < 2; half++)
            sums[i][half] = *(const lanes *)(start + i * start_row + half * LANES);
    for (int64_t k = 0; k < count; k++) {
        lanes first = *(const lanes *)(panel + k * PANEL_OUTPUTS);
        lanes second = *(const lanes *)(panel + k * PANEL_OUTPUTS + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < n; i++) {
            float input = inputs[i * input_row + k];
            sums[i][0] += input * first;
            sums[i][1] += input * second;
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < n; i++)
        for (int half = 0; half < 2; half++)
            *(lanes *)(results + i * result_row + half * LANES) = sums[i][half];
}

#define ROWS_OF(n)                                                                                 \
    static void rows_##n(                                                                          \
        const float *inputs, int64_t input_row, const float *panel, const float *start,            \
        int64_t start_row, float *results, int64_t result_row, int64_t count                       \
    ) {                                                                                            \
        some_rows(inputs, input_row, panel, start, start_row, results, result_row, count, n);      \
    }
ROWS_OF(1)
ROWS_OF(2)
ROWS_OF(3)
ROWS_OF(4)
ROWS_OF(5)
ROWS_OF(6)
#if MOST_ROWS == 12
ROWS_OF(7)
ROWS_OF(8)
ROWS_OF(9)
ROWS_OF(10)
ROWS_OF(11)
ROWS_OF(12)
#endif

typedef void some_rows_of(
    const float *, int64_t, const float *, const float *, int64_t, float *, int64_t, int64_t
);
static some_rows_of *const rows_by_number[MOST_ROWS] = {
    rows_1, rows_2, rows_3, rows_4,  rows_5,  rows_6,
#if MOST_ROWS == 12
    rows_7, rows_8, rows_9, rows_10, rows_11, rows_12,
#endif
};

/* Outputs of a panel; 0 where a library's products may be faster than these: on one thread, and with
   fewer or narrower registers than AVX2's. */
void panel_outputs_float(int64_t *outputs) {
#if defined(_OPENMP) && defined(__AVX2__) && defined(__FMA__)
    *outputs = PANEL_OUTPUTS;
#else
    *outputs = 0;
#endif
}

/* weight [outputs, inputs] into panels; outputs that the last one lacks are 0. */
void panels_float(const float *restrict weight, float *restrict packed, int64_t outputs, int64_t inputs) {
#pragma omp parallel for if (outputs * inputs > MIN_PARALLEL) schedule(static)
    for (int64_t first = 0; first < outputs; first += PANEL_OUTPUTS)
        for (int64_t k = 0; k < inputs; k++)
            for (int64_t j = 0; j < PANEL_OUTPUTS; j++)
                packed[first * inputs + k * PANEL_OUTPUTS + j] =
                    first + j < outputs ? weight[(first + j) * inputs + k] : 0.0f;
}

/* One panel's results for all rows, written PANEL_OUTPUTS wide. */
static void one_panel(
    const float *inputs, const float *panel, const float *bias, float *results, int64_t result_row,
    int64_t rows, int64_t size
) {
    int64_t blocks = size > MOST_INPUTS ? (size + MOST_INPUTS - 1) / MOST_INPUTS : 1;
    int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t block = 0; block < blocks; block++) {
        int64_t first = size * block / blocks, count = size * (block + 1) / blocks - first;
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t row = rows * tile / tiles, n = rows * (tile + 1) / tiles - row;
            float *out = results + row * result_row;
            rows_by_number[n - 1](
                inputs + row * size + first, size, panel + first * PANEL_OUTPUTS,
                block ? out : bias, block ? result_row : 0, out, result_row, count
            );
        }
    }
}

/* results [rows, outputs] = inputs [rows, size] weight^T + bias. The bias is as wide as the panels are
   together; `room` [rows, PANEL_OUTPUTS] takes a last one that is wider than what is left of a row. */
void linear_float(
    const float *inputs, const float *packed, const float *bias, float *results, float *room,
    int64_t rows, int64_t size, int64_t outputs
) {
#pragma omp parallel for if (rows * size * outputs > MIN_PARALLEL) schedule(static)
    for (int64_t first = 0; first < outputs; first += PANEL_OUTPUTS) {
        const float *panel = packed + first * size;
        int64_t left = outputs - first;
        if (left >= PANEL_OUTPUTS) {
            one_panel(inputs, panel, bias + first, results + first, outputs, rows, size);
            continue;
        }
        one_panel(inputs, panel, bias + first, room, PANEL_OUTPUTS, rows, size);
        for (int64_t row = 0; row < rows; row++)
            memcpy(results + row * outputs + first, room + row * PANEL_OUTPUTS, 4 * left);
    }
}

#endif
