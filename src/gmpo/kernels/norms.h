/* RMS norms. T is the weights' precision; the residual stream is fp32. */

/* stream += added (which may be NULL), then normed = T(stream * r) * weight with
   r = (mean(stream^2) + eps)^-1/2, rounded to T before the weight as the modules do.
   scales (may be NULL) keeps r of each row. */
void NAME(add_norm)(
    float *restrict stream, const T *restrict added, const T *restrict weight, T *restrict normed,
    float *restrict scales, int64_t rows, int64_t size, float eps
) {
#pragma omp parallel for if (rows * size > MIN_PARALLEL) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *x = stream + row * size;
        T *y = normed + row * size;
        float squares = 0.0f;
        if (added) {
            const T *a = added + row * size;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < size; i++) {
                float sum = x[i] + WIDE(a[i]);
                x[i] = sum;
                squares += sum * sum;
            }
        } else {
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < size; i++) squares += x[i] * x[i];
        }
        float scale = 1.0f / sqrtf(squares / (float)size + eps);
        if (scales) scales[row] = scale;
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            y[i] = NARROW(WIDE(NARROW(x[i] * scale)) * WIDE(weight[i]));
    }
}
