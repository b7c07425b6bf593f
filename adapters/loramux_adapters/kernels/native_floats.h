/* bfloat16 and float32 behind one pair of conversions, one by one and sixteen at a time, for kernels that are written
 * once for both. Vectors are the compiler's own: it splits them where the processor's are shorter. */
#ifndef LORAMUX_NATIVE_FLOATS_H
#define LORAMUX_NATIVE_FLOATS_H

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
#ifdef __AVX512BF16__
    __m256bh bits = _mm512_cvtneps_pbh((__m512)values);
#else
    u16x32 wide = (u16x32)values;
    u16x32 rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    u16x32 nan = (u16x32)((wide & 0x7fffffffu) > 0x7f800000u);
    u16x16 bits = __builtin_convertvector((nan & ((wide >> 16) | 0x40u)) | (~nan & rounded), u16x16);
#endif
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

/* What dot products are made of: LANES elements at a time, their products summed into sixteen partial sums. */
typedef v16 lanes_f32;
#define LANES_f32 16
INLINE lanes_f32 lanes_load_f32(const float *from) { return load_f32(from); }
INLINE v16 lanes_dot_f32(v16 sums, lanes_f32 a, lanes_f32 b) { return sums + a * b; }

#ifdef __AVX512BF16__
typedef __m512bh lanes_bf16;
#define LANES_bf16 32
INLINE lanes_bf16 lanes_load_bf16(const uint16_t *from) { return (__m512bh)_mm512_loadu_si512(from); }
INLINE v16 lanes_dot_bf16(v16 sums, lanes_bf16 a, lanes_bf16 b) { return (v16)_mm512_dpbf16_ps((__m512)sums, a, b); }
#else
typedef v16 lanes_bf16;
#define LANES_bf16 16
INLINE lanes_bf16 lanes_load_bf16(const uint16_t *from) { return load_bf16(from); }
INLINE v16 lanes_dot_bf16(v16 sums, lanes_bf16 a, lanes_bf16 b) { return sums + a * b; }
#endif

/* ROWS x COLUMNS dot products (at most 4 x 4, or 1 x 16) over `width` elements, `rows` and `columns` that many elements apart; sums[r * COLUMNS + c]
 * are the sixteen partial sums of each. Each element is loaded once: all sums stay in registers. */
#define DEFINE_DOTS(SUFFIX, T)                                                                                        \
    INLINE void dots_##SUFFIX(const T *row, int64_t rows, const T *column, int64_t columns, int64_t width, v16 *sums, \
                              const int ROWS, const int COLUMNS) {                                                    \
        v16 own[16];                                                                                                  \
        for (int i = 0; i < ROWS * COLUMNS; i++) own[i] = (v16){0};                                                   \
        int64_t i = 0;                                                                                                \
        for (; i + LANES_##SUFFIX <= width; i += LANES_##SUFFIX) {                                                    \
            lanes_##SUFFIX a[4];                                                                                      \
            for (int r = 0; r < ROWS; r++) a[r] = lanes_load_##SUFFIX(row + r * rows + i);                            \
            for (int c = 0; c < COLUMNS; c++) {                                                                       \
                lanes_##SUFFIX b = lanes_load_##SUFFIX(column + c * columns + i);                                     \
                for (int r = 0; r < ROWS; r++) own[r * COLUMNS + c] = lanes_dot_##SUFFIX(own[r * COLUMNS + c], a[r], b);\
            }                                                                                                         \
        }                                                                                                             \
        for (; i < width; i++)                                                                                        \
            for (int r = 0; r < ROWS; r++)                                                                            \
                for (int c = 0; c < COLUMNS; c++)                                                                     \
                    own[r * COLUMNS + c][0] += from_##SUFFIX(row[r * rows + i]) * from_##SUFFIX(column[c * columns + i]);\
        for (int i = 0; i < ROWS * COLUMNS; i++) sums[i] = own[i];                                                    \
    }

DEFINE_DOTS(bf16, uint16_t)
DEFINE_DOTS(f32, float)

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
