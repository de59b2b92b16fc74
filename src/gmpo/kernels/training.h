/* Passes over tokens with gradient. T is the weights' precision; the residual stream is fp32.

   Notation: x a row of the stream, w a norm's weight, r = (mean(x^2) + eps)^-1/2, g a gradient. */
#ifndef BLOCK_ROWS
/* Rows whose share of a weight's gradient is summed apart, then block by block in order: so the sum
   does not depend on how the blocks are spread over threads. */
#define BLOCK_ROWS 32
#endif

/* sums = stream + added (without added: sums is not touched, and the stream is normed),
   normed = T(sums * r) * w, rounded to T before the weight as the modules do; scales keeps r. */
void NAME(sum_norm)(
    const float *restrict stream, const T *restrict added, const T *restrict weight,
    float *restrict sums, T *restrict normed, float *restrict scales, int64_t rows, int64_t size,
    float eps
) {
#pragma omp parallel for if (rows * size > MIN_PARALLEL) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float *x = stream + row * size;
        T *y = normed + row * size;
        if (added) {
            const T *a = added + row * size;
            float *s = sums + row * size;
#pragma omp simd
            for (int64_t i = 0; i < size; i++) s[i] = x[i] + WIDE(a[i]);
            x = s;
        }
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
        float scale = 1.0f / sqrtf(squares / (float)size + eps);
        scales[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            y[i] = NARROW(WIDE(NARROW(x[i] * scale)) * WIDE(weight[i]));
    }
}

/* normed as sum_norm made it, from the kept r. */
void NAME(norm_again)(
    const float *restrict stream, const T *restrict weight, const float *restrict scales,
    T *restrict normed, int64_t rows, int64_t size
) {
#pragma omp parallel for if (rows * size > MIN_PARALLEL) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float *x = stream + row * size;
        T *y = normed + row * size;
        float scale = scales[row];
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            y[i] = NARROW(WIDE(NARROW(x[i] * scale)) * WIDE(weight[i]));
    }
}

/* dx_i = r g_i w_i - x_i r^3 mean_j(g_j w_j x_j) + residual_i;  dw_i = sum over rows of g_i x_i r.
   residual (the gradient that passes by the norm) and narrow (dx in T) may be NULL. parts has room
   for size numbers of each block of rows. */
void NAME(norm_backward)(
    const T *restrict gradient, const float *restrict stream, const T *restrict weight,
    const float *restrict scales, const float *restrict residual, float *restrict by_stream,
    T *restrict narrow, float *restrict parts, T *restrict by_weight, int64_t rows, int64_t size
) {
    int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel for if (rows * size > MIN_PARALLEL) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        float *part = parts + block * size;
        memset(part, 0, size * sizeof(float));
        int64_t stop = (block + 1) * BLOCK_ROWS < rows ? (block + 1) * BLOCK_ROWS : rows;
        for (int64_t row = block * BLOCK_ROWS; row < stop; row++) {
            const T *g = gradient + row * size;
            const float *x = stream + row * size;
            float *d = by_stream + row * size;
            float scale = scales[row], product = 0.0f;
#pragma omp simd reduction(+ : product)
            for (int64_t i = 0; i < size; i++) {
                float slope = WIDE(g[i]) * x[i];
                product += slope * WIDE(weight[i]);
                part[i] += slope * scale;
            }
            float along = product / (float)size * scale * scale * scale;
            if (residual) {
                const float *passed = residual + row * size;
#pragma omp simd
                for (int64_t i = 0; i < size; i++)
                    d[i] = WIDE(g[i]) * WIDE(weight[i]) * scale - x[i] * along + passed[i];
            } else {
#pragma omp simd
                for (int64_t i = 0; i < size; i++)
                    d[i] = WIDE(g[i]) * WIDE(weight[i]) * scale - x[i] * along;
            }
            if (narrow) {
                T *copy = narrow + row * size;
#pragma omp simd
                for (int64_t i = 0; i < size; i++) copy[i] = NARROW(d[i]);
            }
        }
    }
    for (int64_t block = 1; block < blocks; block++)
#pragma omp simd
        for (int64_t i = 0; i < size; i++) parts[i] += parts[block * size + i];
    for (int64_t i = 0; i < size; i++) by_weight[i] = NARROW(rows ? parts[i] : 0.0f);
}

/* sums = stream + added. */
void NAME(stream_sum)(
    const float *restrict stream, const T *restrict added, float *restrict sums, int64_t count
) {
#pragma omp parallel for simd if (count > MIN_PARALLEL) schedule(static)
    for (int64_t i = 0; i < count; i++) sums[i] = stream[i] + WIDE(added[i]);
}

/* T(x s) up, with s = sigmoid(x). */
static inline T NAME(joined_of)(float x, float s, float up) {
    return NARROW(WIDE(NARROW(x * s)) * up);
}

/* joined = T(silu(gate)) * up. */
void NAME(gated)(
    const T *restrict gate, const T *restrict up, T *restrict joined, int64_t count
) {
#pragma omp parallel for simd if (count > MIN_PARALLEL) schedule(static)
    for (int64_t i = 0; i < count; i++)
        joined[i] = NAME(joined_of)(WIDE(gate[i]), sigmoid(WIDE(gate[i])), WIDE(up[i]));
}

/* by_up = g silu(gate), by_gate = g up silu'(gate) with silu'(x) = s (1 + x (1 - s)), s = sigmoid(x);
   joined as `gated` made it. */
void NAME(gated_backward)(
    const T *restrict gradient, const T *restrict gate, const T *restrict up, T *restrict by_gate,
    T *restrict by_up, T *restrict joined, int64_t count
) {
#pragma omp parallel for simd if (count > MIN_PARALLEL) schedule(static)
    for (int64_t i = 0; i < count; i++) {
        float g = WIDE(gradient[i]), x = WIDE(gate[i]), u = WIDE(up[i]);
        float s = sigmoid(x);
        joined[i] = NAME(joined_of)(x, s, u);
        by_up[i] = NARROW(g * x * s);
        by_gate[i] = NARROW(g * u * s * (1.0f + x * (1.0f - s)));
    }
}

/* Adds a tile of logits, `inverse` times as large (1 / temperature), to the sums of each row:
   largest logit, sum of exponents below it, the same weighted by the logits (may be NULL), and the
   logit of the row's token where it lies in the tile (tokens count from the tile's first). */
void NAME(tile_sums)(
    const T *restrict logits, const int64_t *restrict tokens, float *restrict chosen,
    float *restrict largest, float *restrict total, float *restrict weighted, int64_t rows,
    int64_t width, float inverse
) {
#pragma omp parallel for if (rows * width > MIN_PARALLEL) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const T *x = logits + row * width;
        float most = largest[row], sum = 0.0f, mean = 0.0f;
        int64_t token = tokens[row];
        if (token >= 0 && token < width) chosen[row] = WIDE(x[token]) * inverse;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < width; i++) {
            float logit = WIDE(x[i]) * inverse;
            most = logit > most ? logit : most;
        }
        if (weighted) {
#pragma omp simd reduction(+ : sum, mean)
            for (int64_t i = 0; i < width; i++) {
                float logit = WIDE(x[i]) * inverse, part = fast_exp(logit - most);
                sum += part;
                mean += part * logit;
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; i++) sum += fast_exp(WIDE(x[i]) * inverse - most);
        }
        float shrunk = fast_exp(largest[row] - most);
        total[row] = total[row] * shrunk + sum;
        if (weighted) weighted[row] = weighted[row] * shrunk + mean;
        largest[row] = most;
    }
}

static inline float NAME(slope_of)(float log_p, float by_logprob, float by_entropy, float entropy) {
    return -fast_exp(log_p) * (by_logprob + by_entropy * (log_p + entropy));
}

/* The gradient of a tile's logits, in their place: by_logprob (onehot(token) - p)
   - by_entropy p (log p + entropy); by_entropy and entropy may be NULL together. */
void NAME(tile_slopes)(
    T *restrict logits, const int64_t *restrict tokens, const float *restrict log_total,
    const float *restrict by_logprob, const float *restrict entropy,
    const float *restrict by_entropy, int64_t rows, int64_t width, float inverse
) {
#pragma omp parallel for if (rows * width > MIN_PARALLEL) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        T *x = logits + row * width;
        float base = log_total[row], slope = by_logprob[row];
        float second = by_entropy ? by_entropy[row] : 0.0f, level = entropy ? entropy[row] : 0.0f;
        int64_t token = tokens[row];
        int is_here = token >= 0 && token < width;
        float own = is_here ? WIDE(x[token]) * inverse - base : 0.0f;
        if (by_entropy) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                x[i] = NARROW(NAME(slope_of)(WIDE(x[i]) * inverse - base, slope, second, level));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++)
                x[i] = NARROW(-fast_exp(WIDE(x[i]) * inverse - base) * slope);
        }
        if (!is_here) continue;
        float rest = by_entropy ? NAME(slope_of)(own, slope, second, level) : -fast_exp(own) * slope;
        x[token] = NARROW(slope + rest);
    }
}
