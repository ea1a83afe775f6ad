// bf16 and fp16 as bit patterns, and their conversions by integer arithmetic: the same bits on
// every instruction set, subnormals and NaN included. GPUs convert in one instruction and differ in
// the payload of a NaN only.
#ifndef SAM_KERNELS_CORE_HALF_H_
#define SAM_KERNELS_CORE_HALF_H_

#include <cstdint>
#include <cstring>

#include "core/hd.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace samk {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

SAMK_HD float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SAMK_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SAMK_HD float to_float(bf16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

// Round to nearest, ties to even; the AVX512-BF16 instruction would flush subnormals.
SAMK_HD bf16 to_bf16(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
#endif
}

// Rounded up or down by 16 random bits, away from 0 where they and the bits that are dropped make a carry.
// What is a bf16 already stays so; infinity too.
SAMK_HD bf16 to_bf16_at_random(float value, uint32_t sixteen) {
  const uint32_t bits = float_to_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + sixteen) >> 16)};
}

SAMK_HD float to_float(f16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13 & 0x7fffffu));
  // Scaling by a power of two is exact and turns subnormals into normals.
  const float scaled = bits_to_float(magnitude << 13) * bits_to_float(0x77800000u);  // 2^112
  return bits_to_float(sign | float_to_bits(scaled));
#endif
}

SAMK_HD f16 to_f16(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past 65504
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 lets the float adder round at the last subnormal bit.
    const float aligned = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(aligned) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

}  // namespace samk

#endif  // SAM_KERNELS_CORE_HALF_H_
