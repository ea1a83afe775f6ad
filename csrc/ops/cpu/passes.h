// One entry per pass, compiled once per instruction set and chosen at run time.
#ifndef SAM_KERNELS_OPS_CPU_PASSES_H_
#define SAM_KERNELS_OPS_CPU_PASSES_H_

#include "sam_kernels.h"

namespace samk {

struct Passes {
  const char* isa;
  int (*sq_norm)(const samk_plan&, const samk_sq_norm_args&);
  int (*perturb)(const samk_plan&, const samk_perturb_args&);
  int (*restore)(const samk_plan&, const samk_restore_args&);
  int (*grad_stats)(const samk_plan&, const samk_grad_stats_args&);
  int (*combine)(const samk_plan&, const samk_combine_args&);
  int (*noise)(const samk_plan&, const samk_noise_args&);
  int (*descend)(const samk_plan&, const samk_descend_args&);
  int (*accumulate)(const samk_plan&, const samk_accumulate_args&);
  int (*count)(const samk_plan&, const samk_count_args&);
  int (*mark)(const samk_plan&, const samk_mark_args&);
};

}  // namespace samk

#ifdef SAMK_ISA
namespace samk {
namespace SAMK_ISA {
int sq_norm(const samk_plan&, const samk_sq_norm_args&);
int perturb(const samk_plan&, const samk_perturb_args&);
int restore(const samk_plan&, const samk_restore_args&);
int grad_stats(const samk_plan&, const samk_grad_stats_args&);
int combine(const samk_plan&, const samk_combine_args&);
int noise(const samk_plan&, const samk_noise_args&);
int descend(const samk_plan&, const samk_descend_args&);
int accumulate(const samk_plan&, const samk_accumulate_args&);
int count(const samk_plan&, const samk_count_args&);
int mark(const samk_plan&, const samk_mark_args&);
}  // namespace SAMK_ISA
}  // namespace samk
#endif

#endif  // SAM_KERNELS_OPS_CPU_PASSES_H_
