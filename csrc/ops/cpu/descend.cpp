#include "engine/cpu.h"
#include "math/descent.h"
#include "ops/cpu/passes.h"

namespace samk {
namespace SAMK_ISA {
namespace {

// One chunk as every rule sees it: from is the snapshot, or the weights themselves; or the master, which is
// fp32 as the state is then, and is written too.
template <class T, class M>
struct Site {
  T* w;
  const M* from;
  M* master;  // nullptr where there is none
  const T* g;
  const uint64_t* words;  // nullptr where all has a snapshot, or nothing
  int64_t n;
  bool streaming;

  // Calls body(i, old, part, stream), with the old weights at `old`. Where nothing was saved they were
  // never moved; a write of what was just read does not stream.
  template <class Body>
  SAMK_INLINE void sweep(Body body) const {
    const auto run = [&](int64_t begin, int64_t size, const M* olds, bool streams) {
      sweep_streaming(size, streams, [&](int64_t offset, auto part, auto stream) {
        body(begin + offset, olds + offset, part, stream);
      });
    };
    if constexpr (std::is_same<T, M>::value) {
      if (words != nullptr) {
        for_each_saved_run(words, n, [&](int64_t i, int64_t size, bool is_saved) {
          run(i, size, (is_saved ? from : w) + i, streaming && is_saved);
        });
        return;
      }
    }
    run(0, n, from, streaming);
  }

  // The new weights, and the master that they are rounded from.
  template <class V, class Part>
  SAMK_INLINE void put(int64_t i, V x, Part part, bool stream) const {
    part.put(w + i, x, stream);
    if constexpr (!std::is_same<T, M>::value) part.put(master + i, x);
  }
};

template <bool kDecay, class S, class V>
SAMK_INLINE V gradient(const Decayed<S>& decay, V g, V w) {
  if constexpr (kDecay) return decay(g, w);
  return decay(g);
}

enum class Buffer { kNone, kOld, kFresh };

template <Buffer kBuffer, bool kDecay, class T, class M, class S>
void sgd_chunk(const Site<T, M>& at, M* buffer, const Decayed<S>& decay, const Sgd<S>& rule) {
  at.sweep([&](int64_t i, const M* old, auto part, auto stream) {
    const auto w = part.get(old);
    const auto g = gradient<kDecay>(decay, part.get(at.g + i), w);
    if constexpr (kBuffer == Buffer::kNone) {
      at.put(i, rule.weight(w, g), part, stream);
    } else {
      auto b = g;
      if constexpr (kBuffer == Buffer::kOld) b = rule.buffer(part.get(buffer + i), g);
      at.put(i, rule.weight(w, g, b), part, stream);
      part.put(buffer + i, b);
    }
  });
}

template <bool kDecay, class T, class M, class S>
void adam_chunk(const Site<T, M>& at, M* first, M* second, const Decayed<S>& decay, const Adam<S>& rule) {
  at.sweep([&](int64_t i, const M* old, auto part, auto stream) {
    const auto w = part.get(old);
    const auto g = gradient<kDecay>(decay, part.get(at.g + i), w);
    const auto m = rule.first_moment(part.get(first + i), g);
    const auto v = rule.second_moment(part.get(second + i), g);
    at.put(i, rule.weight(w, m, v), part, stream);
    part.put(first + i, m);
    part.put(second + i, v);
  });
}

// In this namespace, so that no instruction set shares a function of the vector with another.
template <class S>
struct Row {
  Adam<S> rule;
};

// The scalars of each tensor, worked out once before the chunks: powers cost more than a tiny tensor.
template <class S>
std::vector<Row<S>>& adam_table(const samk_plan& plan, const samk_descend_args& a) {
  static thread_local std::vector<Row<S>> table;
  table.resize(plan.chunks.count());
  const double* last_row = nullptr;
  float last_step = -1;
  Adam<S> last{};
  for (int32_t t = 0; t < plan.chunks.count(); ++t) {
    if (!has(a.grads, t)) continue;
    const double* row = a.table + a.row[t] * SAMK_COLUMNS;
    if (row != last_row || *a.step[t] != last_step) {
      last_row = row;
      last_step = *a.step[t];
      last = adam<S>(row, static_cast<double>(last_step) + 1);
    }
    table[t].rule = last;
  }
  return table;
}

template <class T, class M>
void sgd_tensor(const samk_descend_args& a, const Site<T, M>& at, const Chunk& chunk, double inv_scale) {
  using S = typename Opmath<T>::S;
  const double* row = a.table + a.row[chunk.tensor] * SAMK_COLUMNS;
  const auto decay = decayed<S>(row, SAMK_SGD, inv_scale);
  const auto rule = sgd<S>(row);
  M* buffer = row[SAMK_MOMENTUM] != 0 ? element<M>(a.state[0], chunk.tensor, chunk.begin) : nullptr;
  const bool fresh = a.fresh != nullptr && a.fresh[chunk.tensor] != 0;
  const auto run = [&](auto decays) {
    constexpr bool kDecay = decltype(decays)::value;
    if (buffer == nullptr) return sgd_chunk<Buffer::kNone, kDecay>(at, buffer, decay, rule);
    if (fresh) return sgd_chunk<Buffer::kFresh, kDecay>(at, buffer, decay, rule);
    sgd_chunk<Buffer::kOld, kDecay>(at, buffer, decay, rule);
  };
  decay.weight_decay != 0 ? run(std::true_type{}) : run(std::false_type{});
}

template <class T, class M>
void adam_tensor(const samk_descend_args& a, const Site<T, M>& at, const Chunk& chunk, double inv_scale,
                 const Adam<typename Opmath<T>::S>& rule) {
  using S = typename Opmath<T>::S;
  const double* row = a.table + a.row[chunk.tensor] * SAMK_COLUMNS;
  const auto decay = decayed<S>(row, SAMK_ADAM, inv_scale);
  M* m = element<M>(a.state[0], chunk.tensor, chunk.begin);
  M* v = element<M>(a.state[1], chunk.tensor, chunk.begin);
  decay.weight_decay != 0 ? adam_chunk<true>(at, m, v, decay, rule)
                          : adam_chunk<false>(at, m, v, decay, rule);
}

template <class T, class M>
void update(const samk_descend_args& a, const Site<T, M>& at, const Chunk& chunk, double inv_scale,
            const std::vector<Row<typename Opmath<T>::S>>* adam) {
  if (adam == nullptr) {
    sgd_tensor(a, at, chunk, inv_scale);
  } else {
    adam_tensor(a, at, chunk, inv_scale, (*adam)[chunk.tensor].rule);
  }
}

// A chunk whose truth is its master, if there is one; which masks there are does not matter.
template <class T>
void descend_master(const samk_descend_args& a, T* w, const T* g, bool is_safe, bool large,
                    const Chunk& chunk, double inv_scale, const std::vector<Row<float>>* adam) {
  float* master = element<float>(a.masters, chunk.tensor, chunk.begin);
  if (master == nullptr) return;
  const bool streaming = large && can_stream(w);
  if (g == nullptr || !is_safe) return round_chunk(w, master, chunk.size, streaming);
  const Site<T, float> at{w, master, master, g, nullptr, chunk.size, streaming};
  update(a, at, chunk, inv_scale, adam);
}

}  // namespace

int descend(const samk_plan& plan, const samk_descend_args& a) {
  const bool has_masters = a.masters.data != nullptr;
  const int32_t kept = has_masters ? a.masters.dtype : a.params.dtype;
  if (check_one_dtype("descend_", a.params.dtype, a.grads) != 0) return 1;
  if (check_masters("descend_", a.params.dtype, a.masters) != 0) return 1;
  if (check_one_dtype("descend_", kept, a.state[0], a.state[1]) != 0) return 1;
  if (!has_masters && check_one_dtype("descend_", kept, a.snapshots) != 0) return 1;
  if (a.rule != SAMK_SGD && a.rule != SAMK_ADAM) return fail("descend_: rule is neither SGD nor Adam");
  if (a.rule == SAMK_ADAM && a.step == nullptr) return fail("descend_: Adam needs step counters");
  const bool is_safe =
      (a.guard == nullptr || std::isfinite(*a.guard)) && (a.found_inf == nullptr || *a.found_inf == 0);
  const double inv_scale = a.inv_scale == nullptr ? 1.0 : *a.inv_scale;
  const int arrays = a.rule == SAMK_SGD ? 5 : 7;
  const bool large = exceeds_cache(plan.chunks.total() * dtype_bytes(a.params.dtype) * arrays);
  const int status = with_dtype("descend_", a.params.dtype, [&](auto type) {
    using T = decltype(type);
    using S = typename Opmath<T>::S;
    const std::vector<Row<S>>* adam = a.rule == SAMK_ADAM && is_safe ? &adam_table<S>(plan, a) : nullptr;
    for_each_chunk(plan, [&](const Chunk& chunk, int64_t) {
      T* w = element<T>(a.params, chunk.tensor, chunk.begin);
      const T* s = has_masters ? nullptr : element<T>(a.snapshots, chunk.tensor, chunk.begin);
      const T* g = element<T>(a.grads, chunk.tensor, chunk.begin);
      if (w == nullptr) return;
      if constexpr (is_half<T>) {
        if (has_masters) return descend_master(a, w, g, is_safe, large, chunk, inv_scale, adam);
      }
      if (const T* compact = compact_of<const T>(a.snapshots, a.offsets, chunk)) {
        // Back in place while the chunk is on its way through the cache; from there on as without a snapshot.
        restore_selected(w, compact, words_of(a.masks, chunk), chunk.size);
        s = nullptr;
      }
      const uint64_t* words = s != nullptr ? words_of(a.masks, chunk) : nullptr;
      // Reading the weights puts them in the cache; only a write that was not read goes around it.
      const bool streaming = large && s != nullptr && can_stream(w);
      if (g == nullptr || !is_safe) {
        if (s != nullptr) copy_words(w, s, words, chunk.size, streaming);
        return;
      }
      const Site<T, T> at{w, s != nullptr ? s : w, nullptr, g, words, chunk.size, streaming};
      update(a, at, chunk, inv_scale, adam);
    });
    return 0;
  });
  if (status != 0) return status;
  if (a.rule == SAMK_ADAM && is_safe) {
    for (int32_t t = 0; t < plan.chunks.count(); ++t) {
      if (has(a.grads, t)) *a.step[t] += 1;
    }
  }
  return 0;
}

}  // namespace SAMK_ISA
}  // namespace samk
