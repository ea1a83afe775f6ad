// a x + b y + c z, adding in list order; lists with a zero coefficient are never read.
#ifndef SAM_KERNELS_MATH_COMBINE_H_
#define SAM_KERNELS_MATH_COMBINE_H_

#include "core/hd.h"

namespace samk {

template <class S>
struct Term {
  S coefficient;
  template <class V>
  SAMK_HD V first(V x) const {
    return V(coefficient) * x;
  }
  template <class V>
  SAMK_HD V next(V sum, V x) const {
    return fma(V(coefficient), x, sum);
  }
};

}  // namespace samk

#endif  // SAM_KERNELS_MATH_COMBINE_H_
