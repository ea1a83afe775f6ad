// w + scale * T * h(T * d), with h the shape of the norm's dual ball.
#ifndef SAM_KERNELS_MATH_PERTURB_H_
#define SAM_KERNELS_MATH_PERTURB_H_

#include <cmath>

#include "core/hd.h"
#include "math/power.h"
#include "sam_kernels.h"

namespace samk {

// h(u) = u: p = 2
struct Linear {
  template <class V>
  SAMK_HD V operator()(V u) const {
    return u;
  }
};

// h(u) = sign(u): p = inf
struct Sign {
  template <class V>
  SAMK_HD V operator()(V u) const {
    using S = typename V::Scalar;
    return map(u, [](S x) { return x > S(0) ? S(1) : x < S(0) ? S(-1) : x; });
  }
};

// h(u) = sign(u) (|u| / peak)^(q - 1): any other p
template <class S>
struct Powered {
  S peak, exponent;
  template <class V>
  SAMK_HD V operator()(V u) const {
    const S p = peak, e = exponent;
    if (p == S(0)) return u;
    return map(u, [p, e](S x) { return x == S(0) ? x : std::copysign(power(std::fabs(x) / p, e), x); });
  }
};

template <class S, class Metric, class Shape>
struct Perturb {
  S scale;
  Metric metric;
  Shape shape;
  template <class V>
  SAMK_HD V operator()(V w, V d) const {
    // T enters twice: u = T d is measured, T h(u) is the displacement.
    const V u = metric.weigh(d, d, w);
    return fma(V(scale), metric.weigh(shape(u), d, w), w);
  }
};

// rho / (norm + eps) * tensor_scale, and rho * tensor_scale for the sign. With eps 0 and a zero gradient the
// quotient is not finite, and 0 * inf would move weights; nor may a large one overflow in the narrower type.
template <class S>
SAMK_HD S perturb_scale(const double* row, int shape, double norm, double tensor_scale) {
  double scale = row[SAMK_RHO];
  if (shape != SAMK_SIGN) scale /= norm + row[SAMK_EPS];
  scale *= tensor_scale;
  const S rounded = static_cast<S>(scale);
  return rounded - rounded == S(0) ? rounded : S(0);
}

}  // namespace samk

#endif  // SAM_KERNELS_MATH_PERTURB_H_
