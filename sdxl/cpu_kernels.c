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
