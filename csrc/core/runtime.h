// What the passes share at run time: the plan behind the C ABI, the thread pool.
#ifndef SAM_KERNELS_CORE_RUNTIME_H_
#define SAM_KERNELS_CORE_RUNTIME_H_

#include <functional>
#include <vector>

#include "core/chunk_plan.h"
#include "core/error.h"
#include "sam_kernels.h"

struct samk_plan {
  samk_plan(const int64_t* numel, int64_t count) : chunks(numel, count) {}
  samk::ChunkPlan chunks;
  // Partial sums by chunk, all zero; scratch of one pass at a time, kept so that a step allocates nothing.
  // Not inline: what is compiled once per instruction set must not emit a function that the linker could pick
  // for all.
  double* cleared_partials(size_t count) const;

 private:
  mutable std::vector<double> partials_;
};

namespace samk {

// Calls work(span) for every span, in parallel where that pays; spans are taken dynamically, so a
// disturbed core does not hold up the others. Results must not depend on who takes what.
enum class Order { kForward, kBackward };
void for_each_span(const ChunkPlan& plan, Order order, const std::function<void(const Span&)>& work);

// Whether a pass that moves this many bytes should write past the caches.
bool exceeds_cache(int64_t bytes);

}  // namespace samk

#endif  // SAM_KERNELS_CORE_RUNTIME_H_
