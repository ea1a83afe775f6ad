// What the CUDA library exports beside the passes: plans and what is known of devices.
#include <atomic>
#include <exception>
#include <map>
#include <mutex>

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

namespace {

constexpr int kDriver = 12010;  // the first to hand a kernel more than 4 KB by value

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// What stands between a device that is there and the passes: nothing, or a sentence. Non-zero where CUDA
// fails.
int find_obstacle(int device, std::string* obstacle) {
  int driver = 0, major = 0, minor = 0;
  if (check_cuda("device", cudaDriverGetVersion(&driver)) != 0 ||
      check_cuda("device", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) != 0 ||
      check_cuda("device", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) != 0) {
    return 1;
  }
  if (driver < kDriver) {
    *obstacle = "the CUDA passes need a driver for CUDA " + version(kDriver) +
                " or newer (R530), and this one is for CUDA " + version(driver);
    return 0;
  }
  if (major < 7) {
    *obstacle = "the CUDA passes need compute capability 7.0 or newer";
    return 0;
  }
  const DeviceGuard guard("device", device);
  if (guard.status() != 0) return guard.status();
  const cudaError_t status = find_kernels();
  switch (status) {
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
      cudaGetLastError();
      *obstacle = "the CUDA library has no kernels for sm_" + std::to_string(major) + std::to_string(minor) +
                  " (CUDA device " + std::to_string(device) + "); it was built with " + SAMK_CUDA_TARGETS +
                  ". Reinstall with CUDA_ARCHS=" + std::to_string(major) + std::to_string(minor) +
                  ", or use backend='foreach' (" + cudaGetErrorString(status) + ")";
      return 0;
    default:
      return check_cuda("device", status);
  }
}

}  // namespace
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
    cudaGetLastError();
    return samk::fail(std::string("no CUDA device can be used: ") + cudaGetErrorString(status));
  }
  if (device < 0 || device >= count) {
    return samk::fail("CUDA device " + std::to_string(device) + " does not exist; there are " +
                      std::to_string(count));
  }
  // Neither devices nor the driver change while a process lives.
  static std::mutex mutex;
  static std::map<int, std::string> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) {
    std::string obstacle;
    if (samk::find_obstacle(device, &obstacle) != 0) return 1;
    found = known.emplace(device, std::move(obstacle)).first;
  }
  return found->second.empty() ? 0 : samk::fail(found->second);
}

const char* samk_build_info(void) { return SAMK_CUDA_TARGETS; }

}  // extern "C"
