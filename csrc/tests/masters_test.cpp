// Half-precision weights with fp32 masters, and bf16 weights rounded at random, against a plain loop over the
// same formulas: bit for bit, for every instruction set and at every size. Every list is exactly as long as
// it must be, so that a sanitizer sees whoever goes too far.
#include <cmath>
#include <limits>

#include "core/half.h"
#include "core/lane.h"
#include "core/mask.h"
#include "math/descent.h"
#include "math/metric.h"
#include "math/perturb.h"
#include "math/random.h"
#include "tests/check.h"

#ifdef SAMK_EMULATED
extern "C" void samk_shim_seed(uint64_t seed);
#endif

namespace {

#ifdef SAMK_EMULATED
constexpr const char* kIsas[] = {"emulated"};
bool use_isa(const char*) { return true; }
void use_order(uint32_t order) { samk_shim_seed(order); }
#else
constexpr const char* kIsas[] = {"baseline", "avx2", "avx512"};
bool use_isa(const char* name) { return samk_set_cpu_isa(name) == 0; }
void use_order(uint32_t order) {
  samk_set_thread_pool(pool_parallel_for, pool_num_threads);
  pool_threads = order + 1;
}
#endif

// Around packs, words and chunks. Of the last tensors one has no gradient, one no master.
const std::vector<int64_t> kSizes = {1, 15, 16, 17, 0, 63, 65, 2047, 2049, 16385, 40, 41};
constexpr size_t kNoGradient = 10, kNoMaster = 11;

using V = samk::Lane<float>;

template <class T>
constexpr int32_t code() {
  return std::is_same<T, float>::value ? SAMK_F32 : std::is_same<T, samk::bf16>::value ? SAMK_BF16 : SAMK_F16;
}

template <class T>
T cast(float x) {
  return samk::Stored<T>::narrow(x);
}
template <class T>
float value(T x) {
  return samk::Stored<T>::widen(x);
}

template <class T>
struct List {
  std::vector<std::vector<T>> memory;
  int shift;
  size_t missing;
  static inline T nothing;

  List(int shift_, Random* random, size_t missing_ = kSizes.size()) : shift(shift_), missing(missing_) {
    for (int64_t n : kSizes) {
      memory.emplace_back(n + shift);
      for (T& x : memory.back()) x = cast<T>(static_cast<float>(random->next()));
    }
  }
  T* at(size_t t) { return memory[t].data() + shift; }
  const T& of(size_t t, int64_t i) const { return memory[t][i + shift]; }
  std::vector<void*> addresses;
  samk_list list() {
    addresses.clear();
    for (size_t t = 0; t < kSizes.size(); ++t) {
      void* const own = kSizes[t] + shift == 0 ? static_cast<void*>(&nothing) : at(t);
      addresses.push_back(t == missing ? nullptr : own);
    }
    return {addresses.data(), code<T>()};
  }
  bool operator==(const List& other) const {
    for (size_t t = 0; t < memory.size(); ++t) {
      if (!same_bytes(memory[t].data(), other.memory[t].data(), memory[t].size() * sizeof(T))) return false;
    }
    return true;
  }
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
    table[SAMK_WEIGHT_DECAY] = 0.01;
    table[SAMK_MOMENTUM] = 0.9;
    table[SAMK_BETA1] = 0.9;
    table[SAMK_BETA2] = 0.99;
    table[SAMK_ADAM_EPS] = 1e-3;
    table[SAMK_DECOUPLED] = 1;
  }
  ~Plan() { samk_plan_destroy(plan); }
};

// Everything of one case. The weights begin as something else than the rounded masters, so that a pass that
// read them would show.
template <class T>
struct Case {
  Plan plan;
  Random random{7};
  List<T> w, g;
  List<float> master, first, second;
  std::vector<std::vector<uint64_t>> words;
  std::vector<void*> masks;
  const double norm = 2, guard = 1;

  explicit Case(int shift)
      : w(shift, &random),
        g(shift, &random, kNoGradient),
        master(shift, &random, kNoMaster),
        first(shift, &random),
        second(shift, &random) {
    for (auto& own : second.memory) {
      for (float& x : own) x = std::fabs(x);
    }
    for (int64_t n : kSizes) {
      words.emplace_back(samk::word_count(n), uint64_t{0});
      for (int64_t i = 0; i < n; ++i) {
        words.back()[i / 64] |= uint64_t{i / 64 % 3 != 1 && random.next() < 0.2} << (i % 64);
      }
    }
    for (auto& own : words) masks.push_back(own.empty() ? static_cast<void*>(&w.nothing) : own.data());
    masks[8] = nullptr;  // a dense tensor among the others
  }
  bool selects(size_t t, int64_t i) const { return t == 8 || samk::has_bit(words[t].data(), i); }
};

template <class T>
void test_norm(int shift) {
  Case<T> c(shift);
  samk_sq_norm_args a{};
  double found = 0;
  a.grads = c.g.list();
  c.master.missing = kSizes.size();
  a.params = c.master.list();
  a.row = c.plan.row.data();
  a.table = c.plan.table.data();
  a.out = &found;
  a.workspace = c.plan.workspace.data();
  CHECK(samk_sq_norm(c.plan.plan, &a) == 0);
  double expected = 0;
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t] && t != kNoGradient; ++i) {
      const double u = (std::fabs(static_cast<double>(c.master.of(t, i))) + 0.1) * value(c.g.of(t, i));
      expected += u * u;
    }
  }
  CHECK(std::fabs(found - expected) <= 1e-5 * expected);
}

template <class T>
samk_perturb_args perturbation(Case<T>& c) {
  samk_perturb_args a{};
  a.params = c.w.list();
  a.grads = c.g.list();
  a.row = c.plan.row.data();
  a.table = c.plan.table.data();
  a.norm = &c.norm;
  return a;
}

template <class T>
void test_perturb(int shift, bool masked) {
  Case<T> c(shift);
  const auto start = c.w;
  const auto masters = c.master;
  auto a = perturbation(c);
  a.masters = c.master.list();
  if (masked) a.masks = {c.masks.data(), 0};
  CHECK(samk_perturb(c.plan.plan, &a) == 0);
  CHECK(c.master == masters);
  const samk::Perturb<float, samk::Adaptive<float>, samk::Linear> math{0.35f, {0.1f}, {}};
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const bool moves = t != kNoGradient && t != kNoMaster && (!masked || c.selects(t, i));
      const T moved = cast<T>(math(V(masters.of(t, i)), V(value(c.g.of(t, i)))).x);
      CHECK(same_bytes(&c.w.of(t, i), moves ? &moved : &start.of(t, i), sizeof(T)));
    }
  }
  // A norm that is not finite moves nothing.
  const double bad = std::numeric_limits<double>::quiet_NaN();
  auto again = c.w;
  a.norm = &bad;
  CHECK(samk_perturb(c.plan.plan, &a) == 0);
  CHECK(c.w == again);

  samk_restore_args back{};
  back.params = c.w.list();
  back.masters = c.master.list();
  if (masked) back.masks = {c.masks.data(), 0};
  CHECK(samk_restore(c.plan.plan, &back) == 0);
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const T rounded = t == kNoMaster ? again.of(t, i) : cast<T>(masters.of(t, i));
      CHECK(same_bytes(&c.w.of(t, i), &rounded, sizeof(T)));
    }
  }
}

template <class T>
void test_descend(int shift, int rule, bool safe) {
  Case<T> c(shift);
  const auto start = c.w;
  const auto masters = c.master;
  const auto before = c.first;
  const auto squares = c.second;
  std::vector<float> steps(kSizes.size(), 4.0f);
  std::vector<float*> counters;
  for (float& step : steps) counters.push_back(&step);
  const float found_inf = safe ? 0.0f : 1.0f, inv_scale = 0.5f;
  samk_descend_args a{};
  a.params = c.w.list();
  a.grads = c.g.list();
  a.masters = c.master.list();
  a.masks = {c.masks.data(), 0};  // of the perturbation; masters are whole
  a.state[0] = c.first.list();
  if (rule == SAMK_ADAM) a.state[1] = c.second.list();
  a.step = rule == SAMK_ADAM ? counters.data() : nullptr;
  a.row = c.plan.row.data();
  a.table = c.plan.table.data();
  a.rule = rule;
  a.guard = &c.guard;
  a.found_inf = &found_inf;
  a.inv_scale = &inv_scale;
  a.workspace = c.plan.workspace.data();
  CHECK(samk_descend(c.plan.plan, &a) == 0);
  const auto decay = samk::decayed<float>(c.plan.table.data(), rule, inv_scale);
  const auto sgd = samk::sgd<float>(c.plan.table.data());
  const auto adam = samk::adam<float>(c.plan.table.data(), 5);
  for (size_t t = 0; t < kSizes.size(); ++t) {
    const bool moves = safe && t != kNoGradient && t != kNoMaster;
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const V old(masters.of(t, i)), g(value(c.g.of(t, i)));
      const V d = decay.weight_decay != 0 ? decay(g, old) : decay(g);
      V moved = old, m(before.of(t, i)), v(squares.of(t, i));
      if (moves && rule == SAMK_SGD) {
        m = sgd.buffer(m, d);
        moved = sgd.weight(old, d, m);
      } else if (moves) {
        m = adam.first_moment(m, d);
        v = adam.second_moment(v, d);
        moved = adam.weight(old, m, v);
      }
      const T rounded = t == kNoMaster ? start.of(t, i) : cast<T>(moved.x);
      CHECK(same_bytes(&c.w.of(t, i), &rounded, sizeof(T)));
      CHECK(same_bytes(&c.master.of(t, i), &moved.x, sizeof(float)));
      CHECK(same_bytes(&c.first.of(t, i), &m.x, sizeof(float)));
      CHECK(same_bytes(&c.second.of(t, i), &v.x, sizeof(float)));
    }
  }
  CHECK(steps[0] == (rule == SAMK_ADAM && safe ? 5.0f : 4.0f));
}

void test_at_random(int shift, bool masked) {
  using T = samk::bf16;
  Case<T> c(shift);
  List<T> snapshot(shift, &c.random);
  const auto start = c.w;
  std::vector<uint32_t> numbers;
  for (uint32_t t = 0; t < kSizes.size(); ++t) numbers.push_back(0x40000000u + 7 * t);
  auto a = perturbation(c);
  a.snapshots = snapshot.list();
  if (masked) a.masks = {c.masks.data(), 0};
  a.number = numbers.data();
  a.seed = 0x9123456789abcdefu;
  a.step = 0x80000003u;
  CHECK(samk_perturb(c.plan.plan, &a) == 0);
  const samk::Perturb<float, samk::Adaptive<float>, samk::Linear> math{0.35f, {0.1f}, {}};
  for (size_t t = 0; t < kSizes.size(); ++t) {
    for (int64_t i = 0; i < kSizes[t]; ++i) {
      const bool moves = t != kNoGradient && (!masked || c.selects(t, i));
      const float wide = math(V(value(start.of(t, i))), V(value(c.g.of(t, i)))).x;
      const auto words = samk::random_words(a.seed, a.step, numbers[t], i / 8 * 4);
      const uint32_t four[] = {words.x0, words.x1, words.x2, words.x3};
      const uint32_t sixteen = four[i % 8 / 2] >> (i % 2 * 16) & 0xffffu;
      const T moved = {static_cast<uint16_t>((samk::float_to_bits(wide) + sixteen) >> 16)};
      CHECK(same_bytes(&c.w.of(t, i), moves ? &moved : &start.of(t, i), sizeof(T)));
      if (moves) CHECK(same_bytes(&snapshot.of(t, i), &start.of(t, i), sizeof(T)));
    }
  }
  samk_restore_args back{};
  back.params = c.w.list();
  back.snapshots = snapshot.list();
  if (masked) back.masks = a.masks;
  snapshot.missing = kNoGradient;  // nothing was saved of it
  back.snapshots = snapshot.list();
  CHECK(samk_restore(c.plan.plan, &back) == 0);
  CHECK(c.w == start);
}

void test_refusals() {
  Case<float> c(0);
  auto a = perturbation(c);
  a.masters = c.master.list();
  CHECK(samk_perturb(c.plan.plan, &a) != 0);
  CHECK(std::strstr(samk_last_error(), "masters are served in fp32 beside weights and gradients") != nullptr);
  std::vector<uint32_t> numbers(kSizes.size());
  a.masters = {};
  a.snapshots = c.first.list();
  a.number = numbers.data();
  CHECK(samk_perturb(c.plan.plan, &a) != 0);
  CHECK(std::strstr(samk_last_error(), "stochastic rounding is for bf16 weights") != nullptr);
}

template <class T>
void test_type(int shift) {
  test_norm<T>(shift);
  for (bool flag : {false, true}) {
    test_perturb<T>(shift, flag);
    for (int rule : {SAMK_SGD, SAMK_ADAM}) test_descend<T>(shift, rule, flag);
  }
}

}  // namespace

int main() {
  for (const char* isa : kIsas) {
    if (!use_isa(isa)) continue;
    for (uint32_t order : {0, 2}) {
      use_order(order);
      for (int shift : {0, 1}) {
        test_type<samk::bf16>(shift);
        test_type<samk::f16>(shift);
        for (bool masked : {false, true}) test_at_random(shift, masked);
      }
    }
    test_refusals();
  }
  return finish("masters_test");
}
