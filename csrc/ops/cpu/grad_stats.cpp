#include "engine/cpu.h"
#include "ops/cpu/passes.h"

namespace samk {
namespace SAMK_ISA {
namespace {

template <class T, int kLists>
void dot_chunk(const T* const* x, int64_t n, double* out) {
  using V = typename Opmath<T>::V;
  using S = typename Opmath<T>::S;
  constexpr int kDots = kLists * (kLists + 1) / 2;
  // Two sets of sums alternate, so that an add does not wait for the one before it.
  V acc[2][kDots];
  for (auto& set : acc) {
    for (V& v : set) v = V(S(0));
  }
  sweep(n, [&](int64_t i, auto part) {
    V v[kLists];
    for (int a = 0; a < kLists; ++a) v[a] = part.get(x[a] + i);
    V* set = acc[i / kLanes % 2];
    int k = 0;
    for (int a = 0; a < kLists; ++a) {
      for (int b = a; b < kLists; ++b, ++k) set[k] = set[k] + v[a] * v[b];
    }
  });
  for (int k = 0; k < kDots; ++k) out[k] = sum_lanes(acc[0][k] + acc[1][k]);
}

// The dots among the lists that have this tensor; the others stay zero.
template <class T>
void stats_chunk(const samk_grad_stats_args& a, const Chunk& chunk, double* out) {
  const T* present[3];
  int index[3], count = 0;
  for (int l = 0; l < a.lists; ++l) {
    const T* x = element<T>(a.list[l], chunk.tensor, chunk.begin);
    if (x == nullptr) continue;
    present[count] = x;
    index[count++] = l;
  }
  double dots[6];
  if (count == 1) dot_chunk<T, 1>(present, chunk.size, dots);
  if (count == 2) dot_chunk<T, 2>(present, chunk.size, dots);
  if (count == 3) dot_chunk<T, 3>(present, chunk.size, dots);
  int k = 0;
  for (int x = 0; x < count; ++x) {
    for (int y = x; y < count; ++y, ++k) {
      const int i = index[x], j = index[y];
      out[i * a.lists - i * (i - 1) / 2 + (j - i)] = dots[k];
    }
  }
}

}  // namespace

int grad_stats(const samk_plan& plan, const samk_grad_stats_args& a) {
  if (a.lists < 1 || a.lists > 3) return fail("grad_stats: expected one to three lists");
  for (int l = 1; l < a.lists; ++l) {
    if (check_one_dtype("grad_stats", a.list[0].dtype, a.list[l]) != 0) return 1;
  }
  const int dots = a.lists * (a.lists + 1) / 2;
  const auto& chunks = plan.chunks.chunks();
  double* const partials = plan.cleared_partials(chunks.size() * dots);
  const int status = with_dtype("grad_stats", a.list[0].dtype, [&](auto type) {
    using T = decltype(type);
    for_each_chunk(plan,
                   [&](const Chunk& chunk, int64_t c) { stats_chunk<T>(a, chunk, partials + c * dots); });
    return 0;
  });
  if (status != 0) return status;
  std::fill_n(a.out, dots, 0.0);
  if (a.per_tensor != nullptr) std::fill_n(a.per_tensor, plan.chunks.count() * dots, 0.0);
  for (size_t c = 0; c < chunks.size(); ++c) {
    for (int k = 0; k < dots; ++k) {
      const double own = partials[c * dots + k];
      a.out[k] += own;
      if (a.per_tensor != nullptr) a.per_tensor[chunks[c].tensor * int64_t{dots} + k] += own;
    }
  }
  return 0;
}

}  // namespace SAMK_ISA
}  // namespace samk
