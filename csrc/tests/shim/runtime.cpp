// The host side: checks a launch as CUDA does, and runs its blocks.
#include <atomic>
#include <cstring>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "block.h"
#include "fiber.h"

namespace {

constexpr int kProcessors = 2;  // few, so that grids stay small
constexpr int kVersion = 12010;

struct Pretended {
  int driver = kVersion, capability = 90;
  cudaError_t kernel_status = cudaSuccess;
} pretended;

// Of the calling thread.
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_failure;

cudaError_t keep(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

std::mutex one_launch;

}  // namespace

namespace samk::shim {
namespace {

// Parameters of this size are in memory whatever they consist of; smaller ones may be in registers.
constexpr size_t kInRegisters = 64;
constexpr size_t kMostBytes = 32764;
constexpr uint64_t kMostThreads = 1024;

Kernel current;

void call_with_copy() { current.call(current.function, current.parameters); }

// Decides how the fibers call the kernel.
bool prepare(const Kernel& kernel, dim3 block) {
  if (!prepare_threads(block)) return false;
  current = kernel;
  work.body = call_with_copy;
  if (kInPlace && kernel.bytes > kInRegisters) {
    std::memcpy(parameters_in_place(), kernel.parameters, kernel.bytes);
    work.body = kernel.function;
  }
  return true;
}

bool is_valid(dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
         grid.z <= 65535 && block.x <= kMostThreads && block.y <= kMostThreads && block.z <= 64 &&
         threads >= 1 && threads <= kMostThreads;
}

cudaError_t run(const Kernel& kernel, dim3 grid, dim3 block) {
  const std::lock_guard<std::mutex> guard(one_launch);
  if (!prepare(kernel, block)) return cudaErrorMemoryAllocation;
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order(shuffled.is_on() ? blocks : 0);
  std::iota(order.begin(), order.end(), uint64_t{0});
  shuffled(order.data(), order.size());
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = order.empty() ? i : order[i];
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    std::string problem = run_block();
    if (!problem.empty()) {
      last_failure = std::move(problem);
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace

std::atomic<uint64_t> launches{0};

cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  if (!is_valid(grid, block)) return keep(cudaErrorInvalidConfiguration);
  if (kernel.bytes > kMostBytes || shared_bytes != 0) return keep(cudaErrorInvalidValue);
  ++launches;
  return keep(run(kernel, grid, block));
}

cudaError_t find(void (*)()) { return keep(pretended.kernel_status); }

}  // namespace samk::shim

void samk_shim_pretend(int32_t driver, int32_t capability, int32_t kernel_status) {
  pretended = {driver, capability, static_cast<cudaError_t>(kernel_status)};
}

void samk_shim_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> guard(one_launch);
  samk::shim::shuffled.seed(seed);
}

uint64_t samk_shim_launches() { return samk::shim::launches; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidPtx:
      return "a PTX JIT compilation failed";
    case cudaErrorUnsupportedPtxVersion:
      return "the provided PTX was compiled with an unsupported toolchain.";
    case cudaErrorLaunchFailure:
      return last_failure.empty() ? "unspecified launch failure" : last_failure.c_str();
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return keep(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return keep(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kProcessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = pretended.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = pretended.capability % 10;
      return cudaSuccess;
  }
  return keep(cudaErrorInvalidValue);
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = pretended.driver;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
