/* What all kernels share: bf16, an exponential that vectorises, threads.

   Tables are row-major and contiguous unless a stride is given. bf16 is the upper half of a float
   and is rounded to nearest, ties to even, as torch does. Loops over features are written so that
   they vectorise; sums run in one fixed order whatever the number of threads. */
#ifndef GMPO_COMMON_H
#define GMPO_COMMON_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

/* For functions whose sizes are constants where they are called: code of its own for each. */
#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Elements below which starting a second thread costs more than it saves. */
#define MIN_PARALLEL (1 << 15)

static inline float wide_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline bf16 narrow_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    /* A NaN would round into an infinity or a number. */
    return (bits & 0x7fffffffu) > 0x7f800000u ? (bf16)0x7fc0u : (bf16)rounded;
}

static inline float wide_float(float x) { return x; }
static inline float narrow_float(float x) { return x; }

/* e^x to about 1e-7 relative: 2^n by the exponent bits times a polynomial on [-ln2/2, ln2/2].
   Below -87 the result is 0; above 88.7 it is infinite; NaN stays NaN. */
static inline float fast_exp(float x) {
    float kept = x < -87.0f ? -87.0f : (x > 88.7f ? 88.7f : x);
    float n = rintf(kept * 1.44269504088896341f);
    float r = kept - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* Two factors, since 2^128 is no float. */
    int32_t whole = (int32_t)(n == n ? n : 0.0f), half = whole / 2;
    uint32_t low = (uint32_t)(half + 127) << 23, high = (uint32_t)(whole - half + 127) << 23;
    float first, second;
    memcpy(&first, &low, 4);
    memcpy(&second, &high, 4);
    float value = p * first * second;
    value = x < -87.0f ? 0.0f : value;
    return x > 88.7f ? INFINITY : value;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

#endif
