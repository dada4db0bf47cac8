/* Operators of a transformer block and a residual block, for processors.

   What MindSpore's CPU backend computes in one pass per elementary operation is one
   pass here. Every function at the end is an operator of `mindspore.ops.Custom`
   ("aot"): it is given its inputs and then its output, float32 and contiguous, with
   their shapes, and returns 0. Small inputs of an operator's own settings are arrays
   too, as an operator has no attributes.

   Rows are dealt out among threads. What is computed of a row does not depend on the
   thread, on how many there are, or on the other rows, so neither do results. Sums run
   in LANES partial sums, which a compiler may vectorize without reordering anything
   that is written here. Not a number stays not a number.                           */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_THREADS 256
#define LANES 32

static int threads = 1;

void set_threads(int count) {
  threads = count < 1 ? 1 : count > MOST_THREADS ? MOST_THREADS : count;
}

/* Rows among threads --------------------------------------------------------------- */

typedef void (*Rows)(const void *job, int64_t from, int64_t to);

typedef struct {
  Rows rows;
  const void *job;
  int64_t from, to;
} Share;

static void *take(void *given) {
  const Share *share = given;
  share->rows(share->job, share->from, share->to);
  return 0;
}

/* Threads are made anew each time: 20 us, and no pool that spins between operators. */
static int deal(Rows rows, const void *job, int64_t count) {
  pthread_t ids[MOST_THREADS];
  Share shares[MOST_THREADS];
  int runs[MOST_THREADS] = {0};
  int n = count < threads ? (int)count : threads;
  for (int i = 0; i < n; i++)
    shares[i] = (Share){rows, job, count * i / n, count * (i + 1) / n};
  for (int i = 1; i < n; i++)
    runs[i] = pthread_create(&ids[i], 0, take, &shares[i]) == 0;
  for (int i = 0; i < n; i++)
    if (!runs[i]) take(&shares[i]);
  for (int i = 1; i < n; i++)
    if (runs[i]) pthread_join(ids[i], 0);
  return 0;
}

static int64_t product(const int64_t *sizes, int count) {
  int64_t n = 1;
  for (int i = 0; i < count; i++) n *= sizes[i];
  return n;
}

/* Functions and sums --------------------------------------------------------------- */

static inline float within(float x, float least, float most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

/* erf as x P(x^2) / Q(x^2), within 5e-7; the coefficients are Eigen's. */
static inline float erf_of(float x) {
  x = within(x, -4.0f, 4.0f);
  float s = x * x;
  float p = -2.72614225801306e-10f;
  p = p * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  float q = -1.45660718464996e-05f;
  q = q * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}

/* e^x = 2^n e^r with |r| <= log(2) / 2 and the polynomial of Cephes for e^r, within
   2e-7 of it; exactly 0 below -87, where the result would be denormal. */
static inline float exp_of(float x) {
  float bounded = within(x, -87.0f, 88.0f);
  float shifted = bounded * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: n is rounded */
  float n = shifted - 12582912.0f;
  float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  float e = 1.9875691500e-4f;
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : e * power;
}

static inline float total(const float *lanes) {
  float sum = 0;
  for (int j = 0; j < LANES; j++) sum += lanes[j];
  return sum;
}

static float sum_of(const float *x, int64_t n) {
  float lanes[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) lanes[j] += x[i + j];
  for (int j = 0; i < n; i++, j++) lanes[j] += x[i];
  return total(lanes);
}

static float squares_of(const float *x, int64_t n, float mean) {
  float lanes[LANES] = {0};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++) {
      float d = x[i + j] - mean;
      lanes[j] += d * d;
    }
  for (int j = 0; i < n; i++, j++) lanes[j] += (x[i] - mean) * (x[i] - mean);
  return total(lanes);
}

static float most_of(const float *x, int64_t n) {
  float lanes[LANES];
  for (int j = 0; j < LANES; j++) lanes[j] = x[0];
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int j = 0; j < LANES; j++)
      lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  for (int j = 0; i < n; i++, j++) lanes[j] = x[i] > lanes[j] ? x[i] : lanes[j];
  float most = lanes[0];
  for (int j = 1; j < LANES; j++) most = lanes[j] > most ? lanes[j] : most;
  return most;
}

/* Operators ------------------------------------------------------------------------ */

#define OPERATOR(name)                                                       \
  int name(int count, void **arrays, int *ranks, int64_t **shapes,           \
           const char **types, void *stream, void *extra)

typedef struct {
  const float *x, *bias;
  float *y;
  int64_t width;
} Geglu;

static void geglu_rows(const void *job, int64_t from, int64_t to) {
  const Geglu g = *(const Geglu *)job;
  for (int64_t row = from; row < to; row++) {
    const float *value = g.x + 2 * g.width * row, *gate = value + g.width;
    float *restrict y = g.y + g.width * row;
    for (int64_t i = 0; i < g.width; i++) {
      float t = gate[i] + g.bias[g.width + i];
      float gelu = t * (0.5f + 0.5f * erf_of(t * 0.70710678f));
      y[i] = (value[i] + g.bias[i]) * gelu;
    }
  }
}

/* (..., 2 W), bias (2 W) -> (..., W): its first half times gelu of its second. */
OPERATOR(geglu) {
  int last = ranks[0] - 1;
  Geglu job = {arrays[0], arrays[1], arrays[2], shapes[0][last] / 2};
  return deal(geglu_rows, &job, product(shapes[0], last));
}

typedef struct {
  const float *x, *gamma, *beta;
  float *y;
  int64_t width;
  float eps;
} LayerNorm;

static void layer_norm_rows(const void *job, int64_t from, int64_t to) {
  const LayerNorm n = *(const LayerNorm *)job;
  for (int64_t row = from; row < to; row++) {
    const float *x = n.x + n.width * row;
    float *restrict y = n.y + n.width * row;
    float mean = sum_of(x, n.width) / n.width;
    float scale = 1.0f / sqrtf(squares_of(x, n.width, mean) / n.width + n.eps);
    for (int64_t i = 0; i < n.width; i++)
      y[i] = (x[i] - mean) * scale * n.gamma[i] + n.beta[i];
  }
}

/* (..., W), gamma (W), beta (W), (eps) -> (..., W). */
OPERATOR(layer_norm) {
  int last = ranks[0] - 1;
  const float *settings = arrays[3];
  LayerNorm job = {arrays[0], arrays[1],        arrays[2],
                   arrays[4], shapes[0][last], settings[0]};
  return deal(layer_norm_rows, &job, product(shapes[0], last));
}

typedef struct {
  const float *x, *gamma, *beta;
  float *y;
  int64_t groups, channels, area; /* channels of a group */
  float eps;
  int activated;
} GroupNorm;

static void group_norm_rows(const void *job, int64_t from, int64_t to) {
  const GroupNorm n = *(const GroupNorm *)job;
  int64_t size = n.channels * n.area;
  for (int64_t row = from; row < to; row++) {
    const float *x = n.x + size * row;
    float *restrict y = n.y + size * row;
    double sum = 0, squares = 0;
    for (int64_t c = 0; c < n.channels; c++) sum += sum_of(x + c * n.area, n.area);
    float mean = (float)(sum / size);
    for (int64_t c = 0; c < n.channels; c++)
      squares += squares_of(x + c * n.area, n.area, mean);
    float scale = 1.0f / sqrtf((float)(squares / size) + n.eps);
    for (int64_t c = 0; c < n.channels; c++) {
      int64_t channel = row % n.groups * n.channels + c, at = c * n.area;
      float gain = scale * n.gamma[channel], shift = n.beta[channel];
      if (n.activated)
        for (int64_t i = at; i < at + n.area; i++) {
          float t = (x[i] - mean) * gain + shift;
          y[i] = t / (1.0f + exp_of(-t));
        }
      else
        for (int64_t i = at; i < at + n.area; i++)
          y[i] = (x[i] - mean) * gain + shift;
    }
  }
}

static int group_norm_of(void **arrays, int rank, const int64_t *shape, int activated) {
  const float *settings = arrays[3];
  int64_t groups = (int64_t)settings[0];
  GroupNorm job = {arrays[0], arrays[1],          arrays[2],
                   arrays[4], groups,             shape[1] / groups,
                   product(shape + 2, rank - 2), settings[1], activated};
  return deal(group_norm_rows, &job, shape[0] * groups);
}

/* (B, C, ...), gamma (C), beta (C), (groups, eps) -> (B, C, ...). */
OPERATOR(group_norm) { return group_norm_of(arrays, ranks[0], shapes[0], 0); }

/* The same, and y * sigmoid(y) of it. */
OPERATOR(group_norm_silu) { return group_norm_of(arrays, ranks[0], shapes[0], 1); }

typedef struct {
  const float *x;
  float *y;
  int64_t width;
  float scale;
} Softmax;

static void softmax_rows(const void *job, int64_t from, int64_t to) {
  const Softmax s = *(const Softmax *)job;
  for (int64_t row = from; row < to; row++) {
    const float *x = s.x + s.width * row;
    float *restrict y = s.y + s.width * row;
    float most = most_of(x, s.width);
    for (int64_t i = 0; i < s.width; i++) y[i] = exp_of((x[i] - most) * s.scale);
    float share = 1.0f / sum_of(y, s.width);
    for (int64_t i = 0; i < s.width; i++) y[i] *= share;
  }
}

/* (..., W), (scale) -> (..., W): softmax of scale * x over the last axis, scale > 0. */
OPERATOR(softmax) {
  int last = ranks[0] - 1;
  const float *settings = arrays[1];
  Softmax job = {arrays[0], arrays[2], shapes[0][last], settings[0]};
  return deal(softmax_rows, &job, product(shapes[0], last));
}

typedef struct {
  const float *x;
  float *y;
  int64_t m, n, width;
} Swap;

/* (B, M, N, W) -> (B, N, M, W), a row being what has the same B and N. */
static void swapped_rows(const void *job, int64_t from, int64_t to) {
  const Swap s = *(const Swap *)job;
  for (int64_t row = from; row < to; row++) {
    const float *x = s.x + (row / s.n * s.m * s.n + row % s.n) * s.width;
    float *y = s.y + row * s.m * s.width;
    for (int64_t i = 0; i < s.m; i++)
      memcpy(y + i * s.width, x + i * s.n * s.width, s.width * sizeof *y);
  }
}

/* (B, L, heads * d) -> (B * heads, L, d). */
OPERATOR(split_heads) {
  int64_t heads = shapes[1][0] / shapes[0][0];
  Swap job = {arrays[0], arrays[1], shapes[1][1], heads, shapes[1][2]};
  return deal(swapped_rows, &job, shapes[1][0]);
}

/* (B * heads, L, d) -> (B, L, heads * d). */
OPERATOR(join_heads) {
  int64_t heads = shapes[0][0] / shapes[1][0];
  Swap job = {arrays[0], arrays[1], heads, shapes[0][1], shapes[0][2]};
  return deal(swapped_rows, &job, shapes[1][0] * shapes[1][1]);
}

/* Convolution ---------------------------------------------------------------------- */

/* MAPS of the output are summed at a time, at VECTORS vectors of WIDE places: as many as
   there are registers for. DEPTH channels are summed before their sum is added. */
#if defined(__AVX512F__)
enum { WIDE = 16, MAPS = 8, VECTORS = 2 };
#elif defined(__AVX__)
enum { WIDE = 8, MAPS = 4, VECTORS = 3 };
#else
enum { WIDE = 4, MAPS = 8, VECTORS = 2 };
#endif
enum { DEPTH = 64, UNIT_BYTES = 1 << 20, LEAST_BAND = 4 };

typedef float Vector __attribute__((vector_size(4 * WIDE), aligned(4)));

/* The work is units times blocks of MAPS maps. A unit is a band of an image's rows or,
   of small images, some whole ones; it is copied with a rim of zeros. `at` tells where
   in a padded band the vectors of places begin. */
typedef struct {
  const float *x, *weight, *bias, *added;
  float *y;
  int64_t images, channels, maps, height, width;
  int64_t bias_step; /* from an image's to the next one's; 0 if they share it */
  int64_t band, bands, together, blocks;
  int64_t pitch, plane, sums_plane, vectors, *at;
  _Atomic int *failed;
} Convolution;

/* Add the sums of a few channels' taps at one or some vectors of places. */
static inline __attribute__((always_inline)) void
sum_block(const Convolution *c, const float *x, const float *weight,
          int64_t channels, const int64_t *at, int vectors, float *sums) {
  int64_t step = c->channels * 9, pitch = c->pitch, plane = c->plane;
  Vector sum[MAPS][VECTORS];
  for (int o = 0; o < MAPS; o++)
    for (int v = 0; v < vectors; v++) sum[o][v] = (Vector){0};
  for (int64_t i = 0; i < channels; i++, x += plane)
    for (int row = 0; row < 3; row++)
      for (int column = 0; column < 3; column++, weight++) {
        Vector seen[VECTORS];
        for (int v = 0; v < vectors; v++)
          seen[v] = *(const Vector *)(x + row * pitch + column + at[v]);
        for (int o = 0; o < MAPS; o++)
          for (int v = 0; v < vectors; v++) sum[o][v] += seen[v] * weight[o * step];
      }
  for (int o = 0; o < MAPS; o++)
    for (int v = 0; v < vectors; v++)
      *(Vector *)(sums + o * c->sums_plane + at[v]) += sum[o][v];
}

/* Sum over channels and taps (C, 3, 3) for MAPS maps of a padded band: DEPTH channels
   after DEPTH channels, whose weights stay in the cache and whose sums round less. */
static void sum_taps(const Convolution *c, const float *x, const float *weight,
                     float *sums) {
  memset(sums, 0, MAPS * c->sums_plane * sizeof *sums);
  for (int64_t from = 0; from < c->channels; from += DEPTH) {
    int64_t to = from + DEPTH < c->channels ? from + DEPTH : c->channels;
    const float *here = x + from * c->plane, *taps = weight + from * 9;
    int64_t n = 0;
    for (; n + VECTORS <= c->vectors; n += VECTORS)
      sum_block(c, here, taps, to - from, c->at + n, VECTORS, sums);
    for (; n < c->vectors; n++) sum_block(c, here, taps, to - from, c->at + n, 1, sums);
  }
}

static void pad(const Convolution *c, int64_t image, int64_t top, float *padded) {
  for (int64_t i = 0; i < c->channels; i++)
    for (int64_t row = top - 1; row <= top + c->band; row++, padded += c->pitch) {
      memset(padded, 0, c->pitch * sizeof *padded);
      if (row < 0 || row >= c->height) continue;
      int64_t at = ((image * c->channels + i) * c->height + row) * c->width;
      memcpy(padded + 1, c->x + at, c->width * sizeof *padded);
    }
}

/* Write the maps of a block and a band: the sums, their bias and what is added. */
static void put(const Convolution *c, int64_t image, int64_t top, int64_t block,
                const float *sums) {
  int64_t bottom = top + c->band < c->height ? top + c->band : c->height;
  for (int64_t map = block * MAPS; map < (block + 1) * MAPS && map < c->maps; map++) {
    float bias = c->bias[image * c->bias_step + map];
    for (int64_t row = top; row < bottom; row++) {
      int64_t at = ((image * c->maps + map) * c->height + row) * c->width;
      const float *sum = sums + map % MAPS * c->sums_plane + (row - top) * c->pitch;
      float *restrict y = c->y + at;
      if (c->added)
        for (int64_t i = 0; i < c->width; i++) y[i] = sum[i] + bias + c->added[at + i];
      else
        for (int64_t i = 0; i < c->width; i++) y[i] = sum[i] + bias;
    }
  }
}

static void convolved(const void *job, int64_t from, int64_t to) {
  const Convolution *c = job;
  int64_t size = c->channels * c->plane, taps = c->channels * 9;
  float *padded = malloc((c->together * size + 2 * WIDE) * sizeof *padded);
  float *sums = malloc(MAPS * c->sums_plane * sizeof *sums);
  float *rest = calloc(MAPS * taps, sizeof *rest); /* a last block of fewer maps */
  if (!padded || !sums || !rest) *c->failed = 1;
  for (int64_t task = from, unit = -1; task < to && !*c->failed; task++) {
    int64_t block = task % c->blocks, left = c->maps - block * MAPS;
    int64_t first = task / c->blocks / c->bands * c->together;
    int64_t top = task / c->blocks % c->bands * c->band;
    int64_t n = c->images - first < c->together ? c->images - first : c->together;
    if (unit != task / c->blocks)
      for (int64_t i = 0; i < n; i++) pad(c, first + i, top, padded + i * size);
    unit = task / c->blocks;
    const float *weight = c->weight + block * MAPS * taps;
    if (left < MAPS) weight = memcpy(rest, weight, left * taps * sizeof *rest);
    for (int64_t i = 0; i < n; i++) {
      sum_taps(c, padded + i * size, weight, sums);
      put(c, first + i, top, block, sums);
    }
  }
  free(padded);
  free(sums);
  free(rest);
}

/* Part the work, so that a padded unit stays in a core's cache. */
static void part(Convolution *c) {
  int64_t row = c->channels * (c->width + 2) * (int64_t)sizeof(float);
  int64_t band = UNIT_BYTES / row - 2;
  if (band < LEAST_BAND) band = LEAST_BAND;
  c->bands = (c->height + band - 1) / band;
  c->band = (c->height + c->bands - 1) / c->bands;
  c->together = c->bands > 1 ? 1 : UNIT_BYTES / (row * (c->band + 2));
  if (c->together < 1) c->together = 1;
  int64_t units = (c->images + c->together - 1) / c->together;
  c->together = (c->images + units - 1) / units;
  c->blocks = (c->maps + MAPS - 1) / MAPS;
  c->pitch = c->width + 2;
  c->plane = (c->band + 2) * c->pitch;
  c->sums_plane = c->band * c->pitch + WIDE;
}

/* Begin a vector at every WIDE columns of a row or, where rows are no multiple of it,
   at every WIDE places of the padded band: some lie on the rim, for nothing. */
static void place(Convolution *c) {
  int64_t n = 0, aligned = c->width % WIDE == 0;
  int64_t places = aligned ? c->band * c->width : c->band * c->pitch - 2;
  for (int64_t i = 0; i < places; i += WIDE)
    c->at[n++] = aligned ? i / c->width * c->pitch + i % c->width : i;
  c->vectors = n;
}

static int convolve_of(void **arrays, const int *ranks, int64_t **shapes, int adds) {
  const int64_t *x = shapes[0];
  _Atomic int failed = 0;
  Convolution c = {.x = arrays[0], .weight = arrays[1], .bias = arrays[2]};
  c.added = adds ? arrays[3] : 0;
  c.y = arrays[3 + adds];
  c.images = x[0], c.channels = x[1], c.height = x[2], c.width = x[3];
  c.maps = shapes[1][0];
  c.bias_step = product(shapes[2], ranks[2]) == c.maps ? 0 : c.maps;
  c.failed = &failed;
  part(&c);
  c.at = malloc((c.sums_plane / WIDE + 1) * sizeof *c.at);
  if (!c.at) return 1;
  place(&c);
  int64_t units = (c.images + c.together - 1) / c.together * c.bands;
  deal(convolved, &c, units * c.blocks);
  free(c.at);
  return failed;
}

/* (B, C, H, W), weight (O, C, 3, 3), bias (O) or (B, O) -> (B, O, H, W), rim of 0. */
OPERATOR(convolve) { return convolve_of(arrays, ranks, shapes, 0); }

/* The same, and (B, O, H, W) added to it. */
OPERATOR(convolve_add) { return convolve_of(arrays, ranks, shapes, 1); }
