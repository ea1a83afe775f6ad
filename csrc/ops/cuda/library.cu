// What the CUDA library exports beside the passes: plans and what is known of devices.
#include <atomic>
#include <exception>

#include "engine/launch.cuh"

#ifndef SAMK_CUDA_TARGETS
#define SAMK_CUDA_TARGETS "unknown targets"
#endif

namespace samk {

int count_processors(int device, int* processors) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  if (device < 0 || device >= kDevices) return fail("device " + std::to_string(device) + " is out of range");
  *processors = known[device].load();
  if (*processors != 0) return 0;
  const cudaError_t status = cudaDeviceGetAttribute(processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return check_cuda("device", status);
  known[device] = *processors;
  return 0;
}

}  // namespace samk

extern "C" {

samk_plan* samk_plan_create(const int64_t* numel, int64_t count) {
  if (count < 0 || count > INT32_MAX) {
    samk::fail("samk_plan_create: " + std::to_string(count) + " tensors; expected 0 to 2147483647");
    return nullptr;
  }
  for (int64_t t = 0; t < count; ++t) {
    if (numel[t] < 0) {
      samk::fail("samk_plan_create: numel[" + std::to_string(t) + "] is negative");
      return nullptr;
    }
  }
  try {
    return new samk_plan(numel, count);
  } catch (const std::exception& problem) {
    samk::fail(std::string("samk_plan_create: ") + problem.what());
    return nullptr;
  }
}

void samk_plan_destroy(samk_plan* plan) { delete plan; }

int64_t samk_plan_workspace_bytes(const samk_plan* plan) { return samk::Workspace::bytes(*plan); }

int samk_check_device(int32_t device) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    return samk::fail(std::string("no CUDA device can be used: ") + cudaGetErrorString(status));
  }
  if (device < 0 || device >= count) {
    return samk::fail("CUDA device " + std::to_string(device) + " does not exist; there are " +
                      std::to_string(count));
  }
  int major = 0;
  if (samk::check_cuda("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) !=
      0) {
    return 1;
  }
  if (major < 7) return samk::fail("the CUDA passes need compute capability 7.0 or newer");
  return 0;
}

const char* samk_build_info(void) { return SAMK_CUDA_TARGETS; }

}  // extern "C"
