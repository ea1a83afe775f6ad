// The last error of the C ABI.
#ifndef SAM_KERNELS_CORE_ERROR_H_
#define SAM_KERNELS_CORE_ERROR_H_

#include <string>

namespace samk {

// Records the sentence and returns the non-zero status of the C ABI.
int fail(const std::string& sentence);

}  // namespace samk

#endif  // SAM_KERNELS_CORE_ERROR_H_
