/* One decoding step's attention, and the sums from which tokens are drawn. T is the model's precision;
   keys, values and all sums are fp32. Each row and key head is worked out by one thread in one order,
   so that it depends neither on other rows nor on the number of threads. */
#ifndef GMPO_DECODING_H
#define GMPO_DECODING_H

#include "products.h"

/* The largest head, and the query heads of a key head that are worked out together. */
#define MAX_DIM 256
#define MAX_QUERIES 4

typedef float four_lanes __attribute__((vector_size(16), aligned(4), may_alias));

/* Positions whose scores, and registers of features whose sums, are made at a time for n queries:
   as many sums as there are registers for, beside what they are made of. */
#define AT_ONCE(n) (LANES == 8 && (n) > 3 ? 2 : 4)

/* What all layers of a step have in common; `decoding.py` has the same fields.
   A part of the cache is [keys or values, row or slot, key head, position, dim]. */
typedef struct {
    const int64_t *slots, *prompt_lengths, *own_lengths; /* of each row, the new token left out */
    const float *cos, *sin;                              /* [rows, dim]; sin's first half negated */
    float *scores;                                       /* room: [rows, heads, positions] */
    int64_t rows, heads, key_heads, dim, positions;
    int64_t prompt_slots, prompt_capacity, own_rows, own_capacity;
} attention_step;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PICK(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#endif
#endif
#ifndef PICK
typedef int four_places __attribute__((vector_size(16)));
#define PICK(x, y, ...) __builtin_shuffle(x, y, (four_places){__VA_ARGS__})
#endif

ALWAYS_INLINE four_lanes fours_of(const lanes *x) {
    const four_lanes *parts = (const four_lanes *)x;
    four_lanes sum = parts[0] + parts[1];
#if LANES == 16
    sum += parts[2] + parts[3];
#endif
    return sum;
}

/* Each register's sum over its lanes. */
ALWAYS_INLINE four_lanes sums_of(const lanes *a, const lanes *b, const lanes *c, const lanes *d) {
    four_lanes w = fours_of(a), x = fours_of(b), y = fours_of(c), z = fours_of(d);
    four_lanes first = PICK(w, x, 0, 4, 1, 5) + PICK(w, x, 2, 6, 3, 7);
    four_lanes second = PICK(y, z, 0, 4, 1, 5) + PICK(y, z, 2, 6, 3, 7);
    return PICK(first, second, 0, 1, 4, 5) + PICK(first, second, 2, 3, 6, 7);
}

/* scores[query][position] = scale * query . key, for `count` positions, at most AT_ONCE(n). */
ALWAYS_INLINE void score_some(
    const float *keys, const int count, int64_t dim, const float (*queries)[MAX_DIM], const int n,
    float scale, float *scores, int64_t stride
) {
    int64_t whole = dim / LANES * LANES;
    lanes sums[MAX_QUERIES][4];
    for (int q = 0; q < n; q++)
        for (int p = 0; p < 4; p++) sums[q][p] = (lanes){0};
    for (int64_t i = 0; i < whole; i += LANES)
        for (int p = 0; p < count; p++) {
            lanes part = *(const lanes *)(keys + p * dim + i);
            for (int q = 0; q < n; q++) sums[q][p] += part * *(const lanes *)(queries[q] + i);
        }
    for (int q = 0; q < n; q++) {
        four_lanes totals = sums_of(&sums[q][0], &sums[q][1], &sums[q][2], &sums[q][3]);
        for (int p = 0; p < count; p++) {
            float sum = totals[p];
            for (int64_t i = whole; i < dim; i++) sum += keys[p * dim + i] * queries[q][i];
            scores[q * stride + p] = sum * scale;
        }
    }
}

ALWAYS_INLINE void score_keys(
    const float *keys, int64_t count, int64_t dim, const float (*queries)[MAX_DIM], const int n,
    float scale, float *scores, int64_t stride
) {
    int64_t p = 0;
    for (; p + AT_ONCE(n) <= count; p += AT_ONCE(n))
        score_some(keys + p * dim, AT_ONCE(n), dim, queries, n, scale, scores + p, stride);
    for (; p < count; p++) score_some(keys + p * dim, 1, dim, queries, n, scale, scores + p, stride);
}

/* attended[query] += sum over positions of weight * value, for `blocks` times LANES features. */
ALWAYS_INLINE void weigh_features(
    const float *values, int64_t count, int64_t dim, const float *weights, int64_t stride,
    const int n, const int blocks, float (*attended)[MAX_DIM]
) {
    lanes sums[MAX_QUERIES][4];
    for (int q = 0; q < n; q++)
        for (int b = 0; b < blocks; b++) sums[q][b] = *(const lanes *)(attended[q] + b * LANES);
    for (int64_t p = 0; p < count; p++)
        for (int b = 0; b < blocks; b++) {
            lanes value = *(const lanes *)(values + p * dim + b * LANES);
            for (int q = 0; q < n; q++) sums[q][b] += weights[q * stride + p] * value;
        }
    for (int q = 0; q < n; q++)
        for (int b = 0; b < blocks; b++) *(lanes *)(attended[q] + b * LANES) = sums[q][b];
}

ALWAYS_INLINE void weigh_values(
    const float *values, int64_t count, int64_t dim, const float *weights, int64_t stride,
    const int n, float (*attended)[MAX_DIM]
) {
    int64_t i = 0;
    for (; i + AT_ONCE(n) * LANES <= dim; i += AT_ONCE(n) * LANES)
        weigh_features(
            values + i, count, dim, weights, stride, n, AT_ONCE(n),
            (float(*)[MAX_DIM])(attended[0] + i)
        );
    for (; i + LANES <= dim; i += LANES)
        weigh_features(
            values + i, count, dim, weights, stride, n, 1, (float(*)[MAX_DIM])(attended[0] + i)
        );
    for (; i < dim; i++)
        for (int q = 0; q < n; q++)
            for (int64_t p = 0; p < count; p++)
                attended[q][i] += weights[q * stride + p] * values[p * dim + i];
}

/* exp(score - largest) in the scores' place; their sum. A NaN among them makes the sum NaN. */
ALWAYS_INLINE float exponents(float *scores, int64_t count) {
    float largest = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : largest)
    for (int64_t p = 0; p < count; p++) largest = scores[p] > largest ? scores[p] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t p = 0; p < count; p++) {
        scores[p] = fast_exp(scores[p] - largest);
        sum += scores[p];
    }
    return sum;
}

/* Where the parts that a row sees begin, for one key head. */
typedef struct {
    const float *prompt_keys, *prompt_values, *own_keys, *own_values;
    int64_t prompt_length, own_length, dim;
} seen_positions;

/* attended[query] = sum over the prompt's and the row's own positions of softmax(score) * value. */
ALWAYS_INLINE void attend_queries(
    const seen_positions *seen, const float (*queries)[MAX_DIM], const int n, const int64_t dim,
    float *scores, int64_t stride, float (*attended)[MAX_DIM]
) {
    int64_t first = seen->prompt_length, own = seen->own_length;
    float scale = 1.0f / sqrtf((float)dim), sums[MAX_QUERIES];
    score_keys(seen->prompt_keys, first, dim, queries, n, scale, scores, stride);
    score_keys(seen->own_keys, own, dim, queries, n, scale, scores + first, stride);
    for (int q = 0; q < n; q++) sums[q] = exponents(scores + q * stride, first + own);
    memset(attended, 0, n * sizeof(*attended));
    weigh_values(seen->prompt_values, first, dim, scores, stride, n, attended);
    weigh_values(seen->own_values, own, dim, scores + first, stride, n, attended);
    for (int q = 0; q < n; q++)
        for (int64_t i = 0; i < dim; i++) attended[q][i] /= sums[q];
}

/* Each usual size has code of its own, whose queries and sums stay in registers. */
#define BY_SIZE(n)                                                                                 \
    static void attend_##n(                                                                        \
        const seen_positions *seen, const float (*queries)[MAX_DIM], float *scores,                \
        int64_t stride, float (*attended)[MAX_DIM]                                                 \
    ) {                                                                                            \
        if (seen->dim == 64)                                                                       \
            attend_queries(seen, queries, n, 64, scores, stride, attended);                        \
        else if (seen->dim == 128)                                                                 \
            attend_queries(seen, queries, n, 128, scores, stride, attended);                       \
        else                                                                                       \
            attend_queries(seen, queries, n, seen->dim, scores, stride, attended);                 \
    }
BY_SIZE(1)
BY_SIZE(2)
BY_SIZE(3)
BY_SIZE(4)

typedef void attend_some(
    const seen_positions *, const float (*)[MAX_DIM], float *, int64_t, float (*)[MAX_DIM]
);
static attend_some *const attend_by_number[MAX_QUERIES] = {attend_1, attend_2, attend_3, attend_4};

#endif

/* head turned to its position. */
static inline void NAME(turn)(
    const T *restrict head, const float *restrict cos, const float *restrict sin,
    float *restrict turned, int64_t dim
) {
    int64_t half = dim / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float first = WIDE(head[i]), second = WIDE(head[i + half]);
        turned[i] = first * cos[i] + second * sin[i];
        turned[i + half] = second * cos[i + half] + first * sin[i + half];
    }
}

/* projected is [rows, heads + 2 key_heads, dim]: queries, keys, values of the new tokens. Writes the
   keys and values into the rows' own part, and attended [rows, heads, dim]. */
void NAME(attend_step)(
    const attention_step *step, const T *restrict projected, const float *prompts, float *own,
    T *restrict attended
) {
    int64_t dim = step->dim, key_heads = step->key_heads, per_key = step->heads / key_heads;
    int64_t prompt_head = step->prompt_capacity * dim, own_head = step->own_capacity * dim;
    int64_t prompt_values = step->prompt_slots * key_heads * prompt_head;
    int64_t own_values = step->own_rows * key_heads * own_head;
    int64_t pairs = step->rows * key_heads;
    /* Key head by key head, since the rows of a prompt, which stand side by side, read the same. */
#pragma omp parallel for if (pairs * per_key * step->positions * dim > MIN_PARALLEL) schedule(static)
    for (int64_t pair = 0; pair < pairs; pair++) {
        int64_t key_head = pair / step->rows, row = pair % step->rows;
        const T *heads = projected + row * (step->heads + 2 * key_heads) * dim;
        const float *cos = step->cos + row * dim, *sin = step->sin + row * dim;
        int64_t length = step->own_lengths[row];
        const float *prompt = prompts + (step->slots[row] * key_heads + key_head) * prompt_head;
        float *mine = own + (row * key_heads + key_head) * own_head;
        const T *value = heads + (step->heads + key_heads + key_head) * dim;
        NAME(turn)(heads + (step->heads + key_head) * dim, cos, sin, mine + length * dim, dim);
#pragma omp simd
        for (int64_t i = 0; i < dim; i++) mine[own_values + length * dim + i] = WIDE(value[i]);
        seen_positions seen = {
            prompt, prompt + prompt_values, mine, mine + own_values, step->prompt_lengths[row],
            length + 1, dim,
        };
        float queries[MAX_QUERIES][MAX_DIM], results[MAX_QUERIES][MAX_DIM];
        for (int64_t first = 0; first < per_key; first += MAX_QUERIES) {
            int64_t head = key_head * per_key + first;
            int n = per_key - first < MAX_QUERIES ? (int)(per_key - first) : MAX_QUERIES;
            for (int q = 0; q < n; q++)
                NAME(turn)(heads + (head + q) * dim, cos, sin, queries[q], dim);
            float *scores = step->scores + (row * step->heads + head) * step->positions;
            attend_by_number[n - 1](
                &seen, (const float(*)[MAX_DIM])queries, scores, step->positions, results
            );
            for (int q = 0; q < n; q++) {
                T *out = attended + (row * step->heads + head + q) * dim;
#pragma omp simd
                for (int64_t i = 0; i < dim; i++) out[i] = NARROW(results[q][i]);
            }
        }
    }
}
