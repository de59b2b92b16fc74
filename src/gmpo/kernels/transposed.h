/* A bf16 table turned, so that products read it from end to end. */

/* Side of the squares that are turned at once: two of them stay in the first cache. */
#define SQUARE 32
#define FOURS (SQUARE / 4)
#define EVEN UINT64_C(0x0000ffff0000ffff)
#define LOW UINT64_C(0x00000000ffffffff)

/* Four numbers of a row are one integer, the first in its lowest bits (little-endian), so that four
   rows become four columns by shifts; the compiler takes eight such integers at once. */
static inline void turn_square(uint64_t from[SQUARE][FOURS], uint64_t to[SQUARE][FOURS]) {
    for (int i = 0; i < FOURS; i++) {
        uint64_t *a = from[4 * i], *b = a + FOURS, *c = b + FOURS, *d = c + FOURS;
        uint64_t columns[4][FOURS];
#pragma omp simd
        for (int j = 0; j < FOURS; j++) {
            uint64_t ab_even = (a[j] & EVEN) | (b[j] & EVEN) << 16;
            uint64_t cd_even = (c[j] & EVEN) | (d[j] & EVEN) << 16;
            uint64_t ab_odd = (a[j] >> 16 & EVEN) | (b[j] & ~EVEN);
            uint64_t cd_odd = (c[j] >> 16 & EVEN) | (d[j] & ~EVEN);
            columns[0][j] = (ab_even & LOW) | cd_even << 32;
            columns[1][j] = (ab_odd & LOW) | cd_odd << 32;
            columns[2][j] = ab_even >> 32 | (cd_even & ~LOW);
            columns[3][j] = ab_odd >> 32 | (cd_odd & ~LOW);
        }
        for (int j = 0; j < FOURS; j++)
            for (int k = 0; k < 4; k++) to[4 * j + k][i] = columns[k][j];
    }
}

/* turned[j][i] = table[i][j]. */
void transposed_bf16(
    const bf16 *restrict table, bf16 *restrict turned, int64_t rows, int64_t columns
) {
#pragma omp parallel for if (rows * columns > MIN_PARALLEL) schedule(static)
    for (int64_t left = 0; left < columns; left += SQUARE) {
        int64_t width = columns - left < SQUARE ? columns - left : SQUARE;
        uint64_t from[SQUARE][FOURS] = {{0}}, to[SQUARE][FOURS];
        for (int64_t top = 0; top < rows; top += SQUARE) {
            int64_t height = rows - top < SQUARE ? rows - top : SQUARE;
            for (int64_t i = 0; i < height; i++)
                memcpy(from[i], table + (top + i) * columns + left, width * sizeof(bf16));
            turn_square(from, to);
            for (int64_t j = 0; j < width; j++)
                memcpy(turned + (left + j) * rows + top, to[j], height * sizeof(bf16));
        }
    }
}
