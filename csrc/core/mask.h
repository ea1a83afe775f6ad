// Words of masks, note: [masks] in sam_kernels.h: element i is bit i % 64 of word i / 64.
#ifndef SAM_KERNELS_CORE_MASK_H_
#define SAM_KERNELS_CORE_MASK_H_

#include <cstdint>

#include "core/hd.h"

namespace samk {

constexpr int kWordBits = 64;

SAMK_HD int64_t word_count(int64_t elements) { return (elements + kWordBits - 1) / kWordBits; }

SAMK_HD bool has_bit(const uint64_t* words, int64_t i) {
  return (words[i / kWordBits] >> (i % kWordBits) & 1) != 0;
}

// n ones from bit 0 up, n from 0 on; all of them from 64 on.
SAMK_HD uint64_t low_bits(int64_t n) { return n >= kWordBits ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

}  // namespace samk

#endif  // SAM_KERNELS_CORE_MASK_H_
