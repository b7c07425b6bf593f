/* Attention of one query row per request over its own blocks of a paged cache, on a CPU.
 *
 * Reads what a row may see and nothing else: no gather, no padding, no mask. Sums in float32. A row's result depends on
 * nothing but its request. Compiled for the machine it runs on, see loramux_adapters.kernels.native_build.
 */
#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "native_floats.h"

typedef struct {
    const void *keys;   /* [blocks, kv_heads, block_size, key_width] */
    const void *values; /* [blocks, kv_heads, block_size, value_width] */
    int64_t kv_heads, block_size, key_width, value_width;
    const void *query; /* [rows, kv_heads * group, key_width], a row `row_stride`, a head `head_stride` elements apart */
    int64_t row_stride, head_stride, group;
    void *out;            /* [rows, kv_heads * group, value_width] */
    const int64_t *table; /* [rows, table_width]: block i holds positions i * block_size .. */
    int64_t table_width;
    const int64_t *positions; /* [rows]: the row's own, the last one it sees */
    int64_t rows;
    int64_t window; /* how many positions a row sees; 0: all */
    float scale;
    float softcap; /* 0: none */
} decode_t;

/* e^x for x <= 0: within 3e-7 relative where it matters, and NaN for NaN. */
INLINE v16 exp_negative(v16 x) {
    typedef int32_t i16 __attribute__((vector_size(64)));
    i16 tiny = x < -87.0f;
    x = (v16)((tiny & (i16)splat(-87.0f)) | (~tiny & (i16)x));
    i16 whole = __builtin_convertvector(x * 1.44269504f - 0.5f, i16); /* truncates towards zero: the nearest */
    v16 rest = (x * 1.44269504f - __builtin_convertvector(whole, v16)) * 0.69314718f;
    v16 value = 1.0f + rest * (1.0f + rest * (0.5f + rest * (0.16666667f + rest * (0.041666668f +
                rest * (0.0083333338f + rest * 0.0013888889f)))));
    return value * (v16)((whole + 127) << 23);
}

/* In place over `count` scores; there is room for a whole vector at the end. */
INLINE void softmax(float *scores, int64_t count) {
    typedef int32_t i16 __attribute__((vector_size(64)));
    store_f32(scores + count, splat(-INFINITY));
    v16 best = splat(-INFINITY), sum = {0};
    for (int64_t i = 0; i < count; i += 16) {
        v16 own = load_f32(scores + i);
        i16 higher = own > best;
        best = (v16)((higher & (i16)own) | (~higher & (i16)best));
    }
    float most = best[0];
    for (int i = 1; i < 16; i++) most = best[i] > most ? best[i] : most;
    for (int64_t i = 0; i < count; i += 16) {
        v16 weight = exp_negative(load_f32(scores + i) - most);
        store_f32(scores + i, weight);
        sum += weight;
    }
    v16 share = splat(1.0f / sum_of(sum));
    for (int64_t i = 0; i < count; i += 16) store_f32(scores + i, load_f32(scores + i) * share);
}

/* The processor foresees a run of memory, not where the table sends us next. */
INLINE void prefetch(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

/* One task is one row's query heads over one KV head: its keys and values come from memory once for all of them.
 * `scratch` holds group * (length + 16 + value_width) floats. */
#define DEFINE(NAME, SUFFIX, T)                                                                                       \
    INLINE void NAME##_scores(const T *query, const T *keys, int64_t count, const int64_t width, float scale,         \
                              float *scores) {                                                                        \
        for (int64_t from = 0; from < count; from += 16) {                                                            \
            v16 sums[16] = {0};                                                                                       \
            const T *some = keys + from * width;                                                                      \
            if (count - from >= 16)                                                                                   \
                for (int p = 0; p < 16; p += 4) dots_##SUFFIX(query, 0, some + p * width, width, width, sums + p, 1, 4);\
            else                                                                                                      \
                for (int p = 0; p < count - from; p++) dots_##SUFFIX(query, 0, some + p * width, 0, width, sums + p, 1, 1);\
            store_f32(scores + from, sums_of_16(sums) * scale);                                                       \
        }                                                                                                             \
    }                                                                                                                 \
    INLINE void NAME##_sum(const float *weights, const T *values, int64_t count, const int64_t width, float *sum) {   \
        int64_t i = 0;                                                                                                \
        for (; i + 64 <= width; i += 64) {                                                                            \
            v16 a = load_f32(sum + i), b = load_f32(sum + i + 16), c = load_f32(sum + i + 32), d = load_f32(sum + i + 48);\
            for (int64_t p = 0; p < count; p++) {                                                                     \
                const T *row = values + p * width + i;                                                                \
                v16 weight = splat(weights[p]);                                                                       \
                a += weight * load_##SUFFIX(row), b += weight * load_##SUFFIX(row + 16);                              \
                c += weight * load_##SUFFIX(row + 32), d += weight * load_##SUFFIX(row + 48);                         \
            }                                                                                                         \
            store_f32(sum + i, a), store_f32(sum + i + 16, b), store_f32(sum + i + 32, c), store_f32(sum + i + 48, d);\
        }                                                                                                             \
        for (int64_t p = 0; p < count; p++)                                                                           \
            for (int64_t j = i; j < width; j++) sum[j] += weights[p] * from_##SUFFIX(values[p * width + j]);          \
    }                                                                                                                 \
    INLINE void NAME##_task(const decode_t *d, int64_t row, int64_t kv, float *scratch, const int64_t key_width,      \
                            const int64_t value_width) {                                                              \
        const int64_t size = d->block_size, group = d->group, last = d->positions[row];                               \
        const int64_t first = d->window && last + 1 > d->window ? last + 1 - d->window : 0, length = last + 1 - first;\
        const int64_t *table = d->table + row * d->table_width, stride = length + 16;                                 \
        const int64_t key_block = d->kv_heads * size * key_width, value_block = d->kv_heads * size * value_width;     \
        const T *query = (const T *)d->query + row * d->row_stride + kv * group * d->head_stride;                     \
        float *scores = scratch, *sum = scores + group * stride;                                                      \
        for (int64_t from = first, count; from <= last; from += count) {                                              \
            const int64_t inside = from % size, left = last + 1 - from;                                               \
            count = left < size - inside ? left : size - inside;                                                      \
            const T *keys = (const T *)d->keys + kv * size * key_width;                                               \
            if (left > count) prefetch(keys + table[from / size + 1] * key_block, size * key_width * sizeof(T));      \
            keys += table[from / size] * key_block + inside * key_width;                                              \
            for (int64_t g = 0; g < group; g++)                                                                       \
                NAME##_scores(query + g * d->head_stride, keys, count, key_width, d->scale,                           \
                              scores + g * stride + from - first);                                                    \
        }                                                                                                             \
        for (int64_t g = 0; g < group; g++) {                                                                         \
            float *own = scores + g * stride;                                                                         \
            if (d->softcap != 0.0f)                                                                                   \
                for (int64_t p = 0; p < length; p++) own[p] = tanhf(own[p] / d->softcap) * d->softcap;                \
            softmax(own, length);                                                                                     \
        }                                                                                                             \
        memset(sum, 0, (size_t)(group * value_width) * sizeof(float));                                                \
        for (int64_t from = first, count; from <= last; from += count) {                                              \
            const int64_t inside = from % size, left = last + 1 - from;                                               \
            count = left < size - inside ? left : size - inside;                                                      \
            const T *values = (const T *)d->values + kv * size * value_width;                                         \
            if (left > count) prefetch(values + table[from / size + 1] * value_block, size * value_width * sizeof(T));\
            values += table[from / size] * value_block + inside * value_width;                                        \
            for (int64_t g = 0; g < group; g++)                                                                       \
                NAME##_sum(scores + g * stride + from - first, values, count, value_width, sum + g * value_width);    \
        }                                                                                                             \
        T *out = (T *)d->out + (row * d->kv_heads + kv) * group * value_width;                                        \
        for (int64_t i = 0; i < group * value_width; i++) out[i] = to_##SUFFIX(sum[i]);                               \
    }                                                                                                                 \
    int NAME(const decode_t *d, int threads) {                                                                        \
        int64_t longest = 0;                                                                                          \
        for (int64_t row = 0; row < d->rows; row++)                                                                   \
            longest = d->positions[row] + 1 > longest ? d->positions[row] + 1 : longest;                              \
        const int64_t each = d->group * (longest + 16 + d->value_width) + 16;                                         \
        float *scratch = malloc((size_t)(each * threads) * sizeof(float));                                            \
        if (!scratch) return 1;                                                                                       \
        _Pragma("omp parallel for collapse(2) schedule(dynamic) num_threads(threads)")                                \
        for (int64_t row = 0; row < d->rows; row++)                                                                   \
            for (int64_t kv = 0; kv < d->kv_heads; kv++) {                                                            \
                float *own = scratch + each * omp_get_thread_num();                                                   \
                /* Common widths are told to the compiler, which then keeps a whole row in registers. */              \
                if (d->key_width == 64 && d->value_width == 64) NAME##_task(d, row, kv, own, 64, 64);                 \
                else if (d->key_width == 128 && d->value_width == 128) NAME##_task(d, row, kv, own, 128, 128);        \
                else NAME##_task(d, row, kv, own, d->key_width, d->value_width);                                      \
            }                                                                                                         \
        free(scratch);                                                                                                \
        return 0;                                                                                                     \
    }

DEFINE(loramux_decode_bf16, bf16, uint16_t)
DEFINE(loramux_decode_f32, f32, float)
