// What a selection of masks ranks; note: [ranks] in sam_kernels.h. Ranks are below 2^31, so that they compare
// alike with and without a sign.
#ifndef SAM_KERNELS_MATH_RANK_H_
#define SAM_KERNELS_MATH_RANK_H_

#include <cstdint>

#include "core/half.h"
#include "core/hd.h"

namespace samk {

// The bits of |score|, which order like |score| itself; one rank above infinity for every NaN.
SAMK_HD int32_t rank_of(float score) {
  const uint32_t size = float_to_bits(score) & 0x7fffffffu;
  return static_cast<int32_t>(size > 0x7f800000u ? 0x7f800001u : size);
}

// Of a random word; see random.h.
SAMK_HD int32_t rank_of_word(uint32_t word) { return static_cast<int32_t>(word >> 1); }

// What stands for one element among those at the threshold: the larger first, and of equals the one that
// comes first. 20 bits of the rank and 43 of the position fit.
SAMK_HD int64_t candidate_of(int32_t rank, int32_t shift, int64_t position) {
  const uint64_t low = static_cast<uint64_t>(rank) & ((uint64_t{1} << shift) - 1);
  return static_cast<int64_t>(low << 43 | ((uint64_t{1} << 43) - 1 - static_cast<uint64_t>(position)));
}

// score + g^2
template <class V>
SAMK_HD V add_square(V score, V g) {
  return fma(g, g, score);
}

}  // namespace samk

#endif  // SAM_KERNELS_MATH_RANK_H_
