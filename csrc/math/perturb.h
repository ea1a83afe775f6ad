// w + scale * T * h(T * d), with h the shape of the norm's dual ball.
#ifndef SAM_KERNELS_MATH_PERTURB_H_
#define SAM_KERNELS_MATH_PERTURB_H_

#include <cmath>

namespace samk {

// h(u) = u: p = 2
struct Linear {
  template <class V>
  V operator()(V u) const {
    return u;
  }
};

// h(u) = sign(u): p = inf
struct Sign {
  template <class V>
  V operator()(V u) const {
    using S = typename V::Scalar;
    return map(u, [](S x) { return x > S(0) ? S(1) : x < S(0) ? S(-1) : x; });
  }
};

// h(u) = sign(u) (|u| / peak)^(q - 1): any other p
template <class S>
struct Powered {
  S peak, exponent;
  template <class V>
  V operator()(V u) const {
    const S p = peak, e = exponent;
    if (p == S(0)) return u;
    return map(u, [p, e](S x) { return x == S(0) ? x : std::copysign(std::pow(std::fabs(x) / p, e), x); });
  }
};

template <class S, class Metric, class Shape>
struct Perturb {
  S scale;
  Metric metric;
  Shape shape;
  template <class V>
  V operator()(V w, V d) const {
    // T enters twice: u = T d is measured, T h(u) is the displacement.
    return fma(V(scale), metric.weigh(shape(metric.weigh(d, w)), w), w);
  }
};

}  // namespace samk

#endif  // SAM_KERNELS_MATH_PERTURB_H_
