#include "core/runtime.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>

namespace samk {
namespace {

std::atomic<samk_parallel_for_fn> parallel_for{nullptr};
std::atomic<samk_num_threads_fn> num_threads{nullptr};

constexpr int64_t kParallelElements = 1 << 19;

int64_t cache_bytes() {
  long bytes = -1;
#ifdef _SC_LEVEL3_CACHE_SIZE
  bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return bytes > 0 ? bytes : int64_t{32} << 20;
}

struct Tickets {
  const ChunkPlan& plan;
  const std::function<void(const Span&)>& work;
  Order order;
  std::atomic<int64_t> next{0};

  void take_all() {
    const auto& spans = plan.spans();
    const int64_t count = static_cast<int64_t>(spans.size());
    for (int64_t s = next++; s < count; s = next++) work(spans[order == Order::kForward ? s : count - 1 - s]);
  }
};

void run_tickets(int64_t begin, int64_t end, void* context) {
  for (int64_t i = begin; i < end; ++i) static_cast<Tickets*>(context)->take_all();
}

}  // namespace

void for_each_span(const ChunkPlan& plan, Order order, const std::function<void(const Span&)>& work) {
  const int64_t spans = static_cast<int64_t>(plan.spans().size());
  uint32_t threads = 1;
  const auto ask = num_threads.load();
  const auto run = parallel_for.load();
  if (ask == nullptr || run == nullptr || ask(&threads) != 0) threads = 1;
  // Waking the pool costs more than a couple of megabytes do, and far more on a busy machine.
  if (plan.total() < kParallelElements) threads = 1;
  const int64_t helpers = std::min<int64_t>(threads, spans);
  Tickets tickets{plan, work, order};
  // Should the pool refuse, the tickets that are left are taken here.
  if (helpers > 1) run(0, helpers, 1, run_tickets, &tickets);
  tickets.take_all();
}

bool exceeds_cache(int64_t bytes) {
  static const int64_t limit = cache_bytes() / 2;
  return bytes > limit;
}

}  // namespace samk

double* samk_plan::cleared_partials(size_t count) const {
  partials_.assign(count, 0.0);
  return partials_.data();
}

extern "C" {

void samk_set_thread_pool(samk_parallel_for_fn run, samk_num_threads_fn ask) {
  samk::parallel_for = run;
  samk::num_threads = ask;
}

samk_plan* samk_plan_create(const int64_t* numel, int64_t count) {
  if (count < 0 || count > INT32_MAX) {
    samk::fail("samk_plan_create: " + std::to_string(count) + " tensors; expected 0 to 2147483647");
    return nullptr;
  }
  for (int64_t t = 0; t < count; ++t) {
    if (numel[t] < 0) {
      samk::fail("samk_plan_create: numel[" + std::to_string(t) + "] is negative");
      return nullptr;
    }
  }
  try {
    return new samk_plan(numel, count);
  } catch (const std::exception& problem) {
    samk::fail(std::string("samk_plan_create: ") + problem.what());
    return nullptr;
  }
}

void samk_plan_destroy(samk_plan* plan) { delete plan; }

int64_t samk_plan_workspace_bytes(const samk_plan*) { return 0; }

}  // extern "C"
