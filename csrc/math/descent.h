// The base optimizers' element updates, in torch.optim's order of operations.
#ifndef SAM_KERNELS_MATH_DESCENT_H_
#define SAM_KERNELS_MATH_DESCENT_H_

#include <cmath>

#include "core/hd.h"
#include "math/power.h"
#include "sam_kernels.h"

namespace samk {

// g' = +-g + weight_decay * w; without decay the weight is not looked at, since 0 * w is NaN for some w.
template <class S>
struct Decayed {
  S sign, weight_decay;
  template <class V>
  SAMK_HD V operator()(V g, V w) const {
    return fma(V(weight_decay), w, V(sign) * g);
  }
  template <class V>
  SAMK_HD V operator()(V g) const {
    return V(sign) * g;
  }
};

// buffer' = momentum * buffer + (1 - dampening) * g';  step along g' + momentum * buffer' (nesterov)
// or buffer'.
template <class S>
struct Sgd {
  S neg_lr, momentum, kept, nesterov_momentum, gradient_share;
  template <class V>
  SAMK_HD V buffer(V old, V g) const {
    return fma(V(kept), g, V(momentum) * old);
  }
  // nesterov: gradient_share 1, nesterov_momentum m; plain momentum: 0 and 1.
  template <class V>
  SAMK_HD V weight(V w, V g, V buf) const {
    return fma(V(neg_lr), fma(V(nesterov_momentum), buf, V(gradient_share) * g), w);
  }
  template <class V>
  SAMK_HD V weight(V w, V g) const {
    return fma(V(neg_lr), g, w);
  }
};

// m' = m + (1 - beta1)(g' - m);  v' = beta2 v + (1 - beta2) g'^2;
// w' = keep * w - step_size * m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)
template <class S>
struct Adam {
  S one_minus_beta1, beta2, one_minus_beta2, neg_step_size, sqrt_correction2, eps, keep;
  template <class V>
  SAMK_HD V first_moment(V m, V g) const {
    return fma(V(one_minus_beta1), g - m, m);
  }
  template <class V>
  SAMK_HD V second_moment(V v, V g) const {
    return fma(V(one_minus_beta2) * g, g, V(beta2) * v);
  }
  template <class V>
  SAMK_HD V weight(V w, V m, V v) const {
    const V denominator = sqrt(v) / V(sqrt_correction2) + V(eps);
    return fma(V(neg_step_size), m / denominator, V(keep) * w);
  }
};

// The functors of one row of scalars; note: [table of scalars] in sam_kernels.h. Powers and quotients are
// taken in double and rounded once.
template <class S>
SAMK_HD Decayed<S> decayed(const double* row, int rule, double inv_scale) {
  const bool coupled = rule == SAMK_SGD || row[SAMK_DECOUPLED] == 0;
  return {static_cast<S>(row[SAMK_MAXIMIZE] != 0 ? -inv_scale : inv_scale),
          coupled ? static_cast<S>(row[SAMK_WEIGHT_DECAY]) : S(0)};
}

template <class S>
SAMK_HD Sgd<S> sgd(const double* row) {
  const double momentum = row[SAMK_MOMENTUM];
  const bool nesterov = row[SAMK_NESTEROV] != 0;
  return {static_cast<S>(-row[SAMK_LR]), static_cast<S>(momentum), static_cast<S>(1 - row[SAMK_DAMPENING]),
          nesterov ? static_cast<S>(momentum) : S(1), nesterov ? S(1) : S(0)};
}

// step: the number of this step, counted from 1.
template <class S>
SAMK_HD Adam<S> adam(const double* row, double step) {
  const double beta1 = row[SAMK_BETA1], beta2 = row[SAMK_BETA2], lr = row[SAMK_LR];
  const bool decoupled = row[SAMK_DECOUPLED] != 0;
  return {static_cast<S>(1 - beta1),
          static_cast<S>(beta2),
          static_cast<S>(1 - beta2),
          static_cast<S>(-lr / (1 - power(beta1, step))),
          static_cast<S>(std::sqrt(1 - power(beta2, step))),
          static_cast<S>(row[SAMK_ADAM_EPS]),
          decoupled ? static_cast<S>(1 - lr * row[SAMK_WEIGHT_DECAY]) : S(1)};
}

}  // namespace samk

#endif  // SAM_KERNELS_MATH_DESCENT_H_
