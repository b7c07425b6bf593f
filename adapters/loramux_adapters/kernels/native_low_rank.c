/* Gathered low-rank products on a CPU: y[t] += (x[t] A^T) B over each row's own rank rows.
 *
 * Reads exactly the rank rows that are used, once per tile of token rows, and sums in float32. A row's result depends on
 * nothing but the row and its adapter. Compiled for the machine it runs on, see native_build.py.
 */
#include <omp.h>
#include <stdlib.h>

#include "native_floats.h"

typedef struct {
    int64_t start, stop; /* token rows */
    int64_t row, rows;   /* rank rows */
} segment_t;

typedef struct {
    const void *a; /* [C, in] */
    const void *b; /* [C, out] */
    void *y;       /* first column of this map; rows are y_stride elements apart */
    int64_t out;
    int64_t segments;
    const segment_t *segment;
} map_t;

typedef struct {
    const map_t *map;
    segment_t part;
} task_t;

#define TILE 16 /* token rows of one task: what is read of B stays in the cache for all of them */

/* A task is a map and up to TILE token rows of one segment. `shrunk` holds TILE * rows floats. */
#define DEFINE(NAME, SUFFIX, T)                                                                                       \
    INLINE void NAME##_shrink(const T *x, int64_t x_stride, const T *a, int64_t in, int64_t tokens, int64_t rows,     \
                              float *shrunk) {                                                                        \
        v16 sums[16];                                                                                                 \
        int64_t token = 0;                                                                                            \
        for (; rows % 4 == 0 && token + 4 <= tokens; token += 4)                                                      \
            for (int64_t r = 0; r < rows; r += 4) {                                                                   \
                dots_##SUFFIX(x + token * x_stride, x_stride, a + r * in, in, in, sums, 4, 4);                        \
                v16 four = sums_of_16(sums);                                                                          \
                for (int t = 0; t < 4; t++) memcpy(shrunk + (token + t) * rows + r, (float *)&four + 4 * t, 16);      \
            }                                                                                                         \
        for (; token < tokens; token++) {                                                                             \
            int64_t r = 0;                                                                                            \
            for (; r + 8 <= rows; r += 8) {                                                                           \
                dots_##SUFFIX(x + token * x_stride, x_stride, a + r * in, in, in, sums, 1, 8);                        \
                for (int i = 8; i < 16; i++) sums[i] = (v16){0};                                                      \
                v16 eight = sums_of_16(sums);                                                                         \
                memcpy(shrunk + token * rows + r, &eight, 32);                                                        \
            }                                                                                                         \
            for (; r < rows; r++) {                                                                                   \
                dots_##SUFFIX(x + token * x_stride, x_stride, a + r * in, in, in, sums, 1, 1);                        \
                for (int i = 1; i < 16; i++) sums[i] = (v16){0};                                                      \
                shrunk[token * rows + r] = sums_of_16(sums)[0];                                                       \
            }                                                                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    /* COUNT token rows times VECTORS vectors of columns stay in registers over all rank rows. */                     \
    INLINE void NAME##_block(T *y, int64_t y_stride, const T *b, int64_t out, int64_t rows, const float *shrunk,      \
                             const int COUNT, const int VECTORS) {                                                    \
        v16 sums[4] = {0};                                                                                            \
        for (int64_t r = 0; r < rows; r++)                                                                            \
            for (int v = 0; v < VECTORS; v++) {                                                                       \
                v16 weights = load_##SUFFIX(b + r * out + 16 * v);                                                    \
                for (int t = 0; t < COUNT; t++) sums[t * VECTORS + v] += shrunk[t * rows + r] * weights;              \
            }                                                                                                         \
        for (int t = 0; t < COUNT; t++)                                                                               \
            for (int v = 0; v < VECTORS; v++) {                                                                       \
                T *to = y + t * y_stride + 16 * v;                                                                    \
                store_##SUFFIX(to, load_##SUFFIX(to) + sums[t * VECTORS + v]);                                        \
            }                                                                                                         \
    }                                                                                                                 \
    INLINE void NAME##_expand(T *y, int64_t y_stride, const T *b, int64_t out, int64_t tokens, int64_t rows,          \
                              const float *shrunk) {                                                                  \
        int64_t token = 0;                                                                                            \
        for (; token + 4 <= tokens; token += 4)                                                                       \
            for (int64_t o = 0; o + 16 <= out; o += 16)                                                               \
                NAME##_block(y + token * y_stride + o, y_stride, b + o, out, rows, shrunk + token * rows, 4, 1);      \
        for (; token < tokens; token++) {                                                                             \
            int64_t o = 0;                                                                                            \
            for (; o + 64 <= out; o += 64)                                                                            \
                NAME##_block(y + token * y_stride + o, y_stride, b + o, out, rows, shrunk + token * rows, 1, 4);      \
            for (; o + 16 <= out; o += 16)                                                                            \
                NAME##_block(y + token * y_stride + o, y_stride, b + o, out, rows, shrunk + token * rows, 1, 1);      \
        }                                                                                                             \
        for (token = 0; token < tokens; token++)                                                                      \
            for (int64_t o = out / 16 * 16; o < out; o++) {                                                           \
                float sum = 0.0f;                                                                                     \
                for (int64_t r = 0; r < rows; r++) sum += shrunk[token * rows + r] * from_##SUFFIX(b[r * out + o]);   \
                T *to = y + token * y_stride + o;                                                                     \
                *to = to_##SUFFIX(from_##SUFFIX(*to) + sum);                                                          \
            }                                                                                                         \
    }                                                                                                                 \
    int NAME(const map_t *maps, int64_t count, const T *x, int64_t x_stride, int64_t in, int64_t y_stride,            \
             int threads) {                                                                                           \
        int64_t tasks, most;                                                                                          \
        task_t *task = cut(maps, count, &tasks, &most);                                                               \
        float *shrunk = malloc((size_t)(threads * (TILE * most + 16)) * sizeof(float));                               \
        if (task && shrunk) {                                                                                         \
            _Pragma("omp parallel for schedule(dynamic) num_threads(threads)")                                        \
            for (int64_t i = 0; i < tasks; i++) {                                                                     \
                const map_t *map = task[i].map;                                                                       \
                const segment_t part = task[i].part;                                                                  \
                const int64_t tokens = part.stop - part.start;                                                        \
                float *own = shrunk + omp_get_thread_num() * (TILE * most + 16);                                      \
                NAME##_shrink(x + part.start * x_stride, x_stride, (const T *)map->a + part.row * in, in, tokens,     \
                              part.rows, own);                                                                        \
                NAME##_expand((T *)map->y + part.start * y_stride, y_stride, (const T *)map->b + part.row * map->out, \
                              map->out, tokens, part.rows, own);                                                      \
            }                                                                                                         \
        }                                                                                                             \
        int failed = !task || !shrunk;                                                                                \
        free(task);                                                                                                   \
        free(shrunk);                                                                                                 \
        return failed;                                                                                                \
    }

/* Every segment of every map in tiles; how many they are, and the most rank rows of any. */
static task_t *cut(const map_t *maps, int64_t count, int64_t *tasks, int64_t *most) {
    *tasks = *most = 0;
    for (int64_t m = 0; m < count; m++)
        for (int64_t g = 0; g < maps[m].segments; g++) {
            const segment_t *segment = &maps[m].segment[g];
            *tasks += (segment->stop - segment->start + TILE - 1) / TILE;
            *most = segment->rows > *most ? segment->rows : *most;
        }
    task_t *task = malloc((size_t)(*tasks + 1) * sizeof(task_t)), *next = task;
    for (int64_t m = 0; task && m < count; m++)
        for (int64_t g = 0; g < maps[m].segments; g++)
            for (segment_t part = maps[m].segment[g]; part.start < maps[m].segment[g].stop; part.start += TILE) {
                int64_t end = maps[m].segment[g].stop;
                part.stop = part.start + TILE < end ? part.start + TILE : end;
                *next++ = (task_t){&maps[m], part};
            }
    return task;
}

DEFINE(loramux_low_rank_bf16, bf16, uint16_t)
DEFINE(loramux_low_rank_f32, f32, float)
