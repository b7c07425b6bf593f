/* y = x W^T + bias for few rows of x on a CPU, W in NF4 or bfloat16: a frozen weight is read once, in the bits it rests in.
 *
 * NF4 is decoded, a few output rows at a time, to the very bfloat16 values that dequantizing gives, and sums are in
 * float32. A row's result depends on nothing but the row. Compiled for the machine it runs on, see native_build.py.
 */
#include <omp.h>
#include <stdlib.h>

#include "native_floats.h"

#ifdef __AVX512BF16__

#define OUTS 4 /* output rows at a time: their weights and four rows of x are 16 sums in registers */

typedef struct {
    const uint16_t *x; /* [rows, in], a row x_stride elements apart */
    int64_t x_stride, rows, in;
    const void *weight;  /* NF4: codes [out, in / 2], high nibble first. bfloat16: [out, in] */
    const float *absmax; /* NF4: [out * in / block], one scale a block; NULL: bfloat16 */
    int64_t block;
    const float *code; /* NF4: the 16 values */
    const uint16_t *bias;
    uint16_t *y; /* [rows, out] */
    int64_t out;
} linear_t;

/* Columns 0 2 4 .. 30 1 3 5 .. 31 of each run of 32: the order in which nibbles come out of bytes. */
INLINE void split_columns(const uint16_t *from, uint16_t *to, int64_t in) {
    const __m512i order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24, 22,
                                           20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    for (int64_t i = 0; i < in; i += 32)
        _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(order, _mm512_loadu_si512(from + i)));
}

INLINE void decode(const linear_t *l, int64_t out, __m512 code, uint16_t *to) {
    const uint8_t *codes = (const uint8_t *)l->weight + out * (l->in / 2);
    const float *absmax = l->absmax + out * (l->in / l->block);
    for (int64_t i = 0; i < l->in; i += 32) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512 scale = _mm512_set1_ps(absmax[i / l->block]);
        /* A permutation looks at the low four bits of its index: the low nibble needs no mask. */
        __m512 even = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), code), scale);
        __m512 odd = _mm512_mul_ps(_mm512_permutexvar_ps(bytes, code), scale);
        _mm512_storeu_si512(to + i, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
    }
}

/* COUNT rows of x against OUTS rows of W; `bias` is that of the OUTS, four times over. */
INLINE void block(const linear_t *l, const uint16_t *x, int64_t x_stride, int64_t row, int64_t out, const uint16_t *weight,
                  v16 bias, const int COUNT) {
    v16 sums[16];
    uint16_t y[16];
    dots_bf16(x + row * x_stride, x_stride, weight, l->in, l->in, sums, COUNT, OUTS);
    for (int i = COUNT * OUTS; i < 16; i++) sums[i] = (v16){0};
    store_bf16(y, sums_of_16(sums) + bias);
    for (int r = 0; r < COUNT; r++) memcpy(l->y + (row + r) * l->out + out, y + r * OUTS, OUTS * sizeof *y);
}

static void outputs(const linear_t *l, const uint16_t *x, int64_t x_stride, int64_t first, int64_t last, uint16_t *decoded) {
    const __m512 code = l->absmax ? _mm512_loadu_ps(l->code) : _mm512_setzero_ps();
    for (int64_t out = first; out < last; out += OUTS) {
        const uint16_t *weight = decoded;
        if (l->absmax)
            for (int o = 0; o < OUTS; o++) decode(l, out + o, code, decoded + o * l->in);
        else
            weight = (const uint16_t *)l->weight + out * l->in;
        v16 bias = {0};
        for (int i = 0; l->bias && i < 16; i++) bias[i] = from_bf16(l->bias[out + i % OUTS]);
        int64_t row = 0;
        for (; row + 4 <= l->rows; row += 4) block(l, x, x_stride, row, out, weight, bias, 4);
        if (row + 2 <= l->rows) block(l, x, x_stride, row, out, weight, bias, 2), row += 2;
        if (row < l->rows) block(l, x, x_stride, row, out, weight, bias, 1);
    }
}

/* `in` is a multiple of 32, `out` of OUTS, `block` of 32. Returns nonzero where there is no memory. */
int loramux_linear(const linear_t *l, int threads) {
    uint16_t *split = l->absmax ? aligned_alloc(64, (size_t)(l->rows * l->in) * 2) : NULL;
    uint16_t *decoded = aligned_alloc(64, (size_t)(threads * OUTS * l->in) * 2);
    int failed = !decoded || (l->absmax && !split);
    if (!failed) {
        for (int64_t row = 0; split && row < l->rows; row++)
            split_columns(l->x + row * l->x_stride, split + row * l->in, l->in);
#pragma omp parallel num_threads(threads)
        {
            int64_t groups = l->out / OUTS, workers = omp_get_num_threads(), own = omp_get_thread_num();
            outputs(l, split ? split : l->x, split ? l->in : l->x_stride, groups * own / workers * OUTS,
                    groups * (own + 1) / workers * OUTS, decoded + own * OUTS * l->in);
        }
    }
    free(split);
    free(decoded);
    return failed;
}

int loramux_linear_supported(void) { return 1; }

/* Whether the library's own products have matrix tiles, and overtake these at fewer rows. */
int loramux_linear_has_tiles(void) {
#ifdef __AMX_BF16__
    return 1;
#else
    return 0;
#endif
}

#else

int loramux_linear(const void *l, int threads) { return (void)l, (void)threads, 1; }
int loramux_linear_supported(void) { return 0; }
int loramux_linear_has_tiles(void) { return 0; }

#endif
