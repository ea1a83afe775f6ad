// Chooses the instruction set at run time and exports the passes.
#include <atomic>
#include <cstring>
#include <exception>
#include <string>

#include "core/runtime.h"
#include "ops/cpu/passes.h"

#define SAMK_DECLARE(isa)                                        \
  namespace samk {                                               \
  namespace isa {                                                \
  int sq_norm(const samk_plan&, const samk_sq_norm_args&);       \
  int perturb(const samk_plan&, const samk_perturb_args&);       \
  int restore(const samk_plan&, const samk_restore_args&);       \
  int grad_stats(const samk_plan&, const samk_grad_stats_args&); \
  int combine(const samk_plan&, const samk_combine_args&);       \
  int noise(const samk_plan&, const samk_noise_args&);           \
  int descend(const samk_plan&, const samk_descend_args&);       \
  int accumulate(const samk_plan&, const samk_accumulate_args&); \
  int count(const samk_plan&, const samk_count_args&);           \
  int mark(const samk_plan&, const samk_mark_args&);             \
  }                                                              \
  }
#define SAMK_PASSES(isa)  \
  {#isa,                  \
   samk::isa::sq_norm,    \
   samk::isa::perturb,    \
   samk::isa::restore,    \
   samk::isa::grad_stats, \
   samk::isa::combine,    \
   samk::isa::noise,      \
   samk::isa::descend,    \
   samk::isa::accumulate, \
   samk::isa::count,      \
   samk::isa::mark}

SAMK_DECLARE(baseline)
#ifdef SAMK_AVX2
SAMK_DECLARE(avx2)
#endif
#ifdef SAMK_X86
SAMK_DECLARE(avx512)
#endif

namespace samk {
namespace {

const Passes kBaseline = SAMK_PASSES(baseline);
#ifdef SAMK_X86
#ifdef SAMK_AVX2
const Passes kAvx2 = SAMK_PASSES(avx2);
#endif
const Passes kAvx512 = SAMK_PASSES(avx512);

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// Best first.
const Passes* find(const char* name) {
#ifdef SAMK_X86
  if ((name == nullptr || std::strcmp(name, "avx512") == 0) && has_avx512()) return &kAvx512;
#ifdef SAMK_AVX2
  if ((name == nullptr || std::strcmp(name, "avx2") == 0) && has_avx2()) return &kAvx2;
#endif
#endif
  if (name == nullptr || std::strcmp(name, "baseline") == 0) return &kBaseline;
  return nullptr;
}

std::atomic<const Passes*> chosen{nullptr};

const Passes& passes() {
  const Passes* now = chosen.load();
  if (now == nullptr) chosen.store(now = find(nullptr));
  return *now;
}

// No exception leaves the C ABI.
template <class Pass>
int guarded(const char* name, Pass pass) {
  try {
    return pass();
  } catch (const std::exception& problem) {
    return fail(std::string(name) + ": " + problem.what());
  }
}

}  // namespace
}  // namespace samk

extern "C" {

int samk_sq_norm(const samk_plan* plan, const samk_sq_norm_args* args) {
  return samk::guarded("sq_norm", [&] { return samk::passes().sq_norm(*plan, *args); });
}
int samk_perturb(const samk_plan* plan, const samk_perturb_args* args) {
  return samk::guarded("perturb_", [&] { return samk::passes().perturb(*plan, *args); });
}
int samk_restore(const samk_plan* plan, const samk_restore_args* args) {
  return samk::guarded("restore_", [&] { return samk::passes().restore(*plan, *args); });
}
int samk_grad_stats(const samk_plan* plan, const samk_grad_stats_args* args) {
  return samk::guarded("grad_stats", [&] { return samk::passes().grad_stats(*plan, *args); });
}
int samk_combine(const samk_plan* plan, const samk_combine_args* args) {
  return samk::guarded("combine_", [&] { return samk::passes().combine(*plan, *args); });
}
int samk_noise(const samk_plan* plan, const samk_noise_args* args) {
  return samk::guarded("noise_", [&] { return samk::passes().noise(*plan, *args); });
}
int samk_descend(const samk_plan* plan, const samk_descend_args* args) {
  return samk::guarded("descend_", [&] { return samk::passes().descend(*plan, *args); });
}

int samk_accumulate(const samk_plan* plan, const samk_accumulate_args* args) {
  return samk::guarded("accumulate_squares_", [&] { return samk::passes().accumulate(*plan, *args); });
}
int samk_count(const samk_plan* plan, const samk_count_args* args) {
  return samk::guarded("count_ranks", [&] { return samk::passes().count(*plan, *args); });
}
int samk_mark(const samk_plan* plan, const samk_mark_args* args) {
  return samk::guarded("mark_", [&] { return samk::passes().mark(*plan, *args); });
}

const char* samk_cpu_isa(void) { return samk::passes().isa; }

int samk_set_cpu_isa(const char* name) {
  const samk::Passes* found = samk::find(name);
  if (found == nullptr) {
    return samk::fail(std::string("instruction set '") + name + "' is unknown or this machine lacks it");
  }
  samk::chosen.store(found);
  return 0;
}

}  // extern "C"
