#include "ops/cpu/passes.h"
#include "ops/cpu/ranks.h"

namespace samk {
namespace SAMK_ISA {
namespace {

constexpr int64_t kChunkWords = ChunkPlan::kChunkSize / kWordBits;

// Writes the words of a chunk. Where candidates are wanted, `level` takes the bits of those at the threshold;
// returns how many they are.
int64_t mark_chunk(const samk_mark_args& a, const ChunkRanks& ranks, int64_t words, uint64_t* mask,
                   uint64_t* level) {
  int64_t found = 0;
  for (int64_t k = 0; k < words; ++k) {
    const uint64_t part = ranks.part(k);
    uint64_t above = 0;
    level[k] = 0;
    if (part != 0) {
      WordOfRanks word;
      ranks.read(k, &word);
      above = part & word.above(a.shift, a.threshold);
      if (a.candidates != nullptr) level[k] = part & word.equal(a.shift, a.threshold);
    }
    mask[k] = a.add ? mask[k] | above : above;
    found += __builtin_popcountll(level[k]);
  }
  return found;
}

// Few words have any, so their ranks are worked out once more rather than kept.
void collect(const samk_mark_args& a, const ChunkRanks& ranks, int64_t words, const uint64_t* level,
             int64_t position, int64_t at) {
  for (int64_t k = 0; k < words && at < a.capacity; ++k) {
    if (level[k] == 0) continue;
    WordOfRanks word;
    ranks.read(k, &word);
    for (uint64_t bits = level[k]; bits != 0 && at < a.capacity; bits &= bits - 1) {
      const int i = __builtin_ctzll(bits);
      a.candidates[at++] = candidate_of(word.rank[i], a.shift, position + k * kWordBits + i);
    }
  }
}

}  // namespace

int mark(const samk_plan& plan, const samk_mark_args& a) {
  if (a.shift < 0 || a.shift > 31) return fail("mark_: expected a shift of 0 to 31");
  if (a.candidates != nullptr && (a.position == nullptr || a.found == nullptr)) {
    return fail("mark_: candidates need the position of every tensor and a counter");
  }
  if (check_ranks("mark_", a.ranks) != 0) return 1;
  for_each_chunk(plan, [&](const Chunk& chunk, int64_t) {
    uint64_t* mask = element<uint64_t>(a.masks, chunk.tensor, chunk.begin / kWordBits);
    if (mask == nullptr) return;
    const ChunkRanks ranks(a.ranks, chunk);
    const int64_t words = word_count(chunk.size);
    uint64_t level[kChunkWords];
    const int64_t found = mark_chunk(a, ranks, words, mask, level);
    if (found == 0) return;
    const int64_t at = __atomic_fetch_add(a.found, found, __ATOMIC_RELAXED);
    collect(a, ranks, words, level, a.position[chunk.tensor] + chunk.begin, at);
  });
  return 0;
}

}  // namespace SAMK_ISA
}  // namespace samk
