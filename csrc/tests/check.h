// The smallest test kit that serves: a check that prints where it failed, a seeded generator, a pool.
#ifndef SAM_KERNELS_TESTS_CHECK_H_
#define SAM_KERNELS_TESTS_CHECK_H_

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "sam_kernels.h"

inline int failures = 0;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++failures;                                                         \
    }                                                                     \
  } while (0)

inline int finish(const char* name) {
  std::printf("%s: %s\n", name, failures == 0 ? "passed" : "FAILED");
  return failures == 0 ? 0 : 1;
}

// An empty tensor has no address, and memcmp may not be handed a null one.
inline bool same_bytes(const void* a, const void* b, size_t bytes) {
  return bytes == 0 || std::memcmp(a, b, bytes) == 0;
}

// SplitMix64; values in [-1, 1) that are never zero.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double next() {
    const double x = static_cast<double>(bits() >> 11) / 4503599627370496.0 - 1.0;
    return x == 0 ? 0.5 : x;
  }

 private:
  uint64_t state_;
};

// Stands in for torch's pool: `pool_threads` threads, one index range each.
inline uint32_t pool_threads = 1;

inline int32_t pool_parallel_for(int64_t begin, int64_t end, int64_t, samk_range_fn body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back(body, i, i + 1, context);
  for (auto& thread : threads) thread.join();
  return 0;
}

inline int32_t pool_num_threads(uint32_t* out) {
  *out = pool_threads;
  return 0;
}

#endif  // SAM_KERNELS_TESTS_CHECK_H_
