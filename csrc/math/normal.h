// Standard normal numbers from random words: the same bits everywhere.
//
// note: [the same normal numbers everywhere]
// Library logarithms, sines and cosines differ by a bit between a CPU, a GPU and two versions of either.
// These consist of fp32 additions, multiplications, divisions and square roots, each rounded once and none
// fused (-ffp-contract=off, -fmad=false), which IEEE 754 defines to the bit. Every engine spells them in this
// order.
#ifndef SAM_KERNELS_MATH_NORMAL_H_
#define SAM_KERNELS_MATH_NORMAL_H_

#include <cmath>
#include <cstdint>

#include "core/half.h"
#include "core/hd.h"
#include "core/lane.h"

namespace samk {

// ln(k / 2^24) of whole numbers k in 1 ... 2^24.
SAMK_HD float logarithm(uint32_t k) {
  // k = 2^exponent * mantissa, the mantissa between sqrt(1/2) and sqrt(2), where the series is short.
  const auto bits = static_cast<int32_t>(float_to_bits(static_cast<float>(k)));
  const int32_t fraction = bits & 0x7fffff;
  const int32_t is_high = fraction >= 0x3504f3;  // mantissas from 1.4142135 on
  // One less in the exponent is the half of a mantissa, without a choice between floats.
  const float mantissa = bits_to_float(static_cast<uint32_t>((fraction | 0x3f800000) - (is_high << 23)));
  const float exponent = static_cast<float>((bits >> 23) - 127 + is_high - 24);
  const float t = mantissa - 1.0f;
  const float s = t / (t + 2.0f);
  const float square = s * s;
  float series = square * static_cast<float>(2.0 / 9) + static_cast<float>(2.0 / 7);
  series = series * square + static_cast<float>(2.0 / 5);
  series = series * square + static_cast<float>(2.0 / 3);
  series = series * square + 2.0f;
  return exponent * static_cast<float>(0.6931471805599453) + s * series;
}

// cos and sin of 2 pi h / 2^24, of whole numbers h in 0 ... 2^24 - 1.
SAMK_HD Point circle(uint32_t h) {
  // The nearest quarter turn, and the steps from there: at most an eighth of a turn, so exact in fp32.
  const uint32_t turned = h + (1u << 21);
  const uint32_t quadrant = turned >> 22 & 3u;
  const auto steps = static_cast<int32_t>(turned & ((1u << 22) - 1)) - (1 << 21);
  const float angle = static_cast<float>(steps) * static_cast<float>(1.5707963267948966 / (1 << 22));
  const float square = angle * angle;
  float sine = square * static_cast<float>(1.0 / 362880) - static_cast<float>(1.0 / 5040);
  sine = sine * square + static_cast<float>(1.0 / 120);
  sine = sine * square - static_cast<float>(1.0 / 6);
  sine = sine * square * angle + angle;
  float cosine = square * static_cast<float>(1.0 / 40320) - static_cast<float>(1.0 / 720);
  cosine = cosine * square + static_cast<float>(1.0 / 24);
  cosine = cosine * square - 0.5f;
  cosine = cosine * square + 1.0f;
  const bool is_odd = (quadrant & 1u) != 0;
  const float x = is_odd ? sine : cosine, y = is_odd ? cosine : sine;
  return {((quadrant + 1) & 2u) != 0 ? -x : x, quadrant >= 2 ? -y : y};
}

// Two standard normal numbers from two random words, by the method of Box and Muller.
SAMK_HD Point normal_pair(uint32_t a, uint32_t b) {
  const float radius = std::sqrt(logarithm((a >> 8) + 1) * -2.0f);
  const Point at = circle(b >> 8);
  return {radius * at.x, radius * at.y};
}

}  // namespace samk

#endif  // SAM_KERNELS_MATH_NORMAL_H_
