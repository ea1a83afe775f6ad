#include <cmath>
#include <cstring>

#include "core/pack.h"
#include "tests/check.h"

namespace {

using samk::bf16;
using samk::f16;
using samk::to_float;

// The nearest value of a grid by search in double: knows nothing of bit tricks. Ties go to even bits.
template <class Half, class Narrow>
uint16_t nearest(double x, Narrow decode, uint16_t infinity) {
  uint16_t low = 0, high = infinity;  // bit patterns of non-negative halves grow with their value
  const double magnitude = std::fabs(x);
  while (high - low > 1) {
    const uint16_t middle = static_cast<uint16_t>((low + high) / 2);
    (decode(Half{middle}) <= magnitude ? low : high) = middle;
  }
  const double below = decode(Half{low});
  // The step past the largest finite value is as wide as the one before it.
  const double above = high == infinity ? below + (below - decode(Half{static_cast<uint16_t>(low - 1)}))
                                        : static_cast<double>(decode(Half{high}));
  const double to_low = magnitude - below, to_high = above - magnitude;
  const uint16_t picked = to_low < to_high ? low : to_high < to_low ? high : (low % 2 == 0 ? low : high);
  return static_cast<uint16_t>(picked | (std::signbit(x) ? 0x8000u : 0u));
}

template <class Half, class To>
void check_half(To to_half, uint16_t infinity) {
  const auto decode = [](Half h) { return to_float(h); };
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half h{static_cast<uint16_t>(bits)};
    const float value = to_float(h);
    if (std::isnan(value)) {
      CHECK(std::isnan(to_float(to_half(value))));
    } else {
      CHECK(to_half(value).bits == h.bits);
    }
  }
  Random random(7);
  for (int i = 0; i < 200000; ++i) {
    // All magnitudes of float, subnormals and overflows included.
    float x;
    const uint32_t bits = static_cast<uint32_t>(random.bits());
    std::memcpy(&x, &bits, sizeof x);
    if (std::isnan(x)) continue;
    const uint16_t expected = std::isinf(x)
                                  ? static_cast<uint16_t>(infinity | (std::signbit(x) ? 0x8000u : 0u))
                                  : nearest<Half>(x, decode, infinity);
    CHECK(to_half(x).bits == expected);
  }
}

// The packs of this build against the scalar conversions, whole and with every rounding case.
void check_packs() {
  Random random(11);
  using namespace samk;
  using namespace samk::SAMK_ISA;
  for (int round = 0; round < 20000; ++round) {
    float in[16];
    bf16 b[16];
    f16 h[16];
    for (float& x : in) {
      const uint32_t bits = static_cast<uint32_t>(random.bits());
      std::memcpy(&x, &bits, sizeof x);
    }
    store(b, load(static_cast<const float*>(in)));
    store(h, load(static_cast<const float*>(in)));
    for (int i = 0; i < 16; ++i) {
      CHECK(b[i].bits == to_bf16(in[i]).bits);
      CHECK(h[i].bits == to_f16(in[i]).bits);
    }
  }
}

}  // namespace

int main() {
  check_half<bf16>([](float x) { return samk::to_bf16(x); }, 0x7f80);
  check_half<f16>([](float x) { return samk::to_f16(x); }, 0x7c00);
  check_packs();
  return finish("conversions_test");
}
