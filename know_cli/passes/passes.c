/* Single passes over many numbers, for processors with AVX2: what torch does in several operations,
 * each of which goes through memory and needs Python's interpreter lock, is done here in one, while
 * a block is in the first-level cache. `native.py` calls these; `numbers.py` says what they do, and
 * does the same with torch, bit for bit.
 *
 * There is no state: any number of threads may call at once. Compile without contraction of products
 * and sums (-ffp-contract=off), since each is rounded.
 */

#include <errno.h>
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

/* Every processor with AVX2 has F16C. */
#define TARGET __attribute__((target("avx2,f16c")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* As in `native.py`. */
enum { F32 = 0, BF16 = 1, F16 = 2, F64 = 3 };
/* Elements at a time: a few arrays of them fit into the first-level cache. */
enum { BLOCK = 1024 };
/* Elements that are read at a time: their bytes stay in the second-level cache. */
enum { PIECE = 32 * BLOCK };

typedef double doubles __attribute__((vector_size(32)));

/* 1 where this machine can run them. */
int passes_supported(void) {
    return __builtin_cpu_supports("avx2");
}

INLINE ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) {
    return a < b ? a : b;
}

/* Widen or narrow up to BLOCK numbers to float. */
INLINE void to_float(int dtype, const void *from, ptrdiff_t count, float *to) {
    if (dtype == F32) {
        memcpy(to, from, sizeof(float) * (size_t)count);
    } else if (dtype == BF16) {
        const uint16_t *halves = from;
        ptrdiff_t i = 0;
        for (; i + 8 <= count; i += 8) {
            __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(halves + i)));
            _mm256_storeu_si256((__m256i *)(to + i), _mm256_slli_epi32(wide, 16));
        }
        for (; i < count; i++) {
            uint32_t bits = (uint32_t)halves[i] << 16;
            memcpy(to + i, &bits, sizeof bits);
        }
    } else if (dtype == F16) {
        const uint16_t *halves = from;
        ptrdiff_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
        if (i < count) {
            uint16_t rest[8] = {0};
            float out[8];
            memcpy(rest, halves + i, sizeof(uint16_t) * (size_t)(count - i));
            _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)rest)));
            memcpy(to + i, out, sizeof(float) * (size_t)(count - i));
        }
    } else {
        const double *wide = from;
        for (ptrdiff_t i = 0; i < count; i++) to[i] = (float)wide[i];
    }
}

/* All bits where one of eight floats is infinite or not a number, else 0. */
INLINE __m256i trouble(__m256i bits) {
    const __m256i exponent = _mm256_set1_epi32(0x7f800000);
    return _mm256_cmpeq_epi32(_mm256_and_si256(bits, exponent), exponent);
}

INLINE int is_trouble(uint32_t bits) {
    return (bits & 0x7f800000u) == 0x7f800000u;
}

/* 1 where all of some floats are finite. */
TARGET int passes_finite(const float *values, ptrdiff_t count) {
    ptrdiff_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i *at = (const __m256i *)(values + i);
        __m256i bad = _mm256_or_si256(
            _mm256_or_si256(trouble(_mm256_loadu_si256(at)), trouble(_mm256_loadu_si256(at + 1))),
            _mm256_or_si256(trouble(_mm256_loadu_si256(at + 2)),
                            trouble(_mm256_loadu_si256(at + 3))));
        if (!_mm256_testz_si256(bad, bad)) return 0;
    }
    for (; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        if (is_trouble(bits)) return 0;
    }
    return 1;
}

/* Read bytes that are there, or fewer at the end of the file; -errno after an error. */
static ptrdiff_t read_all(int descriptor, int64_t position, char *to, size_t bytes) {
    size_t done = 0;
    while (done < bytes) {
        ssize_t count = pread(descriptor, to + done, bytes - done, position + (int64_t)done);
        if (count < 0) return -errno;
        if (count == 0) break;
        done += (size_t)count;
    }
    return (ptrdiff_t)done;
}

/* Read numbers of a file as floats.
 *
 * finite: set to 0 where one is not finite, and else left as it is.
 * Returns how many were read: fewer where the file ends before; -errno after an error. After EINTR
 * what was read before it counts, so that the caller can see to the signal and go on.
 */
TARGET int64_t passes_read(int descriptor, int64_t position, int dtype, int64_t count, float *out,
                           int32_t *finite) {
    static const size_t sizes[] = {4, 2, 2, 8};
    const size_t size = sizes[dtype];
    double raw[PIECE]; /* room for the largest type, aligned for all */
    for (int64_t first = 0; first < count; first += PIECE) {
        ptrdiff_t wanted = least(count - first, PIECE);
        char *to = dtype == F32 ? (char *)(out + first) : (char *)raw;
        ptrdiff_t bytes = read_all(descriptor, position + first * (int64_t)size, to,
                                   size * (size_t)wanted);
        if (bytes == -EINTR) return first ? first : -EINTR;
        if (bytes < 0) return bytes;
        ptrdiff_t done = bytes / (ptrdiff_t)size;
        for (ptrdiff_t i = 0; i < done; i += BLOCK) {
            ptrdiff_t some = least(done - i, BLOCK);
            float *at = out + first + i;
            if (dtype != F32) to_float(dtype, (const char *)raw + size * (size_t)i, some, at);
            if (*finite && !passes_finite(at, some)) *finite = 0;
        }
        if (done < wanted) return first + done;
    }
    return count;
}

INLINE __m256d to_odd_in_float(__m256d values) {
    const __m256i cut = _mm256_set1_epi64x((1 << 29) - 1), last = _mm256_set1_epi64x(1 << 29);
    __m256i bits = _mm256_castpd_si256(values);
    __m256i more = _mm256_add_epi64(_mm256_and_si256(bits, cut), cut);
    bits = _mm256_or_si256(bits, _mm256_and_si256(more, last));
    return _mm256_castsi256_pd(_mm256_andnot_si256(cut, bits));
}

/* Four sums, from the rows' values in `at[k * stride]`. */
INLINE __m128 four_sums(const double *weights, int terms, const float *at, ptrdiff_t stride,
                        int to_odd) {
    __m256d total = _mm256_setzero_pd();
    for (int k = 0; k < terms; k++) {
        if (weights[k] == 0) continue;
        __m256d value = _mm256_cvtps_pd(_mm_loadu_ps(at + k * stride));
        total = _mm256_add_pd(total, _mm256_mul_pd(value, _mm256_set1_pd(weights[k])));
    }
    return _mm256_cvtpd_ps(to_odd ? to_odd_in_float(total) : total);
}

/* Σ weights[k] · rows[k], each product and each sum rounded to float64, in the order of the rows;
 * rows with the weight 0 are left out.
 *
 * rows: `terms` rows of `count` floats, each `stride` floats after the one before.
 * to_odd: round to float so that a later rounding to 16 bits is as good as rounding once.
 */
TARGET void passes_sum(const double *weights, int terms, const float *rows, ptrdiff_t stride,
                       ptrdiff_t count, int to_odd, float *out) {
    ptrdiff_t i = 0;
    for (; i + 16 <= count; i += 16) {
        /* Four at a time would wait for each addition. */
        __m256d total[4];
        for (int j = 0; j < 4; j++) total[j] = _mm256_setzero_pd();
        for (int k = 0; k < terms; k++) {
            if (weights[k] == 0) continue;
            const __m256d weight = _mm256_set1_pd(weights[k]);
            const float *at = rows + k * stride + i;
            for (int j = 0; j < 4; j++)
                total[j] = _mm256_add_pd(
                    total[j], _mm256_mul_pd(_mm256_cvtps_pd(_mm_loadu_ps(at + 4 * j)), weight));
        }
        for (int j = 0; j < 4; j++)
            _mm_storeu_ps(out + i + 4 * j,
                          _mm256_cvtpd_ps(to_odd ? to_odd_in_float(total[j]) : total[j]));
    }
    for (; i + 4 <= count; i += 4)
        _mm_storeu_ps(out + i, four_sums(weights, terms, rows + i, stride, to_odd));
    for (; i < count; i++) {
        double total = 0;
        for (int k = 0; k < terms; k++)
            if (weights[k] != 0) total += (double)rows[k * stride + i] * weights[k];
        out[i] = _mm_cvtss_f32(_mm256_cvtpd_ps(
            to_odd ? to_odd_in_float(_mm256_set1_pd(total)) : _mm256_set1_pd(total)));
    }
}

/* Where all rows have the same bits; returns in how many places.
 *
 * rows: `checkpoints` rows of `count` floats, each `stride` floats after the one before.
 * mask: receives `count` bytes, 0 or 1.
 */
TARGET int64_t passes_same(const float *rows, int checkpoints, ptrdiff_t stride, ptrdiff_t count,
                           uint8_t *mask) {
    const int32_t *bits = (const int32_t *)rows, *newest = bits + (checkpoints - 1) * stride;
    int64_t found = 0;
    ptrdiff_t i = 0;
    for (; i + 8 <= count; i += 8) {
        __m256i at = _mm256_loadu_si256((const __m256i *)(newest + i));
        uint32_t same = 0xff;
        for (int k = checkpoints - 2; k >= 0 && same; k--) {
            __m256i other = _mm256_loadu_si256((const __m256i *)(bits + k * stride + i));
            same &= (uint32_t)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(at, other)));
        }
        /* Bit j to byte j, which is then 0 or 1. */
        uint64_t bytes = (same * 0x0101010101010101u) & 0x8040201008040201u;
        bytes = ((bytes + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
        memcpy(mask + i, &bytes, sizeof bytes);
        found += __builtin_popcount(same);
    }
    for (; i < count; i++) {
        int same = 1;
        for (int k = checkpoints - 2; k >= 0 && same; k--) same = bits[k * stride + i] == newest[i];
        mask[i] = (uint8_t)same;
        found += same;
    }
    return found;
}

/* Round floats to F32, BF16 or F16, with others in their place where a mask says so.
 *
 * mask: NULL, or bytes 0 and 1; where 1, `others` is taken.
 * Returns 1 where all results are finite.
 */
TARGET int passes_cast(const float *values, const float *others, const uint8_t *mask,
                       ptrdiff_t count, int dtype, void *out) {
    uint32_t bad = 0;
    for (ptrdiff_t first = 0; first < count; first += BLOCK) {
        ptrdiff_t size = least(count - first, BLOCK);
        uint32_t bits[BLOCK];
        memcpy(bits, values + first, sizeof(float) * (size_t)size);
        if (mask) {
            uint32_t other[BLOCK];
            memcpy(other, others + first, sizeof(float) * (size_t)size);
            for (ptrdiff_t i = 0; i < size; i++) {
                uint32_t take = 0u - (uint32_t)mask[first + i];
                bits[i] = (other[i] & take) | (bits[i] & ~take);
            }
        }
        if (dtype == F32) {
            for (ptrdiff_t i = 0; i < size; i++)
                bad |= (bits[i] & 0x7f800000u) == 0x7f800000u;
            memcpy((float *)out + first, bits, sizeof(float) * (size_t)size);
        } else if (dtype == BF16) {
            uint16_t *to = (uint16_t *)out + first;
            for (ptrdiff_t i = 0; i < size; i++) {
                uint32_t rounded = (bits[i] + 0x7fffu + ((bits[i] >> 16) & 1u)) >> 16;
                /* What is not a number may have become another number. */
                bad |= ((bits[i] & 0x7f800000u) == 0x7f800000u) | ((rounded & 0x7f80u) == 0x7f80u);
                to[i] = (uint16_t)rounded;
            }
        } else {
            uint16_t *to = (uint16_t *)out + first;
            float floats[BLOCK];
            uint16_t halves[BLOCK];
            memcpy(floats, bits, sizeof(float) * (size_t)size);
            for (ptrdiff_t i = size; i < BLOCK && i % 8; i++) floats[i] = 0;
            for (ptrdiff_t i = 0; i < size; i += 8)
                _mm_storeu_si128((__m128i *)(halves + i),
                                 _mm256_cvtps_ph(_mm256_loadu_ps(floats + i),
                                                 _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
            for (ptrdiff_t i = 0; i < size; i++) bad |= (halves[i] & 0x7c00u) == 0x7c00u;
            memcpy(to, halves, sizeof(uint16_t) * (size_t)size);
        }
    }
    return !bad;
}

/* Σ |after − before|, Σ (after − before)² and Σ before², float64, always in the same order. */
INLINE void change(const float *before, const char *after, int dtype, ptrdiff_t count,
                   double *sums) {
    static const size_t sizes[] = {4, 2, 2, 8};
    doubles absolute[2] = {{0}}, squared[2] = {{0}}, norm[2] = {{0}};
    for (ptrdiff_t first = 0; first < count; first += BLOCK) {
        ptrdiff_t size = least(count - first, BLOCK);
        float old[BLOCK], new[BLOCK];
        memcpy(old, before + first, sizeof(float) * (size_t)size);
        to_float(dtype, after + sizes[dtype] * (size_t)first, size, new);
        for (ptrdiff_t i = size; i < BLOCK && i % 8; i++) old[i] = new[i] = 0;
        for (ptrdiff_t i = 0; i < size; i += 8)
            for (int half = 0; half < 2; half++) {
                doubles b = (doubles)_mm256_cvtps_pd(_mm_loadu_ps(old + i + 4 * half));
                doubles change = (doubles)_mm256_cvtps_pd(_mm_loadu_ps(new + i + 4 * half)) - b;
                absolute[half] += (doubles)_mm256_andnot_pd(_mm256_set1_pd(-0.0), (__m256d)change);
                squared[half] += change * change;
                norm[half] += b * b;
            }
    }
    sums[0] = sums[1] = sums[2] = 0;
    for (int half = 0; half < 2; half++)
        for (int lane = 0; lane < 4; lane++) {
            sums[0] += absolute[half][lane];
            sums[1] += squared[half][lane];
            sums[2] += norm[half][lane];
        }
}

/* What `change` sums, of each cell of `grid` numbers; the first has only `leading` of them. */
TARGET void passes_changes(const float *before, const void *after, int dtype, ptrdiff_t count,
                           ptrdiff_t leading, ptrdiff_t grid, double *sums) {
    static const size_t sizes[] = {4, 2, 2, 8};
    for (ptrdiff_t first = 0, size = leading; first < count; first += size, size = grid, sums += 3) {
        size = least(size, count - first);
        change(before + first, (const char *)after + sizes[dtype] * (size_t)first, dtype, size,
               sums);
    }
}
