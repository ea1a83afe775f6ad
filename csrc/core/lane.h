// One number with the operators of a pack: the value type of engines that calculate element by element.
#ifndef SAM_KERNELS_CORE_LANE_H_
#define SAM_KERNELS_CORE_LANE_H_

#include <cmath>

#include "core/half.h"
#include "core/hd.h"

namespace samk {

template <class S>
struct Lane {
  using Scalar = S;
  S x;

  Lane() = default;
  SAMK_HD explicit Lane(S value) : x(value) {}
  friend SAMK_HD Lane operator+(Lane a, Lane b) { return Lane(a.x + b.x); }
  friend SAMK_HD Lane operator-(Lane a, Lane b) { return Lane(a.x - b.x); }
  friend SAMK_HD Lane operator*(Lane a, Lane b) { return Lane(a.x * b.x); }
  friend SAMK_HD Lane operator/(Lane a, Lane b) { return Lane(a.x / b.x); }
};

template <class S>
SAMK_HD Lane<S> fma(Lane<S> a, Lane<S> b, Lane<S> c) {
  return Lane<S>(std::fma(a.x, b.x, c.x));
}
template <class S>
SAMK_HD Lane<S> sqrt(Lane<S> a) {
  return Lane<S>(std::sqrt(a.x));
}
template <class S>
SAMK_HD Lane<S> abs(Lane<S> a) {
  return Lane<S>(std::fabs(a.x));
}
template <class S>
SAMK_HD Lane<S> max(Lane<S> a, Lane<S> b) {
  return a.x > b.x ? a : b;
}
template <class S, class F>
SAMK_HD Lane<S> map(Lane<S> a, F f) {
  return Lane<S>(f(a.x));
}

// Of the plane: two numbers that come out of one calculation.
struct Point {
  float x, y;
};

// The type a stored type is calculated in, and the conversions both ways.
template <class T>
struct Stored {
  using S = T;
  static SAMK_HD T widen(T x) { return x; }
  static SAMK_HD T narrow(T x) { return x; }
};
template <>
struct Stored<bf16> {
  using S = float;
  static SAMK_HD float widen(bf16 x) { return to_float(x); }
  static SAMK_HD bf16 narrow(float x) { return to_bf16(x); }
};
template <>
struct Stored<f16> {
  using S = float;
  static SAMK_HD float widen(f16 x) { return to_float(x); }
  static SAMK_HD f16 narrow(float x) { return to_f16(x); }
};

}  // namespace samk

#endif  // SAM_KERNELS_CORE_LANE_H_
