/* bfloat16 and float32 behind one pair of conversions, one by one and sixteen at a time, for kernels that are written
 * once for both. Vectors are the compiler's own: it splits them where the processor's are shorter. */
#ifndef LORICA_NATIVE_FLOATS_H
#define LORICA_NATIVE_FLOATS_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u16x32 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

INLINE float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

INLINE uint16_t to_bf16(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    uint32_t nan = (wide & 0x7fffffffu) > 0x7f800000u;
    uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16; /* to nearest, ties to even */
    return nan ? (uint16_t)((wide >> 16) | 0x40u) : (uint16_t)rounded;
}

INLINE float from_f32(float value) { return value; }
INLINE float to_f32(float value) { return value; }

INLINE v16 load_bf16(const uint16_t *from) {
    u16x16 bits;
    memcpy(&bits, from, sizeof bits);
    return (v16)(__builtin_convertvector(bits, u16x32) << 16);
}

INLINE void store_bf16(uint16_t *to, v16 values) {
    u16x32 wide = (u16x32)values;
    u16x32 rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    u16x32 nan = (u16x32)((wide & 0x7fffffffu) > 0x7f800000u);
    u16x16 bits = __builtin_convertvector((nan & ((wide >> 16) | 0x40u)) | (~nan & rounded), u16x16);
    memcpy(to, &bits, sizeof bits);
}

INLINE v16 load_f32(const float *from) {
    v16 values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE void store_f32(float *to, v16 values) { memcpy(to, &values, sizeof values); }

INLINE v16 splat(float value) { return value - (v16){0}; }

INLINE float sum_of(v16 values) {
    float sum = 0.0f;
    for (int i = 0; i < 16; i++) sum += values[i];
    return sum;
}

/* Sixteen partial sums of the products of a and b [width]; their sum is the dot product. */
INLINE v16 products_f32(const float *a, const float *b, int64_t width) {
    v16 sum = {0};
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) sum += load_f32(a + i) * load_f32(b + i);
    for (; i < width; i++) sum[0] += a[i] * b[i];
    return sum;
}

INLINE v16 products_bf16(const uint16_t *a, const uint16_t *b, int64_t width) {
    v16 sum = {0};
    int64_t i = 0;
#ifdef __AVX512BF16__
    __m512 pairs = _mm512_setzero_ps();
    for (; i + 32 <= width; i += 32)
        pairs = _mm512_dpbf16_ps(pairs, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
    sum = (v16)pairs;
#endif
    for (; i + 16 <= width; i += 16) sum += load_bf16(a + i) * load_bf16(b + i);
    for (; i < width; i++) sum[0] += from_bf16(a[i]) * from_bf16(b[i]);
    return sum;
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
typedef int32_t i32x16 __attribute__((vector_size(64)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32x16){__VA_ARGS__})
#endif

/* The sums of sixteen vectors, in order: a tree of shuffles, a quarter of the work of sixteen sums one by one. */
INLINE v16 sums_of_16(const v16 *a) {
    v16 b[8], c[4], d[2];
    for (int i = 0; i < 8; i++)
        b[i] = SHUFFLE(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        c[i] = SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        d[i] = SHUFFLE(c[i], c[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(c[i], c[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(d[0], d[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(d[0], d[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

#endif
