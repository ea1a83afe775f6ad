// The host side of the CUDA engine: splits a parameter list into launches and reports what fails.
#ifndef SAM_KERNELS_ENGINE_LAUNCH_CUH_
#define SAM_KERNELS_ENGINE_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "core/error.h"
#include "core/half.h"
#include "core/launch_plan.h"
#include "engine/parameters.cuh"
#include "sam_kernels.h"

struct samk_plan {
  samk_plan(const int64_t* numel, int64_t count) : launches(numel, count) {}
  samk::LaunchPlan launches;
};

namespace samk {

inline int check_cuda(const char* pass, cudaError_t status) {
  if (status == cudaSuccess) return 0;
  cudaGetLastError();  // told here, and not again to whoever asks next
  return fail(std::string(pass) + ": CUDA error " + std::to_string(static_cast<int>(status)) + ", " +
              cudaGetErrorString(status));
}

// The tensors' device is current while this lives, and the former one afterwards. From CUDA 12 on that makes
// a context on a former device that had none. Only the driver could say so, and staying on the tensors'
// device would move whatever the caller makes next; torch.cuda.set_device before the step avoids both.
class DeviceGuard {
 public:
  DeviceGuard(const char* pass, int device) {
    status_ = check_cuda(pass, cudaGetDevice(&former_));
    if (status_ == 0 && former_ != device) {
      status_ = check_cuda(pass, cudaSetDevice(device));
      is_switched_ = status_ == 0;
    }
  }
  ~DeviceGuard() {
    if (is_switched_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int status() const { return status_; }

 private:
  int former_ = 0;
  int status_ = 0;
  bool is_switched_ = false;
};

// Device memory of a plan that passes share: a counter of finished blocks, then sums by chunk.
struct Workspace {
  static constexpr int64_t kCounterBytes = 64;
  static constexpr int64_t kSumsPerChunk = 6;  // grad_stats of three lists
  static int64_t bytes(const samk_plan& plan) {
    return kCounterBytes + plan.launches.chunks() * kSumsPerChunk * static_cast<int64_t>(sizeof(double));
  }
  explicit Workspace(void* memory)
      : counter(static_cast<unsigned*>(memory)),
        partials(reinterpret_cast<double*>(static_cast<char*>(memory) + kCounterBytes)) {}
  unsigned* counter;
  double* partials;
};

// Asked once for each device.
int count_processors(int device, int* processors);

// Whether this library has kernels that the current device can run.
cudaError_t find_kernels();

// Where one pass of one plan runs.
struct Site {
  const char* pass;
  const samk_plan& plan;
  const int32_t* row;    // host; NULL where the kernel reads no row
  const uint8_t* flags;  // host; NULL, or 1 where the row's flag is set
  int32_t device;
  void* stream;
};

// Launches the kernel over all tensors of the plan, as often as their number takes, with the blocks that stay
// resident (blocks_per_sm is what the kernel's __launch_bounds__ say). pointer(list, t) is the device address
// of tensor t in a list.
template <class P, class Scalars, class Pointer>
int launch(const Site& site, void (*kernel)(P), int blocks_per_sm, const Scalars& scalars, Pointer pointer) {
  static_assert(sizeof(P) <= kParameterBytes, "parameters exceed what a launch may carry");
  const DeviceGuard guard(site.pass, site.device);
  if (guard.status() != 0) return guard.status();
  int processors = 0;
  if (count_processors(site.device, &processors) != 0) return 1;
  const auto& launches = site.plan.launches.launches(kCapacity<P::kLists>);
  static thread_local P parameters;  // 32 KB that need no clearing
  parameters.scalars = scalars;
  auto& tensors = parameters.tensors;
  tensors.chunk = static_cast<int32_t>(site.plan.launches.chunk());
  for (const Launch& launch : launches) {
    const int count = static_cast<int>(launch.tensor.size());
    tensors.count = count;
    tensors.first_chunk = launch.first_chunk;
    tensors.is_last = &launch == &launches.back();
    std::copy_n(launch.first_full.data(), count + 1, tensors.first_full);
    std::copy_n(launch.tail.data(), count, tensors.tail);
    for (int k = 0; k < count; ++k) {
      const int32_t t = launch.tensor[k];
      for (int list = 0; list < P::kLists; ++list) tensors.data[list][k] = pointer(list, t);
      const int32_t row = site.row == nullptr ? 0 : site.row[t];
      if (row < 0 || row >= kFlag) {
        return fail(std::string(site.pass) + ": row " + std::to_string(row) +
                    " of the table is out of range");
      }
      const bool flag = site.flags != nullptr && site.flags[t] != 0;
      tensors.row[k] = static_cast<uint16_t>(row | (flag ? kFlag : 0));
    }
    const dim3 grid(static_cast<unsigned>(std::min(launch.chunks(), processors * blocks_per_sm)));
    void* arguments[] = {&parameters};
    const cudaError_t status =
        cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(site.stream));
    if (status != cudaSuccess) return check_cuda(site.pass, status);
  }
  return 0;
}

// Writes what a sum over no tensors is.
inline int clear(const Site& site, double* out, int count) {
  const DeviceGuard guard(site.pass, site.device);
  if (guard.status() != 0) return guard.status();
  return check_cuda(site.pass,
                    cudaMemsetAsync(out, 0, count * sizeof *out, static_cast<cudaStream_t>(site.stream)));
}

inline void* at(const samk_list& list, int32_t t) { return list.data == nullptr ? nullptr : list.data[t]; }

// Calls visit with a value of the element type, or fails with a sentence.
template <class Visit>
int with_dtype(const char* pass, int32_t dtype, Visit visit) {
  switch (dtype) {
    case SAMK_F32:
      return visit(float{});
    case SAMK_F64:
      return visit(double{});
    case SAMK_BF16:
      return visit(bf16{});
    case SAMK_F16:
      return visit(f16{});
  }
  return fail(std::string(pass) + ": dtype code " + std::to_string(dtype) + " is unknown");
}

// Calls visit(weight, gradient) for the pairs that occur: equal types, and half gradients of fp32 weights.
template <class Visit>
int with_dtypes(const char* pass, int32_t weight, int32_t grad, Visit visit) {
  if (weight == grad) return with_dtype(pass, weight, [&](auto type) { return visit(type, type); });
  if (weight == SAMK_F32 && grad == SAMK_BF16) return visit(float{}, bf16{});
  if (weight == SAMK_F32 && grad == SAMK_F16) return visit(float{}, f16{});
  return fail(std::string(pass) + ": weights of dtype code " + std::to_string(weight) +
              " with gradients of code " + std::to_string(grad) + " are not served");
}

// Calls visit(weight) for half weights and gradients with fp32 masters.
template <class Visit>
int with_masters(const char* pass, int32_t weight, int32_t grad, int32_t master, Visit visit) {
  if (weight == grad && master == SAMK_F32) {
    if (weight == SAMK_BF16) return visit(bf16{});
    if (weight == SAMK_F16) return visit(f16{});
  }
  return fail(std::string(pass) +
              ": masters are served in fp32 beside weights and gradients of one half type");
}

}  // namespace samk

#endif  // SAM_KERNELS_ENGINE_LAUNCH_CUH_
