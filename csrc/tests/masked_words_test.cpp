// Masks in the passes, and their selection, against plain loops: which memory is touched, and what comes of
// it.
#include <algorithm>
#include <cmath>
#include <limits>

#include "core/chunk_plan.h"
#include "core/half.h"
#include "core/mask.h"
#include "math/random.h"
#include "math/rank.h"
#include "tests/check.h"

namespace {

constexpr const char* kIsas[] = {"baseline", "avx2", "avx512"};
constexpr int64_t kChunk = samk::ChunkPlan::kChunkSize;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Ends of words, of packs and of chunks, an empty tensor, and one that is dense.
const std::vector<int64_t> kSizes = {1,          63,         64,          65,   130,  0,
                                     kChunk - 1, kChunk + 1, kChunk + 64, 1000, 4097, 2 * kChunk + 17};
constexpr size_t kDense = 9;

// Words that lie together, and words that lie among others: the engine treats them differently.
enum class Pattern { kScattered, kRuns, kOnes, kZeros };

uint64_t make_word(Pattern pattern, int64_t k, Random* random) {
  switch (pattern) {
    case Pattern::kScattered:
      return random->bits() % 2 == 0 ? 0 : random->bits() & random->bits();
    case Pattern::kRuns:
      return k / 16 % 3 == 1 ? 0 : k / 16 % 3 == 2 ? ~uint64_t{0} : random->bits();
    case Pattern::kOnes:
      return ~uint64_t{0};
    default:
      return 0;
  }
}

struct Masks {
  std::vector<std::vector<uint64_t>> words;
  std::vector<void*> data;

  Masks(const std::vector<int64_t>& sizes, Pattern pattern, uint64_t seed = 3) {
    Random random(seed);
    for (int64_t n : sizes) {
      std::vector<uint64_t> own(samk::word_count(n));
      for (size_t k = 0; k < own.size(); ++k) own[k] = make_word(pattern, static_cast<int64_t>(k), &random);
      if (n % 64 != 0) own.back() &= samk::low_bits(n % 64);
      words.push_back(std::move(own));
    }
    for (auto& own : words) data.push_back(own.empty() ? &nothing : own.data());
    if (data.size() > kDense) data[kDense] = nullptr;
  }
  samk_list list() const { return {data.data(), SAMK_F32}; }
  bool has(size_t t, int64_t i) const { return data[t] == nullptr || samk::has_bit(words[t].data(), i); }
  bool keeps(size_t t, int64_t i) const { return data[t] == nullptr || words[t][i / 64] != 0; }
  static inline uint64_t nothing;
};

template <class T>
constexpr int32_t code() {
  if (std::is_same_v<T, float>) return SAMK_F32;
  if (std::is_same_v<T, double>) return SAMK_F64;
  return std::is_same_v<T, samk::bf16> ? SAMK_BF16 : SAMK_F16;
}

template <class T>
T cast(double x) {
  if constexpr (std::is_same_v<T, samk::bf16>)
    return samk::to_bf16(static_cast<float>(x));
  else if constexpr (std::is_same_v<T, samk::f16>)
    return samk::to_f16(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

template <class T>
struct List {
  std::vector<std::vector<T>> memory;
  std::vector<void*> data;

  // Every tensor has room for exactly its elements, so that an address sanitizer sees the first one beyond.
  template <class Make>
  List(const std::vector<int64_t>& sizes, Make make) : memory(sizes.size()) {
    for (size_t t = 0; t < sizes.size(); ++t) {
      memory[t].reserve(sizes[t]);
      for (int64_t i = 0; i < sizes[t]; ++i) memory[t].push_back(cast<T>(make(t, i)));
      data.push_back(sizes[t] == 0 ? static_cast<void*>(&nothing) : memory[t].data());
    }
  }
  List(const List&) = delete;
  samk_list list() const { return {data.data(), code<T>()}; }
  T& at(size_t t, int64_t i) { return memory[t][i]; }
  bool same(const List& other, size_t t, int64_t i) const {
    return same_bytes(&memory[t][i], &other.memory[t][i], sizeof(T));
  }
  static inline T nothing;
};

struct Plan {
  samk_plan* plan = samk_plan_create(kSizes.data(), static_cast<int64_t>(kSizes.size()));
  std::vector<int32_t> row = std::vector<int32_t>(kSizes.size(), 0);
  double table[SAMK_COLUMNS] = {};
  Plan() {
    table[SAMK_METRIC] = SAMK_ADAPTIVE;
    table[SAMK_ETA] = 0.1;
    table[SAMK_RHO] = 0.7;
    table[SAMK_LR] = 0.1;
    table[SAMK_MOMENTUM] = 0.9;
    table[SAMK_WEIGHT_DECAY] = 0.01;
  }
  ~Plan() { samk_plan_destroy(plan); }
};

template <class Check>
void for_each_element(Check check) {
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) check(t, i);
  }
}

template <class T>
int perturb(const Plan& p, const List<T>& w, const List<T>& g, const List<T>& s, samk_list masks,
            double norm) {
  samk_perturb_args a{};
  a.params = w.list();
  a.grads = g.list();
  a.snapshots = s.list();
  a.masks = masks;
  a.row = p.row.data();
  a.table = p.table;
  a.norm = &norm;
  return samk_perturb(p.plan, &a);
}

template <class T>
int descend(const Plan& p, const List<T>& w, const List<T>& g, const List<T>* s, const List<T>& m,
            samk_list masks, double guard) {
  samk_descend_args a{};
  a.params = w.list();
  a.grads = g.list();
  if (s != nullptr) a.snapshots = s->list();
  a.masks = masks;
  a.state[0] = m.list();
  a.row = p.row.data();
  a.table = p.table;
  a.rule = SAMK_SGD;
  a.guard = &guard;
  return samk_descend(p.plan, &a);
}

// Snapshots are full of NaN and gradients of infinities where nobody may look, so that one look would show.
template <class T>
void test_perturb(Pattern pattern, double norm) {
  const Plan p;
  const Masks masks(kSizes, pattern);
  Random random(1);
  const auto draw = [&](size_t, int64_t) { return random.next(); };
  List<T> w(kSizes, draw), dense(kSizes, draw);
  const List<T> g(kSizes, [&](size_t t, int64_t i) { return masks.has(t, i) ? random.next() : kInfinity; });
  const List<T> safe(kSizes, [&](size_t, int64_t) { return 0.0; });
  for (size_t t = 0; t < kSizes.size(); ++t) dense.memory[t] = w.memory[t];
  const List<T> poison(kSizes, [](size_t, int64_t) { return kNaN; });
  List<T> s(kSizes, [](size_t, int64_t) { return kNaN; }), all(kSizes, [](size_t, int64_t) { return kNaN; });
  CHECK(perturb(p, w, g, s, masks.list(), norm) == 0);
  CHECK(perturb(p, dense, g, all, {nullptr, 0}, norm) == 0);
  int wrong = 0;
  for_each_element([&](size_t t, int64_t i) {
    wrong += !w.same(masks.has(t, i) ? dense : all, t, i);  // `all` has the old weights
    // Scattered words that are 0 are saved with their neighbours, note: [scattered words]; in a short tensor
    // one such word is enough.
    const bool may_save = pattern == Pattern::kScattered || kSizes[t] < kChunk / 16;
    const bool saves = masks.keeps(t, i) || (may_save && s.same(all, t, i));
    wrong += !s.same(saves ? all : poison, t, i);
  });
  CHECK(wrong == 0);

  // What reads snapshots reads weights where there are none.
  List<T> m(kSizes, draw), m_dense(kSizes, [](size_t, int64_t) { return 0.0; });
  for (size_t t = 0; t < kSizes.size(); ++t) m_dense.memory[t] = m.memory[t];
  List<T> expected(kSizes, [](size_t, int64_t) { return 0.0; }),
      moved(kSizes, [](size_t, int64_t) { return 0.0; });
  for (size_t t = 0; t < kSizes.size(); ++t)
    expected.memory[t] = all.memory[t], moved.memory[t] = w.memory[t];
  CHECK(descend<T>(p, w, safe, &s, m, masks.list(), 1.0) == 0);
  CHECK(descend<T>(p, expected, safe, nullptr, m_dense, {nullptr, 0}, 1.0) == 0);
  for_each_element([&](size_t t, int64_t i) { wrong += !w.same(expected, t, i) || !m.same(m_dense, t, i); });
  CHECK(wrong == 0);
  for (size_t t = 0; t < kSizes.size(); ++t) w.memory[t] = moved.memory[t];
  CHECK(descend<T>(p, w, safe, &s, m, masks.list(), kNaN) == 0);
  for_each_element([&](size_t t, int64_t i) { wrong += !w.same(all, t, i) || !m.same(m_dense, t, i); });
  CHECK(wrong == 0);
  samk_restore_args r{};
  for (size_t t = 0; t < kSizes.size(); ++t) w.memory[t] = moved.memory[t];
  r.params = w.list();
  r.snapshots = s.list();
  r.masks = masks.list();
  CHECK(samk_restore(p.plan, &r) == 0);
  for_each_element([&](size_t t, int64_t i) { wrong += !w.same(all, t, i); });
  CHECK(wrong == 0);
}

// The sum over the elements whose bit is set, with infinities under the others, in the range of fp32 squares
// and beyond it.
void test_norm(Pattern pattern, double size) {
  const Plan p;
  const Masks masks(kSizes, pattern);
  Random random(2);
  const List<float> w(kSizes, [&](size_t t, int64_t i) { return masks.has(t, i) ? random.next() : kNaN; });
  const List<float> g(
      kSizes, [&](size_t t, int64_t i) { return masks.has(t, i) ? size * random.next() : kInfinity; });
  double square = 0, peak = 0;
  for_each_element([&](size_t t, int64_t i) {
    if (!masks.has(t, i)) return;
    const double u = (std::fabs(double{w.memory[t][i]}) + 0.1) * g.memory[t][i];
    square += u * u;
    peak = std::max(peak, std::fabs(u));
  });
  for (int moment : {SAMK_SQUARE, SAMK_PEAK}) {
    double out = kNaN;
    samk_sq_norm_args a{};
    a.grads = g.list();
    a.params = w.list();
    a.masks = masks.list();
    a.row = p.row.data();
    a.table = p.table;
    a.moment = moment;
    a.out = &out;
    CHECK(samk_sq_norm(p.plan, &a) == 0);
    const double expected = moment == SAMK_PEAK ? peak : square;
    CHECK(std::fabs(out - expected) <= 2e-6 * expected);
  }
}

struct Ranked {
  samk_ranks ranks{};
  std::vector<uint32_t> number;
  List<float> scores;
  Masks within;

  explicit Ranked(int kind)
      : scores(kSizes, [random = Random(8)](size_t, int64_t) mutable { return random.next(); }),
        within(kSizes, Pattern::kScattered, 4) {
    for (size_t t = 0; t < kSizes.size(); ++t) number.push_back(static_cast<uint32_t>(3 * t));
    ranks.is_random = kind % 2;
    ranks.seed = uint64_t{7} << 33 | 5;
    ranks.step = 4;
    ranks.number = number.data();
    scores.data[4] = nullptr;  // all zeros
    ranks.scores = scores.list();
    if (kind >= 2) ranks.within = within.list();
    ranks.outside = kind >= 4;
  }
  // -1 where an element takes no part.
  int32_t rank(size_t t, int64_t i) {
    if (ranks.within.data != nullptr && within.has(t, i) == (ranks.outside != 0)) return -1;
    if (ranks.is_random) return samk::rank_of_word(samk::random_word(ranks.seed, ranks.step, number[t], i));
    return scores.data[t] == nullptr ? 0 : samk::rank_of(scores.memory[t][i]);
  }
};

void test_selection(int kind) {
  const Plan p;
  Ranked ranked(kind);
  Masks masks(kSizes, Pattern::kOnes);
  masks.data[kDense] = masks.words[kDense].data();
  masks.data[2] = nullptr;  // takes no part
  const int32_t threshold = kind % 2 ? 1 << 10 : samk::rank_of(0.25f) >> 20;
  constexpr int kShift = 20;

  samk_count_args c{};
  std::vector<int64_t> counts(1 << 11, 0), expected(1 << 11, 0);
  c.ranks = ranked.ranks;
  c.masks = masks.list();
  c.shift = kShift;
  c.bits = 11;
  c.counts = counts.data();
  CHECK(samk_count(p.plan, &c) == 0);
  std::vector<int64_t> position(kSizes.size()), candidates, level;
  for (size_t t = 0; t < kSizes.size(); ++t) position[t] = static_cast<int64_t>(t) << 20;
  for_each_element([&](size_t t, int64_t i) {
    const int32_t rank = ranked.rank(t, i);
    if (t == 2 || rank < 0) return;
    ++expected[rank >> kShift];
    if (rank >> kShift == threshold) level.push_back(samk::candidate_of(rank, kShift, position[t] + i));
  });
  CHECK(counts == expected);
  CHECK(!level.empty());

  // Room for all of them, then for less, with a guard behind.
  for (const size_t room : {level.size(), level.size() / 2, size_t{0}}) {
    candidates.assign(room + 1, -5);
    int64_t found = 0;
    samk_mark_args a{};
    a.ranks = ranked.ranks;
    a.masks = masks.list();
    a.threshold = threshold;
    a.shift = kShift;
    a.position = position.data();
    a.candidates = candidates.data();
    a.capacity = static_cast<int64_t>(room);
    a.found = &found;
    CHECK(samk_mark(p.plan, &a) == 0);
    CHECK(found == static_cast<int64_t>(level.size()));
    CHECK(candidates.back() == -5);
    candidates.pop_back();
    std::sort(candidates.begin(), candidates.end());
    std::sort(level.begin(), level.end());
    CHECK(std::includes(level.begin(), level.end(), candidates.begin(), candidates.end()));
  }
  int wrong = 0;
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; t != 2 && i < samk::word_count(kSizes[t]) * 64; ++i) {
      const bool above = i < kSizes[t] && ranked.rank(t, i) >> kShift > threshold;
      wrong += samk::has_bit(masks.words[t].data(), i) != above;
    }
  }
  CHECK(wrong == 0);
}

template <class T>
void test_accumulate() {
  const Plan p;
  Random random(6);
  const auto draw = [&](size_t, int64_t) { return random.next(); };
  List<float> scores(kSizes, draw), old(kSizes, draw);
  for (size_t t = 0; t < kSizes.size(); ++t) old.memory[t] = scores.memory[t];
  List<T> g(kSizes, draw);
  g.data[3] = nullptr;
  samk_accumulate_args a{};
  a.scores = scores.list();
  a.grads = g.list();
  CHECK(samk_accumulate(p.plan, &a) == 0);
  int wrong = 0;
  for_each_element([&](size_t t, int64_t i) {
    double x;
    if constexpr (sizeof(T) == 2) {
      x = samk::to_float(g.memory[t][i]);
    } else {
      x = static_cast<float>(g.memory[t][i]);
    }
    const double expected = old.memory[t][i] + (t == 3 ? 0 : x * x);
    wrong += std::fabs(scores.memory[t][i] - expected) > 2e-7 * std::max(1.0, std::fabs(expected));
  });
  CHECK(wrong == 0);
}

}  // namespace

int main() {
  for (const char* isa : kIsas) {
    if (samk_set_cpu_isa(isa) != 0) {
      std::printf("%s: not on this machine\n", isa);
      continue;
    }
    for (const Pattern pattern : {Pattern::kScattered, Pattern::kRuns, Pattern::kOnes, Pattern::kZeros}) {
      for (const double norm : {2.0, double{kNaN}}) {
        test_perturb<float>(pattern, norm);
        test_perturb<double>(pattern, norm);
        test_perturb<samk::bf16>(pattern, norm);
        test_perturb<samk::f16>(pattern, norm);
      }
      for (const double size : {1.0, 1e25, 1e-20}) test_norm(pattern, size);
    }
    for (int kind = 0; kind < 6; ++kind) test_selection(kind);
    test_accumulate<float>();
    test_accumulate<double>();
    test_accumulate<samk::bf16>();
    test_accumulate<samk::f16>();
  }
  return finish("masked_words_test");
}
