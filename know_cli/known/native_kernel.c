/* KNOWN on CPUs with AVX2 and FMA: all of a parameter's arithmetic while it is in registers.
 *
 * Rows go in tiles of three vectors. Every lane does the same operations in the same order, so that
 * a row's result depends neither on the other rows nor on how they are cut into calls. There is no
 * state: any number of threads may call at once. `native_kernel.py` packs the weights.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline)) TARGET

/* As in module.py and native_kernel.py. */
enum { HIDDEN = 64, SQUEEZED = 8, FEATURES = 32, MOST_CHECKPOINTS = 32 };
#define NEGATIVE_SLOPE 0.3f

/* Three vectors of rows by four outputs are twelve sums: as many as hide how long one addition
 * takes, and as fit into sixteen registers beside what is read. */
enum { WIDTH = 8, VECTORS = 3, TILE = VECTORS * WIDTH };

typedef float vector __attribute__((vector_size(4 * WIDTH)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH)));
typedef vector sums[4][VECTORS];

/* 1 where this machine can run the kernel. */
int known_supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

INLINE vector all(float value) {
    return value - (vector){0};
}

INLINE vector choose(integers where, vector yes, vector no) {
    return (vector)((where & (integers)yes) | (~where & (integers)no));
}

INLINE vector absolute(vector x) {
    return (vector)((integers)x & 0x7fffffff);
}

INLINE vector with_sign_of(vector sign, vector x) {
    return (vector)(((integers)sign & INT32_MIN) | ((integers)x & 0x7fffffff));
}

/* The functions below are those of Cephes (Moshier, "Methods and Programs for Mathematical
 * Functions", 1989) for single precision: right to one or two units in the last place. */

/* x · 2^exponent, in two factors, since one alone may be no normal number. */
INLINE vector scaled(vector x, integers exponent) {
    integers half = exponent >> 1;
    return x * (vector)((half + 127) << 23) * (vector)((exponent - half + 127) << 23);
}

INLINE vector exponential(vector x) {
    /* Beyond these the result is infinite or 0; what is not a number passes both. */
    x = choose(x > all(89.0f), all(89.0f), x);
    x = choose(x < all(-104.0f), all(-104.0f), x);
    /* Adding 1.5 · 2^23 rounds to a whole number, which is then in the last bits. */
    vector magic = all(12582912.0f), shifted = x * 1.44269504088896341f + magic;
    integers n = (integers)shifted - (integers)magic;
    vector whole = shifted - magic;
    vector r = x - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    vector p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r;
    return scaled(p + 1.0f, n);
}

INLINE vector tangent(vector x) {
    vector size = absolute(x), square = x * x;
    vector p = all(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square + -5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square + -3.33332819422e-1f;
    p = p * square * x + x;
    vector large = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
    return choose(size >= all(0.625f), with_sign_of(x, large), p);
}

/* Of positive normal numbers. */
INLINE vector logarithm(vector x) {
    integers exponent = ((integers)x >> 23) - 126;
    vector m = (vector)(((integers)x & 0x007fffff) | 0x3f000000);
    integers below = m < all(0.70710678118654752440f);
    exponent += below; /* where it holds, a comparison is −1 */
    m = choose(below, m + m, m) - 1.0f;
    vector square = m * m;
    vector p = all(7.0376836292e-2f);
    p = p * m + -1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m + -1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m + -1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m + -2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    p = p * m * square;
    vector e = __builtin_convertvector(exponent, vector);
    p = p + e * -2.12194440e-4f;
    p = p - square * 0.5f;
    return m + p + e * 0.693359375f;
}

INLINE vector inverse_hyperbolic_sine(vector x) {
    vector size = absolute(x), square = x * x;
    vector p = all(2.0122003309e-2f);
    p = p * square + -4.2699340972e-2f;
    p = p * square + 7.4847586088e-2f;
    p = p * square + -1.6666288134e-1f;
    p = p * square * x + x;
    vector root = square + 1.0f;
    for (int lane = 0; lane < WIDTH; lane++) root[lane] = __builtin_sqrtf(root[lane]);
    /* The square of a large number may be infinite, and its root is the number itself. */
    integers huge = size > all(1500.0f);
    vector twice = choose(huge, all(0.693147180559945309f), all(0));
    vector large = logarithm(choose(huge, size, size + root)) + twice;
    large = choose(size == all(__builtin_inff()), size, large);
    return choose(x != x, x, choose(size >= all(0.5f), with_sign_of(x, large), p));
}

INLINE const float *begin(const float *weights, sums of) {
    for (int k = 0; k < 4; k++)
        for (int r = 0; r < VECTORS; r++) of[k][r] = all(weights[k]);
    return weights + 4;
}

/* Four outputs of a linear map of `count` inputs are added to sums that have begun. */
INLINE const float *add(const float *weights, const float *inputs, int count, sums of) {
    vector a0 = of[0][0], a1 = of[0][1], a2 = of[0][2], b0 = of[1][0], b1 = of[1][1], b2 = of[1][2];
    vector c0 = of[2][0], c1 = of[2][1], c2 = of[2][2], d0 = of[3][0], d1 = of[3][1], d2 = of[3][2];
    for (int k = 0; k < count; k++, weights += 4, inputs += TILE) {
        const vector *input = (const vector *)inputs;
        vector x = input[0], y = input[1], z = input[2], w = all(weights[0]);
        a0 = x * w + a0, a1 = y * w + a1, a2 = z * w + a2;
        w = all(weights[1]);
        b0 = x * w + b0, b1 = y * w + b1, b2 = z * w + b2;
        w = all(weights[2]);
        c0 = x * w + c0, c1 = y * w + c1, c2 = z * w + c2;
        w = all(weights[3]);
        d0 = x * w + d0, d1 = y * w + d1, d2 = z * w + d2;
    }
    of[0][0] = a0, of[0][1] = a1, of[0][2] = a2, of[1][0] = b0, of[1][1] = b1, of[1][2] = b2;
    of[2][0] = c0, of[2][1] = c1, of[2][2] = c2, of[3][0] = d0, of[3][1] = d1, of[3][2] = d2;
    return weights;
}

INLINE const float *affine(const float *weights, const float *inputs, int count, sums of) {
    return add(begin(weights, of), inputs, count, of);
}

/* One stream of a tile: `count` values become 32 features, whose share of the head is added. */
INLINE const float *stream(const float *weights, const float *values, int count, vector *head) {
    vector squeezed[SQUEEZED * VECTORS], hidden[HIDDEN * VECTORS];
    const float *squeezed_rows = (const float *)squeezed, *hidden_rows = (const float *)hidden;
    sums of, law;
    for (int at = 0; at < SQUEEZED; at += 4) {
        weights = affine(weights, values, count, of);
        for (int k = 0; k < 4; k++)
            for (int r = 0; r < VECTORS; r++)
                squeezed[(at + k) * VECTORS + r] = choose(of[k][r] < all(0), all(0), of[k][r]);
    }
    for (int at = 0; at < HIDDEN; at += 4) {
        weights = affine(weights, values, count, law);
        weights = affine(weights, squeezed_rows, SQUEEZED, of);
        for (int k = 0; k < 4; k++)
            for (int r = 0; r < VECTORS; r++) law[k][r] = exponential(of[k][r] * law[k][r]);
        weights = affine(weights, squeezed_rows, SQUEEZED, of);
        for (int k = 0; k < 4; k++)
            for (int r = 0; r < VECTORS; r++) hidden[(at + k) * VECTORS + r] = of[k][r] * law[k][r];
    }
    for (int at = 0; at < FEATURES; at += 4) {
        weights = affine(weights, squeezed_rows, SQUEEZED, of);
        weights = add(weights, hidden_rows, HIDDEN, of);
        for (int k = 0; k < 4; k++, weights++)
            for (int r = 0; r < VECTORS; r++) {
                vector x = of[k][r];
                head[r] = choose(x < all(0), x * NEGATIVE_SLOPE, x) * *weights + head[r];
            }
    }
    return weights;
}

/* Windows prepared by spread, in place, a vector of rows; `values` are VECTORS apart. */
INLINE vector spread_of(vector *values, int checkpoints, vector origin) {
    vector spread = all(0);
    for (int k = 0; k + 1 < checkpoints; k++) {
        vector size = absolute(values[k * VECTORS] -= origin);
        /* What is not a number must not get lost. */
        spread = choose((size > spread) | (size != size), size, spread);
    }
    return spread;
}

/* Predict θ̂(−1) of some windows.
 *
 * weights: as `native_kernel.py` packs them.
 * checkpoints: S, at most MOST_CHECKPOINTS.
 * prepared: whether windows are prepared by spread.
 * history: S rows of `count` floats, each `stride` floats after the one before; θ0 last.
 * out: receives `count` floats.
 */
TARGET void known_predict(const float *weights, int checkpoints, int prepared, const float *history,
                          ptrdiff_t stride, ptrdiff_t count, float *out) {
    vector values[MOST_CHECKPOINTS * VECTORS], differences[MOST_CHECKPOINTS * VECTORS];
    vector origin[VECTORS], scale[VECTORS], head[VECTORS];
    const int last = (checkpoints - 1) * VECTORS;
    for (ptrdiff_t first = 0; first < count; first += TILE) {
        size_t bytes = sizeof(float) * (size_t)(count - first < TILE ? count - first : TILE);
        for (int k = 0; k < checkpoints; k++) {
            if (bytes < sizeof(float) * TILE) memset(values + k * VECTORS, 0, sizeof(float) * TILE);
            memcpy(values + k * VECTORS, history + k * stride + first, bytes);
        }
        for (int r = 0; r < VECTORS; r++) {
            vector *at = values + r;
            origin[r] = at[last];
            scale[r] = all(1);
            head[r] = all(weights[0]);
            if (prepared) {
                scale[r] = spread_of(at, checkpoints, origin[r]);
                at[last] -= origin[r];
                /* A spread of 0 would give 0/0; dividing by infinity gives the 0 that is meant. */
                vector divisor = choose(scale[r] == all(0), all(__builtin_inff()), scale[r]);
                for (int k = 0; k < checkpoints; k++) at[k * VECTORS] /= divisor;
                for (int k = 0; k + 1 < checkpoints; k++)
                    differences[k * VECTORS + r] = at[(k + 1) * VECTORS] - at[k * VECTORS];
                at[last] = inverse_hyperbolic_sine(origin[r] / divisor);
            } else {
                for (int k = 0; k + 1 < checkpoints; k++)
                    differences[k * VECTORS + r] = at[(k + 1) * VECTORS] - at[k * VECTORS];
            }
        }
        const float *next = stream(weights + 1, (const float *)values, checkpoints, head);
        stream(next, (const float *)differences, checkpoints - 1, head);
        for (int r = 0; r < VECTORS; r++) head[r] = tangent(head[r]) * scale[r] + origin[r];
        memcpy(out + first, head, bytes);
    }
}
