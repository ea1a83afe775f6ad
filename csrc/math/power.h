// x^e for x >= 0.
#ifndef SAM_KERNELS_MATH_POWER_H_
#define SAM_KERNELS_MATH_POWER_H_

#include <cmath>

#include "core/hd.h"

namespace samk {

SAMK_HD_CALL float power(float x, float e) { return std::pow(x, e); }
SAMK_HD_CALL double power(double x, double e) { return std::pow(x, e); }

}  // namespace samk

#endif  // SAM_KERNELS_MATH_POWER_H_
