// Passes under masks against the passes without, and selections against a plain loop. Every list is exactly
// as long as it must be, so that a sanitizer sees whoever goes a word too far.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/half.h"
#include "core/mask.h"
#include "math/random.h"
#include "math/rank.h"
#include "tests/check.h"

#ifdef SAMK_EMULATED
extern "C" void samk_shim_seed(uint64_t seed);
#endif

namespace {

#ifdef SAMK_EMULATED
void use_order(uint32_t order) { samk_shim_seed(order); }
#else
void use_order(uint32_t order) {
  samk_set_thread_pool(pool_parallel_for, pool_num_threads);
  pool_threads = order + 1;
}
#endif

// Around words and chunks. Two of the tensors are dense.
const std::vector<int64_t> kSizes = {1, 63, 64, 65, 0, 2047, 2048, 2049, 8199, 130, 16385};
bool is_dense(size_t t) { return t == 3 || t == 7; }

template <class T>
struct List {
  std::vector<std::vector<T>> memory;
  int shift;
  List(int shift_, Random* random) : shift(shift_) {
    for (int64_t n : kSizes) {
      memory.emplace_back(n + shift);
      for (T& x : memory.back()) x = cast(random->next());
    }
  }
  static T cast(double x) {
    if constexpr (std::is_same_v<T, samk::f16>) {
      return samk::to_f16(static_cast<float>(x));
    } else {
      return static_cast<T>(x);
    }
  }
  T* at(size_t t) { return memory[t].data() + shift; }
  std::vector<void*> data() {
    std::vector<void*> data;
    for (size_t t = 0; t < kSizes.size(); ++t) {
      data.push_back(kSizes[t] + shift == 0 ? static_cast<void*>(&nothing) : at(t));
    }
    return data;
  }
  static inline T nothing;
};

struct Masks {
  std::vector<std::vector<uint64_t>> words;
  explicit Masks(Random* random) {
    for (int64_t n : kSizes) {
      words.emplace_back(samk::word_count(n), uint64_t{0});
      for (int64_t i = 0; i < n; ++i) {
        const bool is_set = i / 64 % 3 != 1 && random->next() < 0.2;
        words.back()[i / 64] |= uint64_t{is_set} << (i % 64);
      }
    }
  }
  bool has(size_t t, int64_t i) const { return samk::has_bit(words[t].data(), i); }
  std::vector<void*> data(bool has_dense) {
    std::vector<void*> data;
    for (size_t t = 0; t < kSizes.size(); ++t) {
      void* const own = words[t].empty() ? &nothing : words[t].data();
      data.push_back(has_dense && is_dense(t) ? nullptr : own);
    }
    return data;
  }
  static inline uint64_t nothing;
};

struct Plan {
  samk_plan* plan = samk_plan_create(kSizes.data(), static_cast<int64_t>(kSizes.size()));
  std::vector<char> workspace = std::vector<char>(samk_plan_workspace_bytes(plan) + 1);
  std::vector<int32_t> row = std::vector<int32_t>(kSizes.size(), 0);
  std::vector<double> table = std::vector<double>(SAMK_COLUMNS, 0.0);
  Plan() {
    table[SAMK_METRIC] = SAMK_ADAPTIVE;
    table[SAMK_ETA] = 0.1;
    table[SAMK_RHO] = 0.7;
    table[SAMK_LR] = 0.1;
    table[SAMK_MOMENTUM] = 0.9;
  }
  ~Plan() { samk_plan_destroy(plan); }
};

template <class T>
bool same(const List<T>& a, const List<T>& b) {
  for (size_t t = 0; t < a.memory.size(); ++t) {
    if (!same_bytes(a.memory[t].data(), b.memory[t].data(), a.memory[t].size() * sizeof(T))) return false;
  }
  return true;
}

template <class T>
void test_passes(int32_t code, int shift, int32_t shape) {
  Plan plan;
  Random random(5);
  List<T> w(shift, &random), g(shift, &random), snapshot(shift, &random), buffer(shift, &random);
  Masks masks(&random);
  const List<T> start = w, blank = snapshot;
  List<T> twin = w, saved = snapshot;
  const double peak = 3, norm = 2, guard = std::numeric_limits<double>::infinity();
  auto ws = w.data(), gs = g.data(), ss = snapshot.data(), ms = masks.data(true), bs = buffer.data();
  auto twins = twin.data(), saves = saved.data();
  samk_perturb_args a{};
  a.params = {twins.data(), code};
  a.grads = {gs.data(), code};
  a.snapshots = {saves.data(), code};
  a.row = plan.row.data();
  a.table = plan.table.data();
  a.shape = shape;
  a.q = 1.5;
  a.peak = &peak;
  a.norm = &norm;
  CHECK(samk_perturb(plan.plan, &a) == 0);
  a.params.data = ws.data();
  a.snapshots.data = ss.data();
  a.masks = {ms.data(), 0};
  CHECK(samk_perturb(plan.plan, &a) == 0);
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const int64_t k = i + shift;
      const bool moves = is_dense(t) || masks.has(t, i);
      CHECK(same_bytes(&w.memory[t][k], moves ? &twin.memory[t][k] : &start.memory[t][k], sizeof(T)));
      bool saves = is_dense(t) || masks.words[t][i / 64] != 0;
#ifndef SAMK_EMULATED  // the CPU engine saves scattered words that are 0 with their neighbours
      saves |= same_bytes(&snapshot.memory[t][k], &start.memory[t][k], sizeof(T));
#endif
      CHECK(same_bytes(&snapshot.memory[t][k], saves ? &start.memory[t][k] : &blank.memory[t][k], sizeof(T)));
    }
  }

  // A snapshot may be where the gradient is.
  List<T> both = g, moved = start;
  auto boths = both.data(), moves = moved.data();
  a.params.data = moves.data();
  a.grads.data = a.snapshots.data = boths.data();
  CHECK(samk_perturb(plan.plan, &a) == 0);
  CHECK(same(moved, w));
  const samk_restore_args back{{moves.data(), code}, {boths.data(), code}, {}, {ms.data(), 0}, {}, {}};
  CHECK(samk_restore(plan.plan, &back) == 0);
  CHECK(same(moved, start));

  samk_descend_args d{};
  d.params = {ws.data(), code};
  d.grads = {gs.data(), code};
  d.snapshots = {ss.data(), code};
  d.masks = {ms.data(), 0};
  d.state[0] = {bs.data(), code};
  d.row = plan.row.data();
  d.table = plan.table.data();
  d.guard = &guard;
  d.workspace = plan.workspace.data();
  const List<T> perturbed = w, kept = buffer;
  CHECK(samk_descend(plan.plan, &d) == 0);
  CHECK(same(w, start) && same(buffer, kept));
  w.memory = perturbed.memory;
  d.params.data = (ws = w.data()).data();
  const samk_restore_args r{{ws.data(), code}, {ss.data(), code}, {}, {ms.data(), 0}, {}, {}};
  CHECK(samk_restore(plan.plan, &r) == 0);
  CHECK(same(w, start));
  w.memory = perturbed.memory;
  d.params.data = (ws = w.data()).data();
  d.guard = nullptr;
  CHECK(samk_descend(plan.plan, &d) == 0);
  List<T> expected = start, buffers = kept;
  auto es = expected.data(), bufs = buffers.data();
  d.params.data = es.data();
  d.state[0].data = bufs.data();
  d.snapshots = d.masks = {};
  CHECK(samk_descend(plan.plan, &d) == 0);
  CHECK(same(w, expected) && same(buffer, buffers));
}

void test_sums(int shift) {
  Plan plan;
  Random random(6);
  List<float> w(shift, &random), g(shift, &random);
  Masks masks(&random);
  auto ws = w.data(), gs = g.data(), ms = masks.data(true);
  double sum = 0, largest = 0, out = 0;
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      float& x = g.at(t)[i];
      if (!is_dense(t) && !masks.has(t, i)) {
        x = std::numeric_limits<float>::quiet_NaN();
        continue;
      }
      const double u = (std::fabs(w.at(t)[i]) + 0.1) * x;
      sum += u * u;
      largest = std::max(largest, std::fabs(u));
    }
  }
  samk_sq_norm_args a{};
  a.grads = {gs.data(), SAMK_F32};
  a.params = {ws.data(), SAMK_F32};
  a.masks = {ms.data(), 0};
  a.row = plan.row.data();
  a.table = plan.table.data();
  a.out = &out;
  a.workspace = plan.workspace.data();
  CHECK(samk_sq_norm(plan.plan, &a) == 0);
  CHECK(std::fabs(out - sum) <= 1e-5 * sum);
  a.moment = SAMK_PEAK;
  CHECK(samk_sq_norm(plan.plan, &a) == 0);
  CHECK(std::fabs(out - largest) <= 1e-6 * largest);
}

struct Selection {
  bool is_random;
  int within;  // 0 without, 1 within, 2 outside
  bool add;
};

template <class T>
void test_selection(int32_t code, int shift, Selection kind) {
  constexpr uint64_t kSeed = uint64_t{3} << 40 | 9;
  constexpr int32_t kShift = 20;
  Plan plan;
  Random random(7);
  List<T> scores(shift, &random);
  Masks within(&random), masks(&random);
  const Masks before = masks;
  std::vector<uint32_t> number;
  std::vector<int64_t> position;
  for (size_t t = 0; t < kSizes.size(); ++t) {
    number.push_back(static_cast<uint32_t>(5 * t + 1));
    position.push_back(static_cast<int64_t>(t) << 30);
  }
  auto data = scores.data(), parts = within.data(true), written = masks.data(false);
  const samk_ranks ranks{
      {kind.is_random ? nullptr : data.data(), code}, kind.is_random,  kSeed, 4, number.data(),
      {kind.within == 0 ? nullptr : parts.data(), 0}, kind.within == 2};
  const auto takes_part = [&](size_t t, int64_t i) {
    if (kind.within == 0) return true;
    return (is_dense(t) || within.has(t, i)) == (kind.within == 1);
  };
  const auto rank = [&](size_t t, int64_t i) {
    if (kind.is_random) return samk::rank_of_word(samk::random_word(kSeed, 4, number[t], i));
    if constexpr (std::is_same_v<T, samk::f16>) {
      return samk::rank_of(samk::to_float(scores.at(t)[i]));
    } else {
      return samk::rank_of(static_cast<float>(scores.at(t)[i]));
    }
  };
  const int32_t threshold = rank(8, 1) >> kShift;
  std::vector<int64_t> counts(2048, 0), expected(2048, 0), candidates, got(40000, -1);
  bool is_marked = true;
  int64_t found = 0;
  const samk_count_args c{ranks, {written.data(), 0}, 0, kShift, 11, counts.data(), {}};
  CHECK(samk_count(plan.plan, &c) == 0);
  const samk_mark_args m{ranks,      {written.data(), 0},
                         threshold,  kShift,
                         kind.add,   position.data(),
                         got.data(), static_cast<int64_t>(got.size()),
                         &found,     {}};
  CHECK(samk_mark(plan.plan, &m) == 0);
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const int32_t own = rank(t, i), top = own >> kShift;
      const bool has_part = takes_part(t, i);
      if (has_part) ++expected[top];
      if (has_part && top == threshold)
        candidates.push_back(samk::candidate_of(own, kShift, position[t] + i));
      is_marked &= masks.has(t, i) == ((has_part && top > threshold) || (kind.add && before.has(t, i)));
    }
    if (!masks.words[t].empty() && kSizes[t] % 64 != 0) {
      is_marked &= (masks.words[t].back() & ~samk::low_bits(kSizes[t] % 64)) == 0;
    }
  }
  CHECK(is_marked);
  CHECK(counts == expected);
  CHECK(found == static_cast<int64_t>(candidates.size()));
  got.resize(found);
  std::sort(got.begin(), got.end());
  std::sort(candidates.begin(), candidates.end());
  CHECK(got == candidates);
}

template <class T>
void test_accumulate(int32_t code, int shift) {
  Plan plan;
  Random random(8);
  List<float> scores(shift, &random);
  List<T> g(shift, &random);
  List<float> expected = scores;
  auto data = scores.data(), gs = g.data();
  const samk_accumulate_args a{{data.data(), SAMK_F32}, {gs.data(), code}, {}};
  CHECK(samk_accumulate(plan.plan, &a) == 0);
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      float x;
      if constexpr (std::is_same_v<T, samk::f16>) {
        x = samk::to_float(g.at(t)[i]);
      } else {
        x = static_cast<float>(g.at(t)[i]);
      }
      expected.at(t)[i] = std::fma(x, x, expected.at(t)[i]);
    }
  }
  CHECK(same(scores, expected));
}

}  // namespace

int main() {
  for (uint32_t order : {0u, 1u, 2u}) {
    use_order(order);
    for (int shift : {0, 1}) {
      for (int32_t shape : {SAMK_LINEAR, SAMK_SIGN, SAMK_POWERED}) {
        test_passes<float>(SAMK_F32, shift, shape);
        test_passes<samk::f16>(SAMK_F16, shift, shape);
      }
      test_sums(shift);
      for (int within : {0, 1, 2}) {
        test_selection<float>(SAMK_F32, shift, {false, within, false});
        test_selection<double>(SAMK_F64, shift, {false, within, true});
        test_selection<samk::f16>(SAMK_F16, shift, {false, within, false});
        test_selection<float>(SAMK_F32, shift, {true, within, within == 1});
      }
      test_accumulate<float>(SAMK_F32, shift);
      test_accumulate<double>(SAMK_F64, shift);
      test_accumulate<samk::f16>(SAMK_F16, shift);
    }
  }
  return finish("masks_test");
}
