// The fastest plain loops we know of: the rooflines that passes are held against.
// Streaming stores do not read what they overwrite; torch's copy does, so it is no roofline.
// More reads than writes go faster than a copy, so each mix of reads and writes has its own loop.
#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vec;
#define LANES 16
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, x) _mm512_storeu_ps(p, x)
#define STREAM(p, x) _mm512_stream_ps(p, x)
#define ADD(a, b) _mm512_add_ps(a, b)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define SET(x) _mm512_set1_ps(x)
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
typedef __m256 vec;
#define LANES 8
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, x) _mm256_storeu_ps(p, x)
#define STREAM(p, x) _mm256_stream_ps(p, x)
#define ADD(a, b) _mm256_add_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define SET(x) _mm256_set1_ps(x)
#else
typedef float vec;
#define LANES 1
#define LOAD(p) (*(p))
#define STORE(p, x) (*(p) = (x))
#define STREAM(p, x) (*(p) = (x))
#define ADD(a, b) ((a) + (b))
#define FMA(a, b, c) ((a) * (b) + (c))
#define SET(x) (x)
#endif

// n is a multiple of 64 and destinations are aligned to 64 bytes: the caller cuts its ranges so.

double stream_sum(const float* x, int64_t n) {
  vec sums[4] = {SET(0.0f), SET(0.0f), SET(0.0f), SET(0.0f)};
  for (int64_t i = 0; i < n; i += 4 * LANES)
    for (int k = 0; k < 4; ++k) sums[k] = ADD(sums[k], LOAD(x + i + k * LANES));
  vec total = ADD(ADD(sums[0], sums[1]), ADD(sums[2], sums[3]));
  const float* lanes = (const float*)&total;
  double sum = 0.0;
  for (int k = 0; k < LANES; ++k) sum += lanes[k];
  return sum;
}

void stream_copy(float* out, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) STREAM(out + i, LOAD(x + i));
}

void stream_triad(float* out, const float* x, const float* y, float a, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) STREAM(out + i, FMA(SET(a), LOAD(y + i), LOAD(x + i)));
}

// Three reads, one write.
void stream_sum3(float* out, const float* x, const float* y, const float* z, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) STREAM(out + i, ADD(ADD(LOAD(x + i), LOAD(y + i)), LOAD(z + i)));
}

// Two reads, two writes, one of them in place.
void stream_save_update(float* w, const float* g, float* saved, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    vec x = LOAD(w + i);
    STREAM(saved + i, x);
    STORE(w + i, ADD(x, LOAD(g + i)));
  }
}

// Three reads, two writes, one of them in place.
void stream_update1(float* w, const float* g, const float* saved, float* m, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    vec x = FMA(SET(0.5f), LOAD(m + i), LOAD(g + i));
    STORE(m + i, x);
    STREAM(w + i, ADD(LOAD(saved + i), x));
  }
}

// Four reads, three writes, two of them in place.
void stream_update2(float* w, const float* g, const float* saved, float* m, float* v, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    vec y = LOAD(g + i), a = FMA(SET(0.5f), LOAD(m + i), y), b = FMA(SET(0.5f), LOAD(v + i), y);
    STORE(m + i, a);
    STORE(v + i, b);
    STREAM(w + i, ADD(LOAD(saved + i), ADD(a, b)));
  }
}
