// Stands in for NVIDIA's header of this name, so that kernels compile with a C++ compiler and run on the CPU:
// blocks one after the other, the threads of a block as fibers. It serves tests; what it lacks is a compile
// error. Differences that a kernel can notice:
// - Parameters are read-only, as __grid_constant__ demands, and one struct.
// - Barriers must be reached by all threads of the block, and warp functions by all lanes of their mask that
//   the block has; a launch that gets stuck ends with cudaErrorLaunchFailure and a sentence.
// - Reading a lane that takes no part gives all bits set. A thread that spins on memory spins forever.
#ifndef SAM_KERNELS_TESTS_SHIM_CUDA_RUNTIME_H_
#define SAM_KERNELS_TESTS_SHIM_CUDA_RUNTIME_H_

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// ---- language ----------------------------------------------------------------------------------------

// __noinline__ stays undefined: the C++ library uses the name as an attribute.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Of the thread that runs; one launch runs at a time.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- threads that wait for each other ----------------------------------------------------------------

namespace samk::shim {

enum class Operation { kSync, kBallot, kShuffle, kShuffleDown, kShuffleXor };

// What the lanes of a mask do together, on values as bits.
uint64_t exchange(Operation operation, unsigned mask, uint64_t value, int operand, int width);

template <class T>
T shuffle(Operation operation, unsigned mask, T value, int operand, int width) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles 32 and 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(operation, mask, bits, operand, width);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace samk::shim

void __syncthreads();
inline void __threadfence() {}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  samk::shim::exchange(samk::shim::Operation::kSync, mask, 0, 0, 32);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      samk::shim::exchange(samk::shim::Operation::kBallot, mask, predicate != 0, 0, 32));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return samk::shim::shuffle(samk::shim::Operation::kShuffle, mask, value, lane, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return samk::shim::shuffle(samk::shim::Operation::kShuffleDown, mask, value, static_cast<int>(delta),
                             width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return samk::shim::shuffle(samk::shim::Operation::kShuffleXor, mask, value, lanes, width);
}

// ---- memory --------------------------------------------------------------------------------------------

namespace samk::shim {
template <class T>
using Given = std::enable_if_t<true, T>;  // takes no part in deduction, so that arguments convert

template <class T>
T exchange_memory(T* p, T value) {
  const T before = *p;
  *p = value;
  return before;
}
}  // namespace samk::shim

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, samk::shim::Given<T> value) {
  *p = value;
}
template <class T>
void __stcs(T* p, samk::shim::Given<T> value) {
  *p = value;
}

// Fibers switch only where they wait, so plain memory is atomic. Integers wrap.
inline unsigned atomicAdd(unsigned* p, unsigned x) { return samk::shim::exchange_memory(p, *p + x); }
inline int atomicAdd(int* p, int x) {
  return samk::shim::exchange_memory(p,
                                     static_cast<int>(static_cast<unsigned>(*p) + static_cast<unsigned>(x)));
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  return samk::shim::exchange_memory(p, *p + x);
}
inline float atomicAdd(float* p, float x) { return samk::shim::exchange_memory(p, *p + x); }
inline double atomicAdd(double* p, double x) { return samk::shim::exchange_memory(p, *p + x); }
inline unsigned atomicMax(unsigned* p, unsigned x) { return samk::shim::exchange_memory(p, *p > x ? *p : x); }
inline unsigned atomicOr(unsigned* p, unsigned x) { return samk::shim::exchange_memory(p, *p | x); }
inline unsigned atomicExch(unsigned* p, unsigned x) { return samk::shim::exchange_memory(p, x); }

// ---- bits ----------------------------------------------------------------------------------------------

namespace samk::shim {
template <class To, class From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "only the type changes");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace samk::shim

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline long long __double_as_longlong(double x) { return samk::shim::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return samk::shim::same_bits<double>(x); }
inline int __float_as_int(float x) { return samk::shim::same_bits<int>(x); }
inline float __int_as_float(int x) { return samk::shim::same_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return samk::shim::same_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return samk::shim::same_bits<float>(x); }

// ---- host ----------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorLaunchFailure = 719,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

struct cudaFuncAttributes {};

typedef struct CUstream_st* cudaStream_t;

// For cudaErrorLaunchFailure: what went wrong in the calling thread's last launch that failed.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream = nullptr);

// Shuffles blocks, and the threads between two barriers; 0 is the natural order. The environment variable
// SAM_KERNELS_SHIM_SEED sets it at the start.
extern "C" __attribute__((visibility("default"))) void samk_shim_seed(uint64_t seed);
// What the driver and the device say of themselves from now on: a version such as 12010, a compute capability
// such as 90, and what asking for a kernel's attributes returns.
extern "C" __attribute__((visibility("default"))) void samk_shim_pretend(int32_t driver, int32_t capability,
                                                                         int32_t kernel_status);
// How many kernels were launched so far.
extern "C" __attribute__((visibility("default"))) uint64_t samk_shim_launches();

namespace samk::shim {

struct Kernel {
  void (*function)();                                                  // takes its parameters by value
  void (*call)(void (*function)(), const void* parameters) = nullptr;  // copies them
  const void* parameters = nullptr;
  size_t bytes = 0;
};

cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes);
cudaError_t find(void (*function)());

}  // namespace samk::shim

template <class P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*kernel)(P)) {
  return samk::shim::find(reinterpret_cast<void (*)()>(kernel));
}

// There is no dynamic shared memory: shared_bytes must be 0.
template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes = 0, cudaStream_t = nullptr) {
  static_assert(std::is_trivially_copyable<P>::value, "parameters travel as bytes");
  const auto call = [](void (*function)(), const void* parameters) {
    reinterpret_cast<void (*)(P)>(function)(*static_cast<const P*>(parameters));
  };
  return samk::shim::launch({reinterpret_cast<void (*)()>(kernel), call, arguments[0], sizeof(P)}, grid,
                            block, shared_bytes);
}

#endif  // SAM_KERNELS_TESTS_SHIM_CUDA_RUNTIME_H_
