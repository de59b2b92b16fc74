/* AdamW over fp32 weights from gradients in T, in one pass over everything that it reads and moves. */
#ifndef OPTIMIZER_BLOCK
/* Numbers whose squares are summed apart, then block by block in order. */
#define OPTIMIZER_BLOCK (1 << 14)
#endif

/* squares[b] = the sum of g^2 over block b; blocks do not depend on the number of threads. */
void NAME(gradient_squares)(const T *restrict gradient, double *restrict squares, int64_t size) {
    int64_t blocks = (size + OPTIMIZER_BLOCK - 1) / OPTIMIZER_BLOCK;
#pragma omp parallel for if (size > MIN_PARALLEL) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * OPTIMIZER_BLOCK;
        int64_t stop = start + OPTIMIZER_BLOCK < size ? start + OPTIMIZER_BLOCK : size;
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = start; i < stop; i++) {
            double value = WIDE(gradient[i]);
            sum += value * value;
        }
        squares[block] = sum;
    }
}

/* With g = scale * gradient (0 where gradient is NULL):
     weight *= 1 - decay;  first += (g - first)(1 - beta1);  second = second beta2 + g^2 (1 - beta2)
     weight -= rate * first / (sqrt(second) * root + eps);  narrow = T(weight)
   decay is learning rate times weight decay, rate the learning rate over 1 - beta1^t, and root
   (1 - beta2^t)^-1/2. */
void NAME(adamw)(
    float *restrict weight, const T *restrict gradient, float *restrict first,
    float *restrict second, T *restrict narrow, int64_t size, float scale, float decay, float rate,
    float root, float beta1, float beta2, float eps
) {
    int64_t blocks = (size + OPTIMIZER_BLOCK - 1) / OPTIMIZER_BLOCK;
    float kept = 1.0f - decay, rest1 = 1.0f - beta1, rest2 = 1.0f - beta2;
#pragma omp parallel for if (size > MIN_PARALLEL) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t start = block * OPTIMIZER_BLOCK;
        int64_t stop = start + OPTIMIZER_BLOCK < size ? start + OPTIMIZER_BLOCK : size;
#pragma omp simd
        for (int64_t i = start; i < stop; i++) {
            float g = gradient ? scale * WIDE(gradient[i]) : 0.0f;
            float m = first[i] + (g - first[i]) * rest1;
            float v = second[i] * beta2 + g * g * rest2;
            float moved = weight[i] * kept - rate * (m / (sqrtf(v) * root + eps));
            first[i] = m;
            second[i] = v;
            weight[i] = moved;
            narrow[i] = NARROW(moved);
        }
    }
}
