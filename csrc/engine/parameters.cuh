// What a kernel is handed: one struct by value, so that a launch needs no copy and no allocation.
#ifndef SAM_KERNELS_ENGINE_PARAMETERS_CUH_
#define SAM_KERNELS_ENGINE_PARAMETERS_CUH_

#include <cstdint>

#include "core/tuning.h"

namespace samk {

constexpr int kThreads = SAMK_THREADS;
constexpr int kBlocksPerSm = SAMK_BLOCKS;
constexpr int kBlocksPerSmMiddle = SAMK_BLOCKS_MIDDLE;
constexpr int kBlocksPerSmHeavy = SAMK_BLOCKS_HEAVY;
// The most a kernel may take by value (CUDA 12.1, compute capability 7.0), less room for a pass's own
// scalars.
constexpr int kParameterBytes = 32764;
constexpr int kScalarBytes = 200;

// How many tensors one launch takes with this many lists; 580 with six.
template <int kLists>
constexpr int kCapacity = (kParameterBytes - kScalarBytes) / (8 * kLists + 8);

// Parallel lists of one launch; see note: [launch order].
template <int kLists>
struct Tensors {
  void* data[kLists][kCapacity<kLists>];
  int32_t first_full[kCapacity<kLists> + 1];
  uint16_t tail[kCapacity<kLists>];
  uint16_t row[kCapacity<kLists>];  // the top bit is the pass's own flag
  int32_t count;
  int32_t chunk;
  int32_t first_chunk;
  int32_t is_last;  // the last launch of its pass
};

constexpr uint16_t kFlag = 0x8000;

template <int kLists_, class Scalars>
struct Parameters {
  static constexpr int kLists = kLists_;
  Scalars scalars;
  Tensors<kLists> tensors;
};

}  // namespace samk

#endif  // SAM_KERNELS_ENGINE_PARAMETERS_CUH_
