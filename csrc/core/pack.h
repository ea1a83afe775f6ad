// Sixteen numbers at a time, on every instruction set. Sixteen everywhere means one reduction tree,
// and so the same bits from AVX-512, AVX2 and plain C++.
//
// Bits of a mask arrive as an integer whose bit i belongs to lane i; what is above bit 15 is not looked at.
//
// Compiled once per instruction set: SAMK_ISA names the namespace, __AVX512F__ / __AVX2__ choose.
#ifndef SAM_KERNELS_CORE_PACK_H_
#define SAM_KERNELS_CORE_PACK_H_

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/half.h"

#ifndef SAMK_ISA
#define SAMK_ISA baseline
#endif
#define SAMK_INLINE inline __attribute__((always_inline))

namespace samk {
namespace SAMK_ISA {

constexpr int kLanes = 16;

// Plain C++ pack: all of baseline, and double everywhere (the compiler vectorises the loops).
template <class S>
struct Lanes {
  using Scalar = S;
  S v[kLanes];

  Lanes() = default;
  SAMK_INLINE explicit Lanes(S x) {
    for (int i = 0; i < kLanes; ++i) v[i] = x;
  }
  template <class F>
  static SAMK_INLINE Lanes each(F f) {
    Lanes r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
    return r;
  }
  friend SAMK_INLINE Lanes operator+(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend SAMK_INLINE Lanes operator-(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend SAMK_INLINE Lanes operator*(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend SAMK_INLINE Lanes operator/(Lanes a, Lanes b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
};

template <class S>
SAMK_INLINE Lanes<S> fma(Lanes<S> a, Lanes<S> b, Lanes<S> c) {
  return Lanes<S>::each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
template <class S>
SAMK_INLINE Lanes<S> sqrt(Lanes<S> a) {
  return Lanes<S>::each([&](int i) { return std::sqrt(a.v[i]); });
}
template <class S>
SAMK_INLINE Lanes<S> abs(Lanes<S> a) {
  return Lanes<S>::each([&](int i) { return std::fabs(a.v[i]); });
}
template <class S>
SAMK_INLINE Lanes<S> max(Lanes<S> a, Lanes<S> b) {
  return Lanes<S>::each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}

#if defined(__AVX512F__)
struct F32 {
  using Scalar = float;
  __m512 v;
  F32() = default;
  SAMK_INLINE explicit F32(float x) : v(_mm512_set1_ps(x)) {}
  SAMK_INLINE explicit F32(__m512 x) : v(x) {}
  friend SAMK_INLINE F32 operator+(F32 a, F32 b) { return F32(_mm512_add_ps(a.v, b.v)); }
  friend SAMK_INLINE F32 operator-(F32 a, F32 b) { return F32(_mm512_sub_ps(a.v, b.v)); }
  friend SAMK_INLINE F32 operator*(F32 a, F32 b) { return F32(_mm512_mul_ps(a.v, b.v)); }
  friend SAMK_INLINE F32 operator/(F32 a, F32 b) { return F32(_mm512_div_ps(a.v, b.v)); }
};
SAMK_INLINE F32 fma(F32 a, F32 b, F32 c) { return F32(_mm512_fmadd_ps(a.v, b.v, c.v)); }
SAMK_INLINE F32 sqrt(F32 a) { return F32(_mm512_sqrt_ps(a.v)); }
SAMK_INLINE F32 abs(F32 a) { return F32(_mm512_abs_ps(a.v)); }
SAMK_INLINE F32 max(F32 a, F32 b) { return F32(_mm512_max_ps(a.v, b.v)); }
SAMK_INLINE F32 load(const float* p) { return F32(_mm512_loadu_ps(p)); }
SAMK_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
SAMK_INLINE void stream(float* p, F32 x) { _mm512_stream_ps(p, x.v); }
SAMK_INLINE F32 load(const bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return F32(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
}
SAMK_INLINE __m256i pack_bf16(F32 x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
}
SAMK_INLINE F32 load(const f16* p) {
  return F32(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
SAMK_INLINE __m256i pack_f16(F32 x) {
  const __m256i r = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m256i sign = _mm256_and_si256(r, _mm256_set1_epi16(static_cast<short>(0x8000)));
  // One NaN everywhere: the instruction keeps payload bits that the portable conversion drops.
  return _mm256_mask_mov_epi16(r, nan, _mm256_or_si256(sign, _mm256_set1_epi16(0x7e00)));
}
SAMK_INLINE F32 select(uint32_t bits, F32 yes, F32 no) {
  return F32(_mm512_mask_blend_ps(static_cast<__mmask16>(bits), no.v, yes.v));
}
SAMK_INLINE __m256i select16(uint32_t bits, __m256i yes, __m256i no) {
  return _mm256_mask_mov_epi16(no, static_cast<__mmask16>(bits), yes);
}
SAMK_INLINE uint32_t nonzero8(const uint64_t* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return _mm512_test_epi64_mask(x, x);
}
SAMK_INLINE uint32_t bits_equal(const int32_t* p, int shift, int32_t x) {
  const __m512i top = _mm512_srl_epi32(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift));
  return _mm512_cmpeq_epi32_mask(top, _mm512_set1_epi32(x));
}
SAMK_INLINE uint32_t bits_above(const int32_t* p, int shift, int32_t x) {
  const __m512i top = _mm512_srl_epi32(_mm512_loadu_si512(p), _mm_cvtsi32_si128(shift));
  return _mm512_cmpgt_epi32_mask(top, _mm512_set1_epi32(x));
}
#elif defined(__AVX2__)
struct F32 {
  using Scalar = float;
  __m256 a, b;
  F32() = default;
  SAMK_INLINE explicit F32(float x) : a(_mm256_set1_ps(x)), b(a) {}
  SAMK_INLINE F32(__m256 low, __m256 high) : a(low), b(high) {}
  friend SAMK_INLINE F32 operator+(F32 x, F32 y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
  }
  friend SAMK_INLINE F32 operator-(F32 x, F32 y) {
    return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
  }
  friend SAMK_INLINE F32 operator*(F32 x, F32 y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
  }
  friend SAMK_INLINE F32 operator/(F32 x, F32 y) {
    return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
  }
};
SAMK_INLINE F32 fma(F32 x, F32 y, F32 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
SAMK_INLINE F32 sqrt(F32 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
SAMK_INLINE F32 abs(F32 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
SAMK_INLINE F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
SAMK_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SAMK_INLINE void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
SAMK_INLINE void stream(float* p, F32 x) {
  _mm256_stream_ps(p, x.a);
  _mm256_stream_ps(p + 8, x.b);
}
SAMK_INLINE __m256 widen_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
SAMK_INLINE F32 load(const bf16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {widen_bf16(_mm_loadu_si128(q)), widen_bf16(_mm_loadu_si128(q + 1))};
}
SAMK_INLINE __m256i round_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i r =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
}
SAMK_INLINE __m256i pack_bf16(F32 x) {
  const __m256i both = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
  return _mm256_permute4x64_epi64(both, 0xd8);
}
SAMK_INLINE F32 load(const f16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
SAMK_INLINE __m128i round_f16(__m256 x) {
  const __m128i r = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i wide = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m128i nan = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const __m128i sign = _mm_and_si128(r, _mm_set1_epi16(static_cast<short>(0x8000)));
  return _mm_blendv_epi8(r, _mm_or_si128(sign, _mm_set1_epi16(0x7e00)), nan);
}
SAMK_INLINE __m256i pack_f16(F32 x) { return _mm256_set_m128i(round_f16(x.b), round_f16(x.a)); }
SAMK_INLINE F32 select(uint32_t bits, F32 yes, F32 no) {
  // Each lane's bit shifted to its sign, which is all that the blend looks at.
  const __m256i all = _mm256_set1_epi32(static_cast<int>(bits));
  const __m256i low = _mm256_sllv_epi32(all, _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
  const __m256i high = _mm256_sllv_epi32(all, _mm256_setr_epi32(23, 22, 21, 20, 19, 18, 17, 16));
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(low)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(high))};
}
SAMK_INLINE __m256i select16(uint32_t bits, __m256i yes, __m256i no) {
  const __m256i lane =
      _mm256_setr_epi16(1, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 9, 1 << 10,
                        1 << 11, 1 << 12, 1 << 13, 1 << 14, static_cast<short>(1 << 15));
  const __m256i own = _mm256_and_si256(_mm256_set1_epi16(static_cast<short>(bits)), lane);
  return _mm256_blendv_epi8(no, yes, _mm256_cmpeq_epi16(own, lane));
}
SAMK_INLINE uint32_t zero4(const uint64_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i zero = _mm256_cmpeq_epi64(x, _mm256_setzero_si256());
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(zero)));
}
SAMK_INLINE uint32_t nonzero8(const uint64_t* p) { return (zero4(p) | zero4(p + 4) << 4) ^ 0xffu; }
SAMK_INLINE __m256i shifted8(const int32_t* p, int shift) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_srl_epi32(x, _mm_cvtsi32_si128(shift));
}
SAMK_INLINE uint32_t signs8(__m256i x) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x)));
}
SAMK_INLINE uint32_t bits_equal(const int32_t* p, int shift, int32_t x) {
  const __m256i all = _mm256_set1_epi32(x);
  return signs8(_mm256_cmpeq_epi32(shifted8(p, shift), all)) |
         signs8(_mm256_cmpeq_epi32(shifted8(p + 8, shift), all)) << 8;
}
SAMK_INLINE uint32_t bits_above(const int32_t* p, int shift, int32_t x) {
  const __m256i all = _mm256_set1_epi32(x);
  return signs8(_mm256_cmpgt_epi32(shifted8(p, shift), all)) |
         signs8(_mm256_cmpgt_epi32(shifted8(p + 8, shift), all)) << 8;
}
#else
using F32 = Lanes<float>;
SAMK_INLINE F32 load(const float* p) {
  F32 x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
SAMK_INLINE void store(float* p, F32 x) { std::memcpy(p, x.v, sizeof x.v); }
SAMK_INLINE void stream(float* p, F32 x) { store(p, x); }
SAMK_INLINE F32 load(const bf16* p) {
  return F32::each([&](int i) { return to_float(p[i]); });
}
SAMK_INLINE void store(bf16* p, F32 x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(x.v[i]);
}
SAMK_INLINE void stream(bf16* p, F32 x) { store(p, x); }
SAMK_INLINE F32 load(const f16* p) {
  return F32::each([&](int i) { return to_float(p[i]); });
}
SAMK_INLINE void store(f16* p, F32 x) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_f16(x.v[i]);
}
SAMK_INLINE void stream(f16* p, F32 x) { store(p, x); }
SAMK_INLINE F32 select(uint32_t bits, F32 yes, F32 no) {
  return F32::each([&](int i) { return (bits >> i & 1) != 0 ? yes.v[i] : no.v[i]; });
}
SAMK_INLINE uint32_t nonzero8(const uint64_t* p) {
  uint32_t bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint32_t>(p[i] != 0) << i;
  return bits;
}
SAMK_INLINE uint32_t bits_equal(const int32_t* p, int shift, int32_t x) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>((p[i] >> shift) == x) << i;
  return bits;
}
SAMK_INLINE uint32_t bits_above(const int32_t* p, int shift, int32_t x) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>((p[i] >> shift) > x) << i;
  return bits;
}
#endif

#if defined(__AVX2__)
SAMK_INLINE void store(bf16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_bf16(x)); }
SAMK_INLINE void stream(bf16* p, F32 x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack_bf16(x)); }
SAMK_INLINE void store(f16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_f16(x)); }
SAMK_INLINE void stream(f16* p, F32 x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack_f16(x)); }
#endif

using F64 = Lanes<double>;
SAMK_INLINE F64 load(const double* p) {
  F64 x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
SAMK_INLINE void store(double* p, F64 x) { std::memcpy(p, x.v, sizeof x.v); }
SAMK_INLINE void stream(double* p, F64 x) {
#if defined(__AVX512F__)
  _mm512_stream_pd(p, _mm512_loadu_pd(x.v));
  _mm512_stream_pd(p + 8, _mm512_loadu_pd(x.v + 8));
#elif defined(__AVX2__)
  for (int i = 0; i < kLanes; i += 4) _mm256_stream_pd(p + i, _mm256_loadu_pd(x.v + i));
#else
  store(p, x);
#endif
}

SAMK_INLINE F64 select(uint32_t bits, F64 yes, F64 no) {
#if defined(__AVX512F__)
  F64 r;
  for (int i = 0; i < kLanes; i += 8) {
    const auto own = static_cast<__mmask8>(bits >> i);
    _mm512_storeu_pd(r.v + i,
                     _mm512_mask_blend_pd(own, _mm512_loadu_pd(no.v + i), _mm512_loadu_pd(yes.v + i)));
  }
  return r;
#else
  return F64::each([&](int i) { return (bits >> i & 1) != 0 ? yes.v[i] : no.v[i]; });
#endif
}

// Writes the lanes whose bit is set; the others keep every bit of what was there, which is `old` as it was
// loaded. Half types are chosen from as they are stored, since a conversion there and back changes the
// payload of a NaN. All sixteen are written, and so lines are written whole.
template <class T, class V>
SAMK_INLINE void store_where(T* p, uint32_t bits, V x, [[maybe_unused]] V old) {
  if constexpr (sizeof(T) >= 4) {
    store(p, select(bits, x, old));
  } else {
    alignas(64) T lanes[kLanes];
    store(lanes, x);
#if defined(__AVX2__)
    __m256i* const q = reinterpret_cast<__m256i*>(p);
    const __m256i yes = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
    _mm256_storeu_si256(q, select16(bits, yes, _mm256_loadu_si256(q)));
#else
    for (int i = 0; i < kLanes; ++i) {
      if ((bits >> i & 1) != 0) p[i] = lanes[i];
    }
#endif
  }
}

// Rounded to fp32 where it is wider.
SAMK_INLINE F32 to_f32(F32 x) { return x; }
SAMK_INLINE F32 to_f32(F64 x) {
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(x.v[i]);
  return load(static_cast<const float*>(lanes));
}

// Sixteen elements from one place to another with every bit kept, NaN payloads included.
template <class T>
SAMK_INLINE void copy16(T* to, const T* from, [[maybe_unused]] bool streaming) {
#if defined(__AVX2__)
  if (streaming) {
    for (unsigned i = 0; i < kLanes * sizeof(T) / 32; ++i) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i,
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i));
    }
    return;
  }
#endif
  std::memcpy(to, from, kLanes * sizeof(T));
}

SAMK_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Opmath: half types calculate in fp32.
template <class T>
struct Opmath {
  using V = F32;
  using S = float;
};
template <>
struct Opmath<double> {
  using V = F64;
  using S = double;
};

// Lane by lane, for what has no vector instruction.
template <class V, class F>
SAMK_INLINE V map(V x, F f) {
  alignas(64) typename V::Scalar lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) lanes[i] = f(lanes[i]);
  return load(static_cast<const typename V::Scalar*>(lanes));
}

}  // namespace SAMK_ISA
}  // namespace samk

#endif  // SAM_KERNELS_CORE_PACK_H_
