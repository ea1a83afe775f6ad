#include "core/chunk_plan.h"

#include "tests/check.h"

namespace {

using samk::ChunkPlan;

// Every element of every tensor is in exactly one chunk, and every chunk in exactly one span.
void check_cover(const std::vector<int64_t>& numel) {
  const ChunkPlan plan(numel.data(), static_cast<int64_t>(numel.size()));
  std::vector<int64_t> covered(numel.size(), 0);
  int32_t last_tensor = -1;
  for (const samk::Chunk& chunk : plan.chunks()) {
    CHECK(chunk.size > 0 && chunk.size <= ChunkPlan::kChunkSize);
    CHECK(chunk.tensor >= last_tensor);
    CHECK(chunk.begin == covered[chunk.tensor]);
    covered[chunk.tensor] += chunk.size;
    last_tensor = chunk.tensor;
  }
  for (size_t t = 0; t < numel.size(); ++t) CHECK(covered[t] == numel[t]);
  int64_t next = 0;
  for (const samk::Span& span : plan.spans()) {
    CHECK(span.first == next && span.last > span.first);
    next = span.last;
  }
  CHECK(next == static_cast<int64_t>(plan.chunks().size()));
}

}  // namespace

int main() {
  const int64_t chunk = ChunkPlan::kChunkSize;
  check_cover({});
  check_cover({0});
  check_cover({1});
  check_cover({chunk - 1, chunk, chunk + 1});
  check_cover({5, 3 * chunk + 7, 0});  // an empty last tensor must not swallow the chunks before it
  check_cover({0, 0, 1, 0});
  check_cover(std::vector<int64_t>(10000, 3));
  check_cover({(int64_t{1} << 31) + 5});  // beyond 32-bit indices
  return finish("chunk_plan_test");
}
