// Runs the threads of one block as fibers, in an order that a seed decides.
#ifndef SAM_KERNELS_TESTS_SHIM_BLOCK_H_
#define SAM_KERNELS_TESTS_SHIM_BLOCK_H_

#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>

#include "cuda_runtime.h"

namespace samk::shim {

// SplitMix64.
class Shuffle {
 public:
  explicit Shuffle(const char* text) {
    if (text != nullptr) seed(std::strtoull(text, nullptr, 0));
  }
  // 0: nothing is shuffled.
  void seed(uint64_t seed) {
    is_on_ = seed != 0;
    state_ = seed;
  }
  bool is_on() const { return is_on_; }
  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  template <class T>
  void operator()(T* items, uint64_t count) {
    if (!is_on_) return;
    for (uint64_t i = count; i > 1; --i) std::swap(items[i - 1], items[((bits() >> 32) * i) >> 32]);
  }

 private:
  bool is_on_ = false;
  uint64_t state_ = 0;
};
extern Shuffle shuffled;

// Fibers for blocks of this shape; false when the system has no memory.
bool prepare_threads(dim3 block);

// Runs the work of every fiber once as the threads of the current block. Returns what went wrong, or nothing.
std::string run_block();

}  // namespace samk::shim

#endif  // SAM_KERNELS_TESTS_SHIM_BLOCK_H_
