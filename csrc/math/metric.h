// How weights are measured (T u, with d the gradient), and what one element adds to the norm.
#ifndef SAM_KERNELS_MATH_METRIC_H_
#define SAM_KERNELS_MATH_METRIC_H_

#include <cmath>

#include "core/hd.h"
#include "math/power.h"

namespace samk {

// T = 1
struct Euclidean {
  static constexpr bool kReadsWeight = false;
  template <class V>
  SAMK_HD V weigh(V u, V /*d*/, V /*w*/) const {
    return u;
  }
};

// T = |w| + eta
template <class S>
struct Adaptive {
  static constexpr bool kReadsWeight = true;
  S eta;
  template <class V>
  SAMK_HD V weigh(V u, V /*d*/, V w) const {
    return (abs(w) + V(eta)) * u;
  }
};

// T = (1 + eta d^2)^(-1/2), d the gradient whatever is weighed: a displacement T h(T d) is weighed by T of d.
template <class S>
struct Fisher {
  static constexpr bool kReadsWeight = false;
  S eta;
  template <class V>
  SAMK_HD V weigh(V u, V d, V /*w*/) const {
    return u / sqrt(fma(V(eta) * d, d, V(S(1))));
  }
};

// u^2
struct Square {
  template <class V>
  SAMK_HD V operator()(V u) const {
    return u * u;
  }
};

// (|u| / peak)^q; a peak of zero means that every u is zero.
template <class S>
struct Power {
  S peak, q;
  template <class V>
  SAMK_HD V operator()(V u) const {
    const S p = peak, e = q;
    if (p == S(0)) return u;  // zero, or NaN where the gradient is
    return map(abs(u) / V(p), [e](S x) { return power(x, e); });
  }
};

}  // namespace samk

#endif  // SAM_KERNELS_MATH_METRIC_H_
