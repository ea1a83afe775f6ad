// Random numbers by counter: Philox4x32-10 (Salmon et al., SC 2011). A number is a function of seed, step,
// tensor and element, so threads, chunks and devices cannot change it, and none has to be stored.
#ifndef SAM_KERNELS_MATH_RANDOM_H_
#define SAM_KERNELS_MATH_RANDOM_H_

#include <cstdint>

#include "core/hd.h"

namespace samk {

// Four named words, not an array: an index known only at run time would put an array into a GPU's memory.
struct Words {
  uint32_t x0, x1, x2, x3;
};

SAMK_HD Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;  // the golden ratio
    k1 += 0xBB67AE85;  // sqrt(3) - 1
  }
  return {c0, c1, c2, c3};
}

// Note: [four neighbours]. One call of philox makes four words, so the counter is element / 4 and an engine
// that holds the four elements may call it once. It takes 64 bits of counter: 32 would end at 2^34 elements.
SAMK_HD Words random_words(uint64_t seed, uint32_t step, uint32_t tensor, int64_t element) {
  const uint64_t four = static_cast<uint64_t>(element) >> 2;
  return philox(static_cast<uint32_t>(four), static_cast<uint32_t>(four >> 32), tensor, step,
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

SAMK_HD uint32_t random_word(uint64_t seed, uint32_t step, uint32_t tensor, int64_t element) {
  const Words words = random_words(seed, step, tensor, element);
  const uint32_t low = element & 1 ? words.x1 : words.x0, high = element & 1 ? words.x3 : words.x2;
  return element & 2 ? high : low;
}

// Note: [eight neighbours]. Sixteen random bits for an element; eight of them share the four words of one
// call.
SAMK_HD Words random_words_of_eight(uint64_t seed, uint32_t step, uint32_t tensor, int64_t element) {
  return random_words(seed, step, tensor, element >> 3 << 2);
}

// Those of element % 8 in the words of its eight: the low half of a word first.
SAMK_HD uint32_t sixteen_of(const Words& words, int64_t element) {
  const uint32_t low = element & 2 ? words.x1 : words.x0, high = element & 2 ? words.x3 : words.x2;
  const uint32_t word = element & 4 ? high : low;
  return element & 1 ? word >> 16 : word & 0xffffu;
}

// In [0, 1). 24 bits are what a float holds, so nothing is rounded, 1 is never reached, and every engine gets
// the same bits.
SAMK_HD float uniform(uint32_t word) { return static_cast<float>(word >> 8) * 0x1p-24f; }

}  // namespace samk

#endif  // SAM_KERNELS_MATH_RANDOM_H_
