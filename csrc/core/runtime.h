// What the passes share at run time: the plan behind the C ABI, the thread pool, the last error.
#ifndef SAM_KERNELS_CORE_RUNTIME_H_
#define SAM_KERNELS_CORE_RUNTIME_H_

#include <functional>
#include <string>
#include <vector>

#include "core/chunk_plan.h"
#include "sam_kernels.h"

struct samk_plan {
  samk_plan(const int64_t* numel, int64_t count) : chunks(numel, count) {}
  samk::ChunkPlan chunks;
  // Partial sums by chunk; scratch of one pass at a time, kept so that a step allocates nothing.
  mutable std::vector<double> partials;
};

namespace samk {

// Records the sentence and returns the non-zero status of the C ABI.
int fail(const std::string& sentence);

// Calls work(span) for every span, in parallel where that pays; spans are taken dynamically, so a
// disturbed core does not hold up the others. Results must not depend on who takes what.
enum class Order { kForward, kBackward };
void for_each_span(const ChunkPlan& plan, Order order, const std::function<void(const Span&)>& work);

// Whether a pass that moves this many bytes should write past the caches.
bool exceeds_cache(int64_t bytes);

}  // namespace samk

#endif  // SAM_KERNELS_CORE_RUNTIME_H_
