/* Softmax attention over a tree of rows of tokens that lie end to end in one table, with rotary
   positions. A token attends to its own row up to itself and to all of the rows before its row.

   Per key head, with q and k rotated, q times D^-1/2:
       s = q k^T,  p = exp(s - log_sum),  o = p v
       dv = p^T do,  ds = p (do v^T - sum(do o)),  dq = ds k D^-1/2,  dk = ds^T q
   Keys and values are widened once, in panels of PANEL positions of one row (the last padded with
   zeros); a block of queries, with all query heads of a key head, goes over blocks of its keys.

   queries [N, H D], keys and values [N, K D], cos and sin [N, D] in T, or cos NULL where positions
   are applied already. */

#ifndef GMPO_TREE
#define GMPO_TREE

#include "products.h"

/* Keys that a block of queries meets at a time. */
#define KEY_BLOCK 128

typedef struct {
    int64_t first_panel, length, parent;
} TreeRow;

typedef struct {
    int64_t row, offset, first, count; /* first token in its row and in the table */
} QueryBlock;

typedef struct {
    int64_t first, count;
} Panel;

/* As attention.py lays it out in one table of integers. Positions of the first shared_panels get
   their gradients from several parts. */
typedef struct {
    int64_t rows, blocks, panels, shared_panels, parts, block_rows, key_heads, group, head_size, wide;
    const TreeRow *row;
    const QueryBlock *block;
    const Panel *panel;
    const int64_t *part; /* first block of each part, and the end */
} Tree;

static Tree tree_of(const int64_t *plan) {
    Tree tree = {plan[0], plan[1], plan[2], plan[3], plan[4], plan[5], plan[6], plan[7], plan[8], plan[9],
                 NULL, NULL, NULL, NULL};
    const int64_t *next = plan + 10;
    tree.row = (const TreeRow *)next, next += 3 * tree.rows;
    tree.block = (const QueryBlock *)next, next += 4 * tree.blocks;
    tree.panel = (const Panel *)next, next += 2 * tree.panels;
    tree.part = next;
    return tree;
}

/* Where a lane keeps its block: queries, results, gradients [block_rows, wide] each, scores and
   slopes [block_rows, KEY_BLOCK] each, three numbers a row. */
typedef struct {
    float *queries, *results, *gradients, *scores, *slopes, *maxima, *masses, *means;
} Bench;

static Bench bench_of(float *work, int64_t lane, const Tree *tree) {
    int64_t wide = tree->block_rows * tree->wide, scores = tree->block_rows * KEY_BLOCK;
    float *next = work + lane * (3 * wide + 2 * scores + 3 * tree->block_rows);
    Bench bench = {next, next + wide, next + 2 * wide, next + 3 * wide, next + 3 * wide + scores};
    bench.maxima = bench.slopes + scores;
    bench.masses = bench.maxima + tree->block_rows;
    bench.means = bench.masses + tree->block_rows;
    return bench;
}

/* Keys of a row that block row i may attend to, counted from `start`. */
static inline int64_t allowed_keys(
    const Tree *tree, const QueryBlock *block, int64_t row, int64_t start, int64_t columns, int64_t i
) {
    int64_t end = row == block->row ? block->offset + i / tree->group + 1 : tree->row[row].length;
    int64_t allowed = end - start;
    return allowed < 0 ? 0 : (allowed < columns ? allowed : columns);
}

/* Keys of a row that any token of the block attends to. */
static inline int64_t seen_keys(const Tree *tree, const QueryBlock *block, int64_t row) {
    return row == block->row ? block->offset + block->count : tree->row[row].length;
}

static inline int64_t block_columns(int64_t seen, int64_t start) {
    int64_t left = padded_to(seen - start, PANEL);
    return left < KEY_BLOCK ? left : KEY_BLOCK;
}

static inline void turn_panel(const float *restrict rows, float *restrict panel, int64_t wide) {
    for (int64_t d = 0; d < wide; d++)
        for (int64_t t = 0; t < PANEL; t++) panel[d * PANEL + t] = rows[t * wide + d];
}

static inline int64_t taken(int64_t *next) {
    int64_t mine;
#pragma omp atomic capture
    mine = (*next)++;
    return mine;
}

/* Results of a block against one row's keys: online softmax. */
static void attend_row(
    const Tree *tree, const QueryBlock *block, int64_t row, const float *key_panels, const float *value_rows,
    Bench to
) {
    int64_t wide = tree->wide, queries = block->count * tree->group;
    int64_t seen = seen_keys(tree, block, row), first = tree->row[row].first_panel * PANEL;
    for (int64_t start = 0; start < seen; start += KEY_BLOCK) {
        int64_t columns = block_columns(seen, start), from = (first + start) * wide;
        Left rotated = {to.queries, wide, 1}, probabilities = {to.scores, KEY_BLOCK, 1};
        Right keys = {key_panels + from, PANEL * wide, PANEL}, values = {value_rows + from, PANEL, wide};
        product(rotated, keys, to.scores, KEY_BLOCK, queries, columns, wide, 0);
        for (int64_t i = 0; i < queries; i++) {
            float *scores = to.scores + i * KEY_BLOCK, *result = to.results + i * wide;
            int64_t allowed = allowed_keys(tree, block, row, start, columns, i);
            if (!allowed) {
                memset(scores, 0, columns * sizeof(float));
                continue;
            }
            float shrunk = softmax_step(scores, allowed, columns, to.maxima + i, to.masses + i);
            for (int64_t d = 0; d < wide; d++) result[d] *= shrunk;
        }
        product(probabilities, values, to.results, wide, queries, wide, columns, 1);
    }
}

/* Gradients of a block's queries, added to to.results, and of one row's keys and values. */
static void attend_row_backward(
    const Tree *tree, const QueryBlock *block, int64_t row, const float *key_rows, const float *key_panels,
    const float *value_panels, float *by_keys, float *by_values, Bench to
) {
    int64_t wide = tree->wide, queries = block->count * tree->group;
    int64_t seen = seen_keys(tree, block, row), first = tree->row[row].first_panel * PANEL;
    for (int64_t start = 0; start < seen; start += KEY_BLOCK) {
        int64_t columns = block_columns(seen, start), from = (first + start) * wide;
        Left rotated = {to.queries, wide, 1}, gradients = {to.gradients, wide, 1};
        Left slopes = {to.slopes, KEY_BLOCK, 1}, turned = {to.slopes, 1, KEY_BLOCK};
        Left probabilities = {to.scores, 1, KEY_BLOCK};
        Right panels = {key_panels + from, PANEL * wide, PANEL}, values = {value_panels + from, PANEL * wide, PANEL};
        Right keys = {key_rows + from, PANEL, wide};
        Right by_results = {to.gradients, PANEL, wide}, by_scores = {to.queries, PANEL, wide};
        product(rotated, panels, to.scores, KEY_BLOCK, queries, columns, wide, 0);
        product(gradients, values, to.slopes, KEY_BLOCK, queries, columns, wide, 0);
        for (int64_t i = 0; i < queries; i++) {
            int64_t at = i * KEY_BLOCK, allowed = allowed_keys(tree, block, row, start, columns, i);
            softmax_slopes(to.scores + at, to.slopes + at, allowed, columns, to.maxima[i], to.means[i]);
        }
        product(slopes, keys, to.results, wide, queries, wide, columns, 1);
        product(turned, by_scores, by_keys + start * wide, wide, columns, wide, queries, 1);
        product(probabilities, by_results, by_values + start * wide, wide, columns, wide, queries, 1);
    }
}

#endif

/* A head with its position applied, rounded where torch's operations round. */
static inline void NAME(rotated_head)(
    const T *restrict x, const T *restrict cos, const T *restrict sin, float *restrict y, int64_t size,
    int64_t wide, float factor
) {
    int64_t half = size / 2;
    for (int64_t d = size; d < wide; d++) y[d] = 0.0f;
    if (!cos) {
        for (int64_t d = 0; d < size; d++) y[d] = WIDE(x[d]) * factor;
        return;
    }
#pragma omp simd
    for (int64_t d = 0; d < half; d++) {
        float first = WIDE(x[d]), second = WIDE(x[half + d]);
        float kept = WIDE(NARROW(first * WIDE(cos[d]))), other = WIDE(NARROW(second * WIDE(cos[half + d])));
        y[d] = WIDE(NARROW(kept - second * WIDE(sin[d]))) * factor;
        y[half + d] = WIDE(NARROW(other + first * WIDE(sin[half + d]))) * factor;
    }
}

/* The gradient of the head before its position was applied: g cos - R g sin. */
static inline void NAME(turned_back)(
    const float *restrict g, const T *restrict cos, const T *restrict sin, T *restrict y, int64_t size,
    float factor
) {
    int64_t half = size / 2;
    if (!cos) {
        for (int64_t d = 0; d < size; d++) y[d] = NARROW(g[d] * factor);
        return;
    }
#pragma omp simd
    for (int64_t d = 0; d < half; d++) {
        float first = g[d] * factor, second = g[half + d] * factor;
        y[d] = NARROW(first * WIDE(cos[d]) + second * WIDE(sin[d]));
        y[half + d] = NARROW(second * WIDE(cos[half + d]) - first * WIDE(sin[half + d]));
    }
}

/* Keys and values in fp32: rows [K, panels * PANEL, wide] of both, and panels [K, panels, wide,
   PANEL] of those asked for. */
static void NAME(widen_keys)(
    const T *keys, const T *values, const T *cos, const T *sin, float *key_rows, float *key_panels,
    float *value_rows, float *value_panels, const Tree *tree
) {
    int64_t size = tree->head_size, wide = tree->wide, heads = tree->key_heads;
#pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < heads * tree->panels; at++) {
        int64_t head = at / tree->panels, to = at * PANEL * wide;
        Panel panel = tree->panel[at % tree->panels];
        for (int64_t t = 0; t < PANEL; t++) {
            float *key = key_rows + to + t * wide, *value = value_rows + to + t * wide;
            if (t >= panel.count) {
                memset(key, 0, wide * sizeof(float));
                memset(value, 0, wide * sizeof(float));
                continue;
            }
            int64_t token = panel.first + t, from = (token * heads + head) * size;
            NAME(rotated_head)(
                keys + from, cos ? cos + token * size : NULL, sin ? sin + token * size : NULL, key, size, wide, 1.0f
            );
            NAME(rotated_head)(values + from, NULL, NULL, value, size, wide, 1.0f);
        }
        turn_panel(key_rows + to, key_panels + to, wide);
        if (value_panels) turn_panel(value_rows + to, value_panels + to, wide);
    }
}

/* The block's queries of one key head, rotated and scaled; the rows of the last tile are filled. */
static void NAME(take_queries)(
    const T *queries, const T *cos, const T *sin, const QueryBlock *block, int64_t head, const Tree *tree, Bench to
) {
    int64_t size = tree->head_size, wide = tree->wide, group = tree->group, count = block->count * group;
    float scale = 1.0f / sqrtf((float)size);
    for (int64_t i = 0; i < count; i++) {
        int64_t token = block->first + i / group;
        const T *from = queries + ((token * tree->key_heads + head) * group + i % group) * size;
        NAME(rotated_head)(
            from, cos ? cos + token * size : NULL, sin ? sin + token * size : NULL, to.queries + i * wide, size,
            wide, scale
        );
    }
    int64_t filled = padded_to(count, TILE_ROWS);
    memset(to.queries + count * wide, 0, (filled - count) * wide * sizeof(float));
    memset(to.results, 0, filled * wide * sizeof(float));
}

/* attended [N, H D], log_sums [K, N, H / K]: log of each query's sum of exponents. Scratch: rows and
   panels as in widen_keys, work for each lane. */
void NAME(attend)(
    const T *queries, const T *keys, const T *values, const T *cos, const T *sin, T *attended, float *log_sums,
    float *key_rows, float *key_panels, float *value_rows, float *work, const int64_t *plan, int64_t tokens,
    int64_t num_lanes
) {
    Tree tree = tree_of(plan);
    int64_t size = tree.head_size, wide = tree.wide, group = tree.group, per_head = tree.panels * PANEL * wide;
    int64_t next = 0;
    NAME(widen_keys)(keys, values, cos, sin, key_rows, key_panels, value_rows, NULL, &tree);
#pragma omp parallel for schedule(static, 1)
    for (int64_t lane = 0; lane < num_lanes; lane++) {
        Bench to = bench_of(work, lane, &tree);
        /* Later blocks see more: they come first. */
        for (int64_t at; (at = taken(&next)) < tree.blocks * tree.key_heads;) {
            int64_t head = at % tree.key_heads;
            const QueryBlock *block = tree.block + tree.blocks - 1 - at / tree.key_heads;
            int64_t count = block->count * group;
            NAME(take_queries)(queries, cos, sin, block, head, &tree, to);
            for (int64_t i = 0; i < count; i++) to.maxima[i] = -INFINITY, to.masses[i] = 0.0f;
            for (int64_t row = block->row; row >= 0; row = tree.row[row].parent)
                attend_row(&tree, block, row, key_panels + head * per_head, value_rows + head * per_head, to);
            for (int64_t i = 0; i < count; i++) {
                int64_t token = block->first + i / group;
                T *out = attended + ((token * tree.key_heads + head) * group + i % group) * size;
                for (int64_t d = 0; d < size; d++) out[d] = NARROW(to.results[i * wide + d] / to.masses[i]);
                log_sums[(head * tokens + block->first) * group + i] = to.maxima[i] + logf(to.masses[i]);
            }
        }
    }
}

/* Gradients of the results, their mean over each query's keys, and its log-sum. */
static void NAME(take_gradients)(
    const T *gradient, const T *attended, const float *log_sums, const QueryBlock *block, int64_t head,
    const Tree *tree, Bench to
) {
    int64_t size = tree->head_size, wide = tree->wide, group = tree->group, count = block->count * group;
    for (int64_t i = 0; i < count; i++) {
        int64_t token = block->first + i / group, from = ((token * tree->key_heads + head) * group + i % group) * size;
        float mean = 0.0f, *out = to.gradients + i * wide;
        for (int64_t d = size; d < wide; d++) out[d] = 0.0f;
#pragma omp simd reduction(+ : mean)
        for (int64_t d = 0; d < size; d++) {
            out[d] = WIDE(gradient[from + d]);
            mean += out[d] * WIDE(attended[from + d]);
        }
        to.means[i] = mean;
        to.maxima[i] = log_sums[i];
    }
    memset(to.gradients + count * wide, 0, (padded_to(count, TILE_ROWS) - count) * wide * sizeof(float));
}

/* Gradients of keys and values from the sums of all parts, in the parts' order. */
static void NAME(add_parts)(
    const float *by_key_rows, const float *by_value_rows, const T *cos, const T *sin, T *by_keys, T *by_values,
    const Tree *tree
) {
    int64_t size = tree->head_size, wide = tree->wide, heads = tree->key_heads;
    int64_t shared = tree->shared_panels * PANEL, own = tree->panels * PANEL - shared;
    int64_t per_head = (tree->parts * shared + own) * wide;
#pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < heads * tree->panels; at++) {
        int64_t head = at / tree->panels, number = at % tree->panels;
        Panel panel = tree->panel[number];
        int is_shared = number < tree->shared_panels;
        for (int64_t t = 0; t < panel.count; t++) {
            int64_t token = panel.first + t, to = (token * heads + head) * size, place = number * PANEL + t;
            float *of[2] = {(float *)by_key_rows + head * per_head, (float *)by_value_rows + head * per_head};
            for (int which = 0; which < 2; which++) {
                float *first = of[which] + (is_shared ? place : (tree->parts - 1) * shared + place) * wide;
                for (int64_t part = 1; is_shared && part < tree->parts; part++)
                    for (int64_t d = 0; d < size; d++) first[d] += first[part * shared * wide + d];
                of[which] = first;
            }
            NAME(turned_back)(
                of[0], cos ? cos + token * size : NULL, sin ? sin + token * size : NULL, by_keys + to, size, 1.0f
            );
            NAME(turned_back)(of[1], NULL, NULL, by_values + to, size, 1.0f);
        }
    }
}

/* Scratch beside that of attend: value_panels; by_rows, zeros, for keys and values [2, K, parts *
   shared + own, wide]. */
void NAME(attend_backward)(
    const T *gradient, const T *attended, const T *queries, const T *keys, const T *values, const T *cos,
    const T *sin, const float *log_sums, T *by_queries, T *by_keys, T *by_values, float *key_rows,
    float *key_panels, float *value_rows, float *value_panels, float *by_rows, float *work, const int64_t *plan,
    int64_t tokens, int64_t num_lanes
) {
    Tree tree = tree_of(plan);
    int64_t size = tree.head_size, wide = tree.wide, group = tree.group, per_head = tree.panels * PANEL * wide;
    int64_t shared = tree.shared_panels * PANEL, sums = (tree.parts * shared + tree.panels * PANEL - shared) * wide;
    int64_t next = 0;
    float scale = 1.0f / sqrtf((float)size), *by_value_rows = by_rows + tree.key_heads * sums;
    NAME(widen_keys)(keys, values, cos, sin, key_rows, key_panels, value_rows, value_panels, &tree);
#pragma omp parallel for schedule(static, 1)
    for (int64_t lane = 0; lane < num_lanes; lane++) {
        Bench to = bench_of(work, lane, &tree);
        for (int64_t at; (at = taken(&next)) < tree.parts * tree.key_heads;) {
            int64_t head = at % tree.key_heads, part = tree.parts - 1 - at / tree.key_heads;
            for (int64_t number = tree.part[part]; number < tree.part[part + 1]; number++) {
                const QueryBlock *block = tree.block + number;
                NAME(take_queries)(queries, cos, sin, block, head, &tree, to);
                NAME(take_gradients)(
                    gradient, attended, log_sums + (head * tokens + block->first) * group, block, head, &tree, to
                );
                for (int64_t row = block->row; row >= 0; row = tree.row[row].parent) {
                    int64_t place = tree.row[row].first_panel * PANEL;
                    int64_t sum = head * sums + (place + (place < shared ? part : tree.parts - 1) * shared) * wide;
                    attend_row_backward(
                        &tree, block, row, key_rows + head * per_head, key_panels + head * per_head,
                        value_panels + head * per_head, by_rows + sum, by_value_rows + sum, to
                    );
                }
                for (int64_t i = 0; i < block->count * group; i++) {
                    int64_t token = block->first + i / group;
                    NAME(turned_back)(
                        to.results + i * wide, cos ? cos + token * size : NULL, sin ? sin + token * size : NULL,
                        by_queries + ((token * tree.key_heads + head) * group + i % group) * size, size, scale
                    );
                }
            }
        }
    }
    NAME(add_parts)(by_rows, by_value_rows, cos, sin, by_keys, by_values, &tree);
}
