#include "core/error.h"

#include "sam_kernels.h"

namespace samk {
namespace {

thread_local std::string last_error;

}  // namespace

int fail(const std::string& sentence) {
  last_error = sentence;
  return 1;
}

}  // namespace samk

extern "C" {

const char* samk_last_error(void) { return samk::last_error.c_str(); }

int samk_abi_version(void) { return SAMK_ABI_VERSION; }

}  // extern "C"
