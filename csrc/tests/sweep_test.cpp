// The loops of the CUDA engine: which thread meets which elements, in which order, and what it reads ahead.
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "engine/cuda.cuh"
#include "tests/check.h"

namespace {

using samk::kThreads;

struct Met {
  int first, width;
  bool operator==(const Met& other) const { return first == other.first && width == other.width; }
};

// What every thread met, in its order, and the most packs that it held before it finished one.
struct Record {
  std::vector<Met> met[kThreads];
  int held[kThreads] = {}, most[kThreads] = {};
};

struct Arguments {
  Record* record;
  int n;
  bool is_aligned, is_sum;
};

constexpr int kWidth = 4;

template <int kUnroll>
__global__ void sweep_kernel(const __grid_constant__ Arguments p) {
  const int t = static_cast<int>(threadIdx.x);
  const auto load = [&](int i, auto) {
    p.record->most[t] = std::max(p.record->most[t], ++p.record->held[t]);
    return i;
  };
  const auto finish = [&](int i, int loaded, auto access) {
    CHECK(i == loaded);
    --p.record->held[t];
    p.record->met[t].push_back({i, decltype(access)::kWidth});
  };
  if (p.is_sum) {
    samk::sweep_in_order<kWidth, kUnroll>(p.n, p.is_aligned, load, finish);
  } else {
    samk::sweep<kWidth, kUnroll>(p.n, p.is_aligned, load, finish);
  }
}

template <int kUnroll>
Record sweep(int n, bool is_aligned, bool is_sum) {
  Record record;
  Arguments arguments{&record, n, is_aligned, is_sum};
  void* pointers[] = {&arguments};
  CHECK(cudaLaunchKernel(sweep_kernel<kUnroll>, dim3(1), dim3(kThreads), pointers, 0, nullptr) ==
        cudaSuccess);
  return record;
}

std::vector<int> owners(const Record& record, int n) {
  std::vector<int> owner(n, -1);
  for (int t = 0; t < kThreads; ++t) {
    for (const Met& met : record.met[t]) {
      for (int i = met.first; i < met.first + met.width; ++i) {
        CHECK(i < n && owner[i] == -1);
        if (i < n) owner[i] = t;
      }
    }
  }
  return owner;
}

template <int kUnroll>
void test_size(int n) {
  const int whole = n / kWidth * kWidth;
  for (bool is_sum : {false, true}) {
    for (bool is_aligned : {false, true}) {
      const Record record = sweep<kUnroll>(n, is_aligned, is_sum);
      const std::vector<int> owner = owners(record, n);
      // A warp touches neighbours: packs, or elements where a pass writes and packs cannot be had.
      const bool by_packs = is_aligned || is_sum;
      for (int i = 0; i < n; ++i) {
        const int expected = by_packs && i < whole ? i / kWidth : by_packs ? i - whole : i;
        CHECK(owner[i] == expected % kThreads);
      }
      const int ahead = by_packs ? kUnroll : std::max(4, 2 * kUnroll);
      const int packs = by_packs ? whole / kWidth : n;
      const int each = (packs + kThreads - 1) / kThreads;  // of thread 0
      CHECK(record.most[0] == (each >= ahead ? ahead : std::min(n, 1)));
    }
  }
  // A sum adds the same in the same order wherever its elements are.
  const Record here = sweep<kUnroll>(n, true, true), there = sweep<kUnroll>(n, false, true);
  for (int t = 0; t < kThreads; ++t) CHECK(here.met[t] == there.met[t]);
}

}  // namespace

int main() {
  for (int n : {0, 1, 3, 4, 5, kThreads - 1, kThreads, 4 * kThreads, 4 * kThreads + 7, 8 * kThreads + 3,
                35 * kThreads + 2}) {
    test_size<1>(n);
    test_size<2>(n);
    test_size<4>(n);
  }
  return finish("sweep_test");
}
