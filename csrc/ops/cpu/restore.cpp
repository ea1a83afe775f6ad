#include "engine/cpu.h"
#include "ops/cpu/passes.h"

namespace samk {
namespace SAMK_ISA {

int restore(const samk_plan& plan, const samk_restore_args& a) {
  if (check_one_dtype("restore_", a.params.dtype, a.snapshots) != 0) return 1;
  if (check_masters("restore_", a.params.dtype, a.masters) != 0) return 1;
  const bool large = exceeds_cache(plan.chunks.total() * dtype_bytes(a.params.dtype) * 2);
  return with_dtype("restore_", a.params.dtype, [&](auto type) {
    using T = decltype(type);
    for_each_chunk(plan, [&](const Chunk& chunk, int64_t) {
      T* w = element<T>(a.params, chunk.tensor, chunk.begin);
      if (w == nullptr) return;
      if constexpr (is_half<T>) {
        if (const float* master = element<const float>(a.masters, chunk.tensor, chunk.begin)) {
          round_chunk(w, master, chunk.size, large && can_stream(w));
          return;
        }
      }
      if (!has(a.snapshots, chunk.tensor)) return;
      const uint64_t* words = words_of(a.masks, chunk);
      if (const T* compact = compact_of<const T>(a.snapshots, a.offsets, chunk)) {
        restore_selected(w, compact, words, chunk.size);
        return;
      }
      const bool streaming = large && can_stream(w);
      copy_words(w, element<const T>(a.snapshots, chunk.tensor, chunk.begin), words, chunk.size, streaming);
    });
    return 0;
  });
}

}  // namespace SAMK_ISA
}  // namespace samk
