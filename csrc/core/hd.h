// Functions that the host and, under nvcc, the device compile from one source.
#ifndef SAM_KERNELS_CORE_HD_H_
#define SAM_KERNELS_CORE_HD_H_

#if defined(__CUDACC__)
#define SAMK_HD __host__ __device__ __forceinline__
// For long functions: inlined into unrolled loops they would take minutes to compile and spill registers.
#define SAMK_HD_CALL static __host__ __device__ __noinline__
#else
#define SAMK_HD inline __attribute__((always_inline))
#define SAMK_HD_CALL static inline
#endif

#endif  // SAM_KERNELS_CORE_HD_H_
