// Every pass against a plain loop in double, for every dtype, instruction set and thread count.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>

#include "core/chunk_plan.h"
#include "core/half.h"
#include "math/normal.h"
#include "math/random.h"
#include "tests/check.h"

#ifdef SAMK_EMULATED
extern "C" void samk_shim_seed(uint64_t seed);
#endif

namespace {

#ifdef SAMK_EMULATED
// The CUDA kernels on the CPU: no instruction sets, and orders of blocks and threads in place of thread
// counts.
constexpr const char* kIsas[] = {"emulated"};
bool use_isa(const char*) { return true; }
void use_threads(uint32_t seed) { samk_shim_seed(seed - 1); }
#else
constexpr const char* kIsas[] = {"baseline", "avx2", "avx512"};
bool use_isa(const char* name) { return samk_set_cpu_isa(name) == 0; }
void use_threads(uint32_t threads) {
  samk_set_thread_pool(pool_parallel_for, pool_num_threads);
  pool_threads = threads;
}
#endif

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <class T>
constexpr int32_t code();
template <>
constexpr int32_t code<float>() {
  return SAMK_F32;
}
template <>
constexpr int32_t code<double>() {
  return SAMK_F64;
}
template <>
constexpr int32_t code<samk::bf16>() {
  return SAMK_BF16;
}
template <>
constexpr int32_t code<samk::f16>() {
  return SAMK_F16;
}

template <class T>
double value(T x) {
  if constexpr (sizeof(T) == 2) {
    return samk::to_float(x);
  } else {
    return static_cast<double>(x);
  }
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

// One rounding to T plus what a few fp32 operations lose.
template <class T>
double tolerance() {
  if (std::is_same_v<T, double>) return 1e-14;
  if (std::is_same_v<T, float>) return 1e-6;
  return std::is_same_v<T, samk::f16> ? 1.1e-3 : 8e-3;
}

// Tensors of the given sizes, `shift` elements off their alignment, some of them missing.
template <class T>
struct List {
  std::vector<std::vector<T>> memory;
  std::vector<void*> data;

  List(const std::vector<int64_t>& sizes, int shift, Random* random) {
    for (int64_t n : sizes) {
      memory.emplace_back(n + shift);
      for (T& x : memory.back()) x = cast<T>(random == nullptr ? kNaN : random->next());
      data.push_back(memory.back().data() + shift);
      if (n + shift == 0) data.back() = &nothing;
    }
  }
  T* at(size_t t) const { return static_cast<T*>(data[t]); }
  samk_list list() const { return {data.data(), code<T>()}; }
  // The same values in memory of its own.
  List copy() const {
    List twin(*this);
    for (size_t t = 0; t < memory.size(); ++t) {
      if (data[t] != nullptr && !memory[t].empty()) {
        twin.data[t] = twin.memory[t].data() + (static_cast<T*>(data[t]) - memory[t].data());
      }
    }
    return twin;
  }
  bool operator==(const List& other) const {
    for (size_t t = 0; t < memory.size(); ++t) {
      if (!same_bytes(memory[t].data(), other.memory[t].data(), memory[t].size() * sizeof(T))) return false;
    }
    return true;
  }
  static inline T nothing;
};

struct Table {
  std::vector<double> rows = std::vector<double>(3 * SAMK_COLUMNS, 0.0);
  Table() {
    const double metric[3] = {SAMK_EUCLIDEAN, SAMK_ADAPTIVE, SAMK_FIXED};
    for (int r = 0; r < 3; ++r) {
      double* row = &rows[r * SAMK_COLUMNS];
      row[SAMK_METRIC] = metric[r];
      row[SAMK_ETA] = 0.1;
      row[SAMK_RHO] = 0.7;
      row[SAMK_EPS] = 1e-12;
      row[SAMK_LR] = 0.1;
      row[SAMK_WEIGHT_DECAY] = 0.01;
      row[SAMK_MAXIMIZE] = r == 1;
      row[SAMK_MOMENTUM] = 0.9;
      row[SAMK_DAMPENING] = 0.2;
      row[SAMK_NESTEROV] = r == 2;
      row[SAMK_BETA1] = 0.9;
      row[SAMK_BETA2] = 0.95;
      row[SAMK_ADAM_EPS] = 1e-3;
      row[SAMK_DECOUPLED] = r == 0;
    }
  }
  const double* row(int r) const { return &rows[r * SAMK_COLUMNS]; }
};

bool close(double got, double expected, double relative) {
  return std::fabs(got - expected) <= relative * std::max(1.0, std::fabs(expected));
}

struct Case {
  std::vector<int64_t> sizes;
  int shift;
};

template <class T>
class Passes {
 public:
  explicit Passes(const Case& c)
      : sizes(c.sizes),
        random(c.sizes.size() * 31 + c.shift),
        w(sizes, c.shift, &random),
        g(sizes, c.shift, &random),
        start(w),
        shift(c.shift),
        plan(samk_plan_create(sizes.data(), static_cast<int64_t>(sizes.size()))),
        workspace(samk_plan_workspace_bytes(plan)) {
    for (size_t t = 0; t < sizes.size(); ++t) row.push_back(static_cast<int32_t>(t % 3));
    // Every fifth gradient is missing.
    for (size_t t = 3; t < sizes.size(); t += 5) g.data[t] = nullptr;
  }
  ~Passes() { samk_plan_destroy(plan); }

  double weight(size_t t, double x) const { return row[t] == 1 ? std::fabs(x) + 0.1 : 1.0; }
  bool moves(size_t t) const { return g.data[t] != nullptr && row[t] != 2; }

  void test_norms() {
    double square = 0, peak = 0;
    std::vector<double> own(sizes.size(), 0.0);
    for (size_t t = 0; t < sizes.size(); ++t) {
      if (!moves(t)) continue;
      for (int64_t i = 0; i < sizes[t]; ++i) {
        const double u = weight(t, value(w.at(t)[i])) * value(g.at(t)[i]);
        own[t] += u * u;
        peak = std::max(peak, std::fabs(u));
      }
      square += own[t];
    }
    std::vector<double> per_tensor(sizes.size(), kNaN);
    const double got = norm(SAMK_SQUARE, nullptr, 0, per_tensor.data());
    CHECK(close(got, square, 2e-6));
    for (size_t t = 0; t < sizes.size(); ++t) CHECK(close(per_tensor[t], own[t], 2e-6));
    const double got_peak = norm(SAMK_PEAK, nullptr, 0, nullptr);
    CHECK(close(got_peak, peak, 2e-6));
    double power = 0;
    for (size_t t = 0; t < sizes.size() && peak > 0; ++t) {
      for (int64_t i = 0; i < sizes[t] && moves(t); ++i) {
        power += std::pow(std::fabs(weight(t, value(w.at(t)[i])) * value(g.at(t)[i])) / peak, 1.5);
      }
    }
    CHECK(close(norm(SAMK_POWER, &got_peak, 1.5, nullptr), power, 3e-6));
    const double zero = 0;
    CHECK(norm(SAMK_POWER, &zero, 1.5, nullptr) == 0 || peak > 0);
    // One NaN or infinity anywhere shows, whatever the moment.
    for (size_t t = 0; t < sizes.size(); ++t) {
      if (!moves(t) || sizes[t] == 0) continue;
      T& element = g.at(t)[sizes[t] / 2];
      const T kept = element;
      for (double bad : {kNaN, std::numeric_limits<double>::infinity()}) {
        element = cast<T>(bad);
        CHECK(!std::isfinite(norm(SAMK_SQUARE, nullptr, 0, nullptr)));
        CHECK(!std::isfinite(norm(SAMK_PEAK, nullptr, 0, nullptr)));
      }
      element = kept;
      break;
    }
  }

  void test_perturb_and_restore() {
    for (int shape : {SAMK_LINEAR, SAMK_SIGN, SAMK_POWERED}) {
      for (double size : {2.0, kNaN}) {
        List<T> s(sizes, shift, nullptr);
        const double peak = 0.8;
        samk_perturb_args a{};
        a.params = w.list();
        a.grads = g.list();
        a.snapshots = s.list();
        a.row = row.data();
        a.table = table.rows.data();
        a.shape = shape;
        a.q = 1.5;
        a.peak = &peak;
        a.norm = &size;
        CHECK(samk_perturb(plan, &a) == 0);
        for (size_t t = 0; t < sizes.size(); ++t) {
          const size_t bytes = sizes[t] * sizeof(T);
          if (!moves(t)) {
            CHECK(same_bytes(w.at(t), start.memory[t].data() + shift, bytes));
            s.data[t] = nullptr;
            continue;
          }
          CHECK(same_bytes(s.at(t), start.memory[t].data() + shift, bytes));
          for (int64_t i = 0; i < sizes[t]; ++i) {
            const double old = value(s.at(t)[i]), factor = weight(t, old), u = factor * value(g.at(t)[i]);
            const double h = shape == SAMK_LINEAR ? u
                             : shape == SAMK_SIGN ? std::copysign(1.0, u)
                                                  : std::copysign(std::sqrt(std::fabs(u) / peak), u);
            const double scale = shape == SAMK_SIGN ? 0.7 : 0.7 / (2.0 + 1e-12);
            const double expected = std::isnan(size) ? old : old + scale * factor * h;
            CHECK(close(value(w.at(t)[i]), expected, tolerance<T>()));
          }
        }
        samk_restore_args r{};
        r.params = w.list();
        r.snapshots = s.list();
        CHECK(samk_restore(plan, &r) == 0);
        for (size_t t = 0; t < sizes.size(); ++t) {
          CHECK(same_bytes(w.at(t), start.memory[t].data() + shift, sizes[t] * sizeof(T)));
        }
      }
    }
  }

  void test_descend() {
    for (int rule : {SAMK_SGD, SAMK_ADAM}) {
      for (double guard : {1.0, kNaN}) {
        Random fill(5);
        List<T> s(sizes, shift, &fill), m(sizes, shift, &fill), v(sizes, shift, &fill);
        for (auto& tensor : v.memory) {
          for (T& x : tensor) x = cast<T>(std::fabs(value(x)));
        }
        const List<T> old_m(m), old_v(v), old_w(w);
        std::vector<float> steps(sizes.size(), 4.0f);
        std::vector<float*> step;
        std::vector<uint8_t> fresh(sizes.size(), 0);
        for (size_t t = 0; t < sizes.size(); ++t) {
          step.push_back(&steps[t]);
          fresh[t] = t % 4 == 1;
          if (t % 7 == 2) s.data[t] = nullptr;  // not perturbed: the weights themselves are read
        }
        samk_descend_args a{};
        a.params = w.list();
        a.grads = g.list();
        a.snapshots = s.list();
        a.state[0] = m.list();
        if (rule == SAMK_ADAM) a.state[1] = v.list();
        a.step = rule == SAMK_ADAM ? step.data() : nullptr;
        a.fresh = fresh.data();
        a.row = row.data();
        a.table = table.rows.data();
        a.rule = rule;
        a.guard = &guard;
        a.workspace = workspace.data();
        CHECK(samk_descend(plan, &a) == 0);
        for (size_t t = 0; t < sizes.size(); ++t) {
          const bool updates = g.data[t] != nullptr && !std::isnan(guard);
          CHECK(steps[t] == (rule == SAMK_ADAM && updates ? 5.0f : 4.0f));
          for (int64_t i = 0; i < sizes[t]; ++i) {
            const double from = value(s.data[t] != nullptr ? s.at(t)[i] : old_w.memory[t][i + shift]);
            const double m0 = value(old_m.memory[t][i + shift]), v0 = value(old_v.memory[t][i + shift]);
            double expected = from, m1 = m0, v1 = v0;
            if (updates) update(rule, t, from, value(g.at(t)[i]), fresh[t] != 0, &expected, &m1, &v1);
            CHECK(close(value(w.at(t)[i]), expected, 4 * tolerance<T>()));
            CHECK(close(value(m.at(t)[i]), m1, 2 * tolerance<T>()));
            if (rule == SAMK_ADAM) CHECK(close(value(v.at(t)[i]), v1, 2 * tolerance<T>()));
          }
        }
        for (size_t t = 0; t < sizes.size(); ++t) w.memory[t] = start.memory[t];
      }
    }
  }

  void test_stats_and_combine() {
    List<T> x(sizes, shift, &random), y(sizes, shift, &random), out(sizes, shift, nullptr);
    double expected[6] = {};
    for (size_t t = 0; t < sizes.size(); ++t) {
      for (int64_t i = 0; i < sizes[t]; ++i) {
        const double v[3] = {g.data[t] == nullptr ? 0 : value(g.at(t)[i]), value(x.at(t)[i]),
                             value(y.at(t)[i])};
        int k = 0;
        for (int p = 0; p < 3; ++p) {
          for (int q = p; q < 3; ++q) expected[k++] += v[p] * v[q];
        }
      }
    }
    double got[6];
    samk_grad_stats_args a{};
    a.list[0] = g.list();
    a.list[1] = x.list();
    a.list[2] = y.list();
    a.lists = 3;
    a.out = got;
    a.workspace = workspace.data();
    CHECK(samk_grad_stats(plan, &a) == 0);
    for (int k = 0; k < 6; ++k)
      CHECK(std::fabs(got[k] - expected[k]) <= 2e-6 * std::max(1.0, expected[0] + expected[3]));
    double again[6], sums[6] = {};
    std::vector<double> each(6 * sizes.size() + 1, kNaN);
    a.out = again;
    a.per_tensor = each.data();
    CHECK(samk_grad_stats(plan, &a) == 0);
    CHECK(same_bytes(again, got, sizeof got) && std::isnan(each.back()));
    for (size_t t = 0; t < sizes.size(); ++t) {
      double square = 0;
      for (int64_t i = 0; i < sizes[t]; ++i) square += value(y.at(t)[i]) * value(y.at(t)[i]);
      CHECK(close(each[6 * t + 5], square, 2e-6));
      CHECK(g.data[t] != nullptr || (each[6 * t] == 0 && each[6 * t + 1] == 0 && each[6 * t + 2] == 0));
      for (int k = 0; k < 6; ++k) sums[k] += each[6 * t + k];
    }
    for (int k = 0; k < 6; ++k) CHECK(std::fabs(sums[k] - got[k]) <= 1e-12 * (1 + got[3] + got[5]));

    const double coefficients[6] = {0.5, 0.0, -2.0, 1.0, 1.0, 1.0};
    const List<T> old_y(y);
    samk_combine_args c{};
    c.list[0] = g.list();
    c.list[1] = x.list();
    c.list[2] = y.list();
    c.lists = 3;
    c.out[0] = out.list();
    c.out[1] = y.list();  // an output may be an input
    c.outs = 2;
    c.coefficients = coefficients;
    CHECK(samk_combine(plan, &c) == 0);
    for (size_t t = 0; t < sizes.size(); ++t) {
      for (int64_t i = 0; i < sizes[t]; ++i) {
        const double gi = g.data[t] == nullptr ? 0 : value(g.at(t)[i]);
        const double xi = value(x.at(t)[i]), yi = value(old_y.memory[t][i + shift]);
        CHECK(close(value(out.at(t)[i]), 0.5 * gi - 2.0 * yi, tolerance<T>()));
        CHECK(close(value(y.at(t)[i]), gi + xi + yi, tolerance<T>()));
      }
    }

    // Every third tensor takes the first list, the next the second, and the others nothing.
    std::vector<double> blocks;
    for (size_t t = 0; t < sizes.size(); ++t) {
      for (int l = 0; l < 2; ++l) blocks.push_back(t % 3 == static_cast<size_t>(l) ? 2.0 : 0.0);
    }
    c.list[0] = x.list();
    c.list[1] = y.list();
    c.lists = 2;
    c.outs = 1;
    c.coefficients = blocks.data();
    c.per_tensor = 1;
    CHECK(samk_combine(plan, &c) == 0);
    for (size_t t = 0; t < sizes.size(); ++t) {
      for (int64_t i = 0; i < sizes[t]; ++i) {
        const double from = t % 3 == 0 ? value(x.at(t)[i]) : t % 3 == 1 ? value(y.at(t)[i]) : 0;
        CHECK(close(value(out.at(t)[i]), 2 * from, tolerance<T>()));
      }
    }
  }

  // Row 0 measured by Fisher's metric, while row 1 stays adaptive.
  void test_fisher() {
    table.rows[SAMK_METRIC] = SAMK_FISHER;
    table.rows[SAMK_ETA] = 2;
    const auto factor = [&](size_t t, double old, double d) {
      return row[t] == 0 ? 1 / std::sqrt(1 + 2 * d * d) : weight(t, old);
    };
    double square = 0, size = 2;
    bool is_measured = false;
    for (size_t t = 0; t < sizes.size(); ++t) {
      if (!moves(t)) continue;
      is_measured |= row[t] == 0 && sizes[t] > 0;
      for (int64_t i = 0; i < sizes[t]; ++i) {
        const double d = value(g.at(t)[i]), u = factor(t, value(w.at(t)[i]), d) * d;
        square += u * u;
      }
    }
    CHECK(close(norm(SAMK_SQUARE, nullptr, 0, nullptr), square, 2e-6));
    CHECK(std::isnan(norm(SAMK_PEAK, nullptr, 0, nullptr)) == is_measured);
    CHECK(std::isnan(norm(SAMK_POWER, &size, 1.5, nullptr)) == is_measured);
    for (int shape : {SAMK_LINEAR, SAMK_SIGN}) {
      List<T> s(sizes, shift, nullptr);
      perturb(shape, 0, nullptr, size, g, s);
      for (size_t t = 0; t < sizes.size(); ++t) {
        if (!moves(t)) continue;
        CHECK(same_bytes(s.at(t), start.memory[t].data() + shift, sizes[t] * sizeof(T)));
        for (int64_t i = 0; i < sizes[t]; ++i) {
          const double old = value(s.at(t)[i]), d = value(g.at(t)[i]), by = factor(t, old, d);
          if (shape == SAMK_LINEAR) {
            CHECK(close(value(w.at(t)[i]), old + 0.7 / (2.0 + 1e-12) * by * by * d, tolerance<T>()));
          } else if (row[t] == 0) {
            CHECK(value(w.at(t)[i]) == old);
          }
        }
      }
      put_back();
    }
    table = Table();
  }

  // A snapshot where the gradient is gets the weights, and these what they get from a gradient elsewhere.
  void test_gradient_in_its_snapshot() {
    const double peak = 0.8, size = 2;
    for (int shape : {SAMK_LINEAR, SAMK_SIGN, SAMK_POWERED}) {
      List<T> s(sizes, shift, nullptr), both = g.copy();
      perturb(shape, 1.5, &peak, size, g, s);
      const List<T> moved(w);
      put_back();
      perturb(shape, 1.5, &peak, size, both, both);
      CHECK(w == moved);
      for (size_t t = 0; t < sizes.size(); ++t) {
        const void* expected = moves(t) ? static_cast<void*>(start.memory[t].data() + shift) : g.data[t];
        if (g.data[t] != nullptr) CHECK(same_bytes(both.at(t), expected, sizes[t] * sizeof(T)));
      }
      put_back();
    }
  }

  // An infinite q: what ties as the largest counts 1 and moves, and nothing else does.
  void test_order_one() {
    const double q = std::numeric_limits<double>::infinity();
    const double peak = norm(SAMK_PEAK, nullptr, 0, nullptr), ties = norm(SAMK_POWER, &peak, q, nullptr);
    List<T> s(sizes, shift, nullptr);
    perturb(SAMK_POWERED, q, &peak, 1.0, g, s);
    int64_t moved = 0;
    for (size_t t = 0; t < sizes.size(); ++t) {
      for (int64_t i = 0; i < sizes[t]; ++i) {
        const double old = value(start.memory[t][i + shift]);
        moved += value(w.at(t)[i]) != old;
        CHECK(std::fabs(value(w.at(t)[i]) - old) <= 0.7 * (moves(t) ? weight(t, old) : 0) * 1.01);
      }
    }
    CHECK(static_cast<double>(moved) == ties && (moved > 0) == (peak > 0));
    put_back();
  }

  void test_noise() {
    constexpr uint64_t kSeed = 0x9123456789abcdef;
    List<T> out(sizes, shift, nullptr);
    std::vector<uint32_t> number;
    for (size_t t = 0; t < sizes.size(); ++t) {
      number.push_back(static_cast<uint32_t>(0x90000001u * t));
      if (g.data[t] == nullptr) out.data[t] = nullptr;
    }
    List<T> expected = out.copy();
    for (size_t t = 0; t < sizes.size(); ++t) {
      for (int64_t i = 0; i < sizes[t] && out.data[t] != nullptr; ++i) {
        const samk::Words x = samk::random_words(kSeed, 5, number[t], i);
        const samk::Point at = i % 4 < 2 ? samk::normal_pair(x.x0, x.x1) : samk::normal_pair(x.x2, x.x3);
        expected.at(t)[i] = cast<T>(i % 2 == 0 ? at.x : at.y);
      }
    }
    samk_noise_args a{};
    a.out = out.list();
    a.seed = kSeed;
    a.step = 5;
    CHECK(samk_noise(plan, &a) != 0);  // without numbers
    a.number = number.data();
    CHECK(samk_noise(plan, &a) == 0);
    CHECK(out == expected);
  }

  // All results of one round of passes, to compare between threads and instruction sets bit for bit.
  std::vector<unsigned char> fingerprint() {
    List<T> s(sizes, shift, nullptr), m(start), v(start);
    for (auto& tensor : v.memory) {
      for (T& x : tensor) x = cast<T>(std::fabs(value(x)));
    }
    std::vector<float> steps(sizes.size(), 4.0f);
    std::vector<float*> step;
    for (float& x : steps) step.push_back(&x);
    std::vector<void*> no_snapshot(sizes.size(), nullptr);
    for (size_t t = 0; t < sizes.size(); ++t) {
      w.memory[t] = start.memory[t];
      m.data[t] = m.memory[t].empty() ? m.data[t] : m.memory[t].data() + shift;
      v.data[t] = v.memory[t].empty() ? v.data[t] : v.memory[t].data() + shift;
    }
    std::vector<double> per_tensor(sizes.size());
    double square = norm(SAMK_SQUARE, nullptr, 0, per_tensor.data());
    samk_perturb_args p{};
    p.params = w.list();
    p.grads = g.list();
    p.snapshots = s.list();
    p.row = row.data();
    p.table = table.rows.data();
    p.norm = &square;
    samk_perturb(plan, &p);
    List<T> both = g.copy();
    const List<T> moved(w);
    put_back();
    perturb(SAMK_LINEAR, 0, nullptr, square, both, both);
    CHECK(w == moved);
    std::vector<unsigned char> bytes;
    const auto add = [&](const void* data, size_t size) {
      const auto* from = static_cast<const unsigned char*>(data);
      bytes.insert(bytes.end(), from, from + size);
    };
    for (size_t t = 0; t < sizes.size(); ++t) {
      if (!moves(t)) s.data[t] = nullptr;
      add(w.at(t), sizes[t] * sizeof(T));
    }
    for (int rule : {SAMK_SGD, SAMK_ADAM}) {
      samk_descend_args d{};
      d.params = w.list();
      d.grads = g.list();
      d.snapshots = s.list();
      d.state[0] = m.list();
      if (rule == SAMK_ADAM) d.state[1] = v.list();
      d.step = step.data();
      d.row = row.data();
      d.table = table.rows.data();
      d.rule = rule;
      d.workspace = workspace.data();
      samk_descend(plan, &d);
      for (size_t t = 0; t < sizes.size(); ++t) {
        add(w.at(t), sizes[t] * sizeof(T));
        add(m.at(t), sizes[t] * sizeof(T));
        add(v.at(t), sizes[t] * sizeof(T));
      }
    }
    double dots[3];
    samk_grad_stats_args a{};
    a.list[0] = g.list();
    a.list[1] = w.list();
    a.lists = 2;
    a.out = dots;
    a.workspace = workspace.data();
    std::vector<double> each(3 * sizes.size());
    a.per_tensor = each.data();
    samk_grad_stats(plan, &a);
    add(dots, sizeof dots);
    add(each.data(), each.size() * sizeof(double));
    std::vector<uint32_t> number(sizes.size(), 9);
    samk_noise_args n{};
    n.out = m.list();
    n.number = number.data();
    samk_noise(plan, &n);
    for (size_t t = 0; t < sizes.size(); ++t) add(m.at(t), sizes[t] * sizeof(T));
    add(&square, sizeof square);
    add(per_tensor.data(), per_tensor.size() * sizeof(double));
    for (size_t t = 0; t < sizes.size(); ++t) w.memory[t] = start.memory[t];
    return bytes;
  }

 private:
  void perturb(int shape, double q, const double* peak, double size, const List<T>& grads,
               const List<T>& snapshots) {
    samk_perturb_args a{};
    a.params = w.list();
    a.grads = grads.list();
    a.snapshots = snapshots.list();
    a.row = row.data();
    a.table = table.rows.data();
    a.shape = shape;
    a.q = q;
    a.peak = peak;
    a.norm = &size;
    CHECK(samk_perturb(plan, &a) == 0);
  }

  // In the same memory: data points there.
  void put_back() {
    for (size_t t = 0; t < sizes.size(); ++t) w.memory[t] = start.memory[t];
  }

  double norm(int moment, const double* peak, double q, double* per_tensor) {
    double out = kNaN;
    samk_sq_norm_args a{};
    a.grads = g.list();
    a.params = w.list();
    a.row = row.data();
    a.table = table.rows.data();
    a.moment = moment;
    a.q = q;
    a.peak = peak;
    a.out = &out;
    a.per_tensor = per_tensor;
    a.workspace = workspace.data();
    CHECK(samk_sq_norm(plan, &a) == 0);
    return out;
  }

  void update(int rule, size_t t, double from, double grad, bool is_fresh, double* w1, double* m1,
              double* v1) const {
    const double* r = table.row(row[t]);
    double d = r[SAMK_MAXIMIZE] != 0 ? -grad : grad;
    if (rule == SAMK_SGD) {
      d += r[SAMK_WEIGHT_DECAY] * from;
      *m1 = is_fresh ? d : r[SAMK_MOMENTUM] * *m1 + (1 - r[SAMK_DAMPENING]) * d;
      *w1 = from - r[SAMK_LR] * (r[SAMK_NESTEROV] != 0 ? d + r[SAMK_MOMENTUM] * *m1 : *m1);
      return;
    }
    const bool decoupled = r[SAMK_DECOUPLED] != 0;
    const double kept = decoupled ? from * (1 - r[SAMK_LR] * r[SAMK_WEIGHT_DECAY]) : from;
    if (!decoupled) d += r[SAMK_WEIGHT_DECAY] * from;
    *m1 += (1 - r[SAMK_BETA1]) * (d - *m1);
    *v1 = r[SAMK_BETA2] * *v1 + (1 - r[SAMK_BETA2]) * d * d;
    const double correction1 = 1 - std::pow(r[SAMK_BETA1], 5), correction2 = 1 - std::pow(r[SAMK_BETA2], 5);
    *w1 = kept - r[SAMK_LR] / correction1 * *m1 / (std::sqrt(*v1 / correction2) + r[SAMK_ADAM_EPS]);
  }

  std::vector<int64_t> sizes;
  Random random;
  List<T> w, g, start;
  int shift;
  samk_plan* plan;
  std::vector<unsigned char> workspace;
  std::vector<int32_t> row;
  Table table;
};

template <class T>
void run_all(const Case& c) {
  Passes<T> passes(c);
  passes.test_norms();
  passes.test_perturb_and_restore();
  passes.test_descend();
  passes.test_stats_and_combine();
  passes.test_fisher();
  passes.test_gradient_in_its_snapshot();
  passes.test_order_one();
  passes.test_noise();
}

// Over no tensors a sum is 0, and is written.
void test_empty_list() {
  samk_plan* const plan = samk_plan_create(nullptr, 0);
  std::vector<unsigned char> workspace(samk_plan_workspace_bytes(plan));
  const double row[SAMK_COLUMNS] = {};
  for (double root : {1.0, 2.0}) {
    double out = kNaN;
    samk_sq_norm_args a{};
    a.table = row;
    a.root = root;
    a.out = &out;
    a.workspace = workspace.data();
    CHECK(samk_sq_norm(plan, &a) == 0);
    CHECK(out == 0);
  }
  double dots[7];
  std::fill_n(dots, 7, kNaN);
  samk_grad_stats_args a{};
  a.lists = 3;
  a.out = dots;
  a.workspace = workspace.data();
  CHECK(samk_grad_stats(plan, &a) == 0);
  for (int k = 0; k < 6; ++k) CHECK(dots[k] == 0);
  CHECK(std::isnan(dots[6]));
  samk_plan_destroy(plan);
}

template <class T>
void check_same_bits(const Case& c) {
  std::vector<unsigned char> first;
  for (const char* isa : kIsas) {
    if (!use_isa(isa)) continue;
    for (uint32_t threads : {1u, 2u, 3u, 8u}) {
      use_threads(threads);
      const auto bytes = Passes<T>(c).fingerprint();
      if (first.empty()) first = bytes;
      CHECK(bytes == first);
    }
  }
  use_threads(2);
  use_isa(nullptr);
}

}  // namespace

int main() {
  use_threads(2);
  const int64_t chunk = samk::ChunkPlan::kChunkSize;
  const std::vector<int64_t> awkward = {17, 0, 1, 15, 16, 33, chunk - 1, chunk, 64, 7, chunk + 1, 3, 0};
#ifdef SAMK_EMULATED
  // Fibers take their time. The sum of the long one takes more chunks than a warp has lanes.
  const Case cases[] = {{awkward, 0}, {awkward, 1}, {{0}, 0}, {{5, 9, 5 * chunk + 3, 0}, 0}};
#else
  const Case cases[] = {{awkward, 0}, {awkward, 1}, {{1}, 0}, {{0}, 0}, {std::vector<int64_t>(5000, 3), 0}};
#endif
  for (const char* isa : kIsas) {
    if (!use_isa(isa)) {
      std::printf("%s: not on this machine\n", isa);
      continue;
    }
    for (const Case& c : cases) {
      run_all<float>(c);
      run_all<double>(c);
      run_all<samk::bf16>(c);
      run_all<samk::f16>(c);
    }
  }
  test_empty_list();
  check_same_bits<float>(cases[1]);
  check_same_bits<double>(cases[0]);
  check_same_bits<samk::bf16>(cases[0]);
  check_same_bits<samk::f16>(cases[1]);
#ifndef SAMK_EMULATED
  // Beyond the last-level cache, so that the streaming stores run too.
  check_same_bits<float>({{int64_t{1} << 22, (int64_t{1} << 21) + 5}, 0});
  CHECK(!use_isa("mmx") && std::string(samk_last_error()).find("mmx") != std::string::npos);
#endif
  const int64_t bad[] = {3, -1};
  CHECK(samk_plan_create(bad, 2) == nullptr);
  return finish("passes_test");
}
