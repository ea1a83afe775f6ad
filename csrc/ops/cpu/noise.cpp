#include "engine/cpu.h"
#include "math/normal.h"
#include "math/random.h"
#include "ops/cpu/passes.h"

namespace samk {
namespace SAMK_ISA {
namespace {

constexpr int kCalls = 16;  // of philox, side by side
constexpr int kFilled = 4 * kCalls;

// The numbers of the elements from `first` on, a multiple of 4; note: [four neighbours] in random.h. Loops
// over the calls, each of which does one thing, are loops that compilers put into vectors.
void fill(const samk_noise_args& a, uint32_t number, int64_t first, float* to) {
  const auto seed_low = static_cast<uint32_t>(a.seed), seed_high = static_cast<uint32_t>(a.seed >> 32);
  uint32_t words[4][kCalls];
  float numbers[4][kCalls];
  for (int call = 0; call < kCalls; ++call) {
    const uint64_t four = static_cast<uint64_t>(first) / 4 + call;
    const Words x = philox(static_cast<uint32_t>(four), static_cast<uint32_t>(four >> 32), number, a.step,
                           seed_low, seed_high);
    words[0][call] = x.x0;
    words[1][call] = x.x1;
    words[2][call] = x.x2;
    words[3][call] = x.x3;
  }
  for (int pair = 0; pair < 4; pair += 2) {
    for (int call = 0; call < kCalls; ++call) {
      const Point at = normal_pair(words[pair][call], words[pair + 1][call]);
      numbers[pair][call] = at.x;
      numbers[pair + 1][call] = at.y;
    }
  }
  for (int call = 0; call < kCalls; ++call) {
    for (int k = 0; k < 4; ++k) to[4 * call + k] = numbers[k][call];
  }
}

// Sixteen numbers as the pack that a T is stored from.
template <class T>
SAMK_INLINE auto load_for(const float* x) {
  if constexpr (std::is_same<T, double>::value) {
    return F64::each([&](int i) { return static_cast<double>(x[i]); });
  } else {
    return load(x);
  }
}

}  // namespace

int noise(const samk_plan& plan, const samk_noise_args& a) {
  if (a.number == nullptr) return fail("noise_: the number of every tensor is needed");
  const bool large = exceeds_cache(plan.chunks.total() * dtype_bytes(a.out.dtype));
  return with_dtype("noise_", a.out.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_chunk(plan, [&](const Chunk& chunk, int64_t) {
      T* const out = element<T>(a.out, chunk.tensor, chunk.begin);
      if (out == nullptr) return;
      const bool streaming = large && can_stream(out);
      for (int64_t i = 0; i < chunk.size; i += kFilled) {
        alignas(64) float numbers[kFilled];
        fill(a, a.number[chunk.tensor], chunk.begin + i, numbers);
        sweep(std::min<int64_t>(kFilled, chunk.size - i),
              [&](int64_t at, auto part) { part.put(out + i + at, load_for<T>(numbers + at), streaming); });
      }
    });
    return 0;
  });
}

}  // namespace SAMK_ISA
}  // namespace samk
