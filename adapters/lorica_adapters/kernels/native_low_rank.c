/* Gathered low-rank products for few rows per adapter on a CPU: y[t] += (x[t] A^T) B over each row's own rank rows.
 *
 * Reads exactly the rank rows that are used, once per token row, and sums in float32. A row's result depends on
 * nothing but the row and its adapter. Compiled for the machine it runs on by lorica_adapters.kernels.native.
 */
#include <stdlib.h>

#include "native_floats.h"

typedef struct {
    int64_t start, stop; /* token rows */
    int64_t row, rows;   /* rank rows */
} segment_t;

typedef struct {
    const void *a;  /* [C, in] */
    const void *b;  /* [C, out] */
    void *y;        /* first column of this map; rows are y_stride elements apart */
    int64_t out;
    int64_t segments;
    const segment_t *segment;
} map_t;

#define CHUNK 256 /* output columns per task: their sums stay in registers and L1 */

/* One task of the first phase is a (map, token row); of the second a (map, token row, chunk of columns). `shrunk` holds
 * max_rows floats per (map, token row). */
#define DEFINE(NAME, T, FROM, TO)                                                                                     \
    static void NAME##_shrink(const map_t *map, const T *x, int64_t x_stride, int64_t in, int64_t token, float *s) {  \
        for (int64_t g = 0; g < map->segments; g++) {                                                                 \
            const segment_t *segment = &map->segment[g];                                                              \
            if (token < segment->start || token >= segment->stop) continue;                                           \
            const T *row_x = x + token * x_stride;                                                                    \
            for (int64_t r = 0; r < segment->rows; r++) {                                                             \
                const T *row_a = (const T *)map->a + (segment->row + r) * in;                                         \
                float sum = 0.0f;                                                                                     \
                for (int64_t i = 0; i < in; i++) sum += FROM(row_x[i]) * FROM(row_a[i]);                              \
                s[r] = sum;                                                                                           \
            }                                                                                                         \
            return;                                                                                                   \
        }                                                                                                             \
    }                                                                                                                 \
    static void NAME##_expand(const map_t *map, int64_t y_stride, int64_t token, int64_t from, const float *s) {      \
        int64_t width = map->out - from < CHUNK ? map->out - from : CHUNK;                                            \
        for (int64_t g = 0; g < map->segments; g++) {                                                                 \
            const segment_t *segment = &map->segment[g];                                                              \
            if (token < segment->start || token >= segment->stop) continue;                                           \
            T *row_y = (T *)map->y + token * y_stride + from;                                                         \
            float sum[CHUNK];                                                                                         \
            for (int64_t o = 0; o < width; o++) sum[o] = 0.0f;                                                        \
            for (int64_t r = 0; r < segment->rows; r++) {                                                             \
                const T *row_b = (const T *)map->b + (segment->row + r) * map->out + from;                            \
                float factor = s[r];                                                                                  \
                for (int64_t o = 0; o < width; o++) sum[o] += factor * FROM(row_b[o]);                                \
            }                                                                                                         \
            for (int64_t o = 0; o < width; o++) row_y[o] = TO(FROM(row_y[o]) + sum[o]);                               \
            return;                                                                                                   \
        }                                                                                                             \
    }                                                                                                                 \
    int NAME(const map_t *maps, int64_t count, const T *x, int64_t x_stride, int64_t in, int64_t y_stride,            \
             int64_t first, int64_t tokens, int64_t max_rows, int64_t max_out, int threads) {                         \
        int64_t rows = tokens - first, chunks = (max_out + CHUNK - 1) / CHUNK;                                        \
        float *shrunk = malloc((size_t)(count * rows * max_rows) * sizeof(float));                                    \
        if (!shrunk) return 1;                                                                                        \
        _Pragma("omp parallel num_threads(threads)")                                                                  \
        {                                                                                                             \
            _Pragma("omp for collapse(2) schedule(static)")                                                           \
            for (int64_t m = 0; m < count; m++)                                                                       \
                for (int64_t t = 0; t < rows; t++)                                                                    \
                    NAME##_shrink(&maps[m], x, x_stride, in, first + t, shrunk + (m * rows + t) * max_rows);          \
            _Pragma("omp for collapse(3) schedule(static)")                                                           \
            for (int64_t m = 0; m < count; m++)                                                                       \
                for (int64_t t = 0; t < rows; t++)                                                                    \
                    for (int64_t c = 0; c < chunks; c++)                                                              \
                        if (c * CHUNK < maps[m].out)                                                                  \
                            NAME##_expand(&maps[m], y_stride, first + t, c * CHUNK,                                   \
                                          shrunk + (m * rows + t) * max_rows);                                        \
        }                                                                                                             \
        free(shrunk);                                                                                                 \
        return 0;                                                                                                     \
    }

DEFINE(lorica_low_rank_bf16, uint16_t, from_bf16, to_bf16)
DEFINE(lorica_low_rank_f32, float, from_f32, to_f32)
