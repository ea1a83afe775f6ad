// The base optimizers' element updates, in torch.optim's order of operations.
#ifndef SAM_KERNELS_MATH_DESCENT_H_
#define SAM_KERNELS_MATH_DESCENT_H_

namespace samk {

// g' = +-g + weight_decay * w
template <class S>
struct Decayed {
  S sign, weight_decay;
  template <class V>
  V operator()(V g, V w) const {
    return fma(V(weight_decay), w, V(sign) * g);
  }
};

// buffer' = momentum * buffer + (1 - dampening) * g';  step along g' + momentum * buffer' (nesterov)
// or buffer'.
template <class S>
struct Sgd {
  S neg_lr, momentum, kept, nesterov_momentum, gradient_share;
  template <class V>
  V buffer(V old, V g) const {
    return fma(V(kept), g, V(momentum) * old);
  }
  // nesterov: gradient_share 1, nesterov_momentum m; plain momentum: 0 and 1.
  template <class V>
  V weight(V w, V g, V buf) const {
    return fma(V(neg_lr), fma(V(nesterov_momentum), buf, V(gradient_share) * g), w);
  }
  template <class V>
  V weight(V w, V g) const {
    return fma(V(neg_lr), g, w);
  }
};

// m' = m + (1 - beta1)(g' - m);  v' = beta2 v + (1 - beta2) g'^2;
// w' = keep * w - step_size * m' / (sqrt(v') / sqrt(1 - beta2^t) + eps)
template <class S>
struct Adam {
  S one_minus_beta1, beta2, one_minus_beta2, neg_step_size, sqrt_correction2, eps, keep;
  template <class V>
  V first_moment(V m, V g) const {
    return fma(V(one_minus_beta1), g - m, m);
  }
  template <class V>
  V second_moment(V v, V g) const {
    return fma(V(one_minus_beta2) * g, g, V(beta2) * v);
  }
  template <class V>
  V weight(V w, V m, V v) const {
    const V denominator = sqrt(v) / V(sqrt_correction2) + V(eps);
    return fma(V(neg_step_size), m / denominator, V(keep) * w);
  }
};

}  // namespace samk

#endif  // SAM_KERNELS_MATH_DESCENT_H_
