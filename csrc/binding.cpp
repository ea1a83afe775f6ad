// The Python face of the C ABI: a Plan per layout of a parameter list, over tables of addresses.
//
// No torch header and no torch library: tensors are Python objects, and device scalars arrive as
// addresses. See note: [addresses] here and note: [tensors] in tensors.h.

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "sam_kernels.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

// Which list of a pass a table of addresses belongs to.
enum Slot {
  kParams,
  kGrads,
  kSnapshots,
  kList0,
  kList1,
  kList2,
  kOut0,
  kOut1,
  kSteps,
  kMasks,
  kWithin,
  kOffsets,
  kSlots
};

constexpr int kMaxLists = 3;
constexpr int kMaxOuts = 2;

// An existing tensor without elements may have no storage, yet it takes part (its step counter
// advances); NULL would say that it does not.
char nothing;

struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* numel = PyUnicode_InternFromString("numel");
  PyObject* device = PyUnicode_InternFromString("device");
};

const Names& names() {
  static const Names interned;  // never released: interned strings live as long as the interpreter
  return interned;
}

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(int status) {
  if (status != 0) throw std::runtime_error(samk_last_error());
}

// Calls tensor.name() and returns the new reference, or throws what it raised.
py::object call(PyObject* tensor, PyObject* name) {
  PyObject* result = PyObject_VectorcallMethod(name, &tensor, 1, nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// The address of a tensor's first element; null where it has none.
void* address_of(PyObject* tensor) {
  tensors::View view;
  if (tensors::look_at(tensor, &view)) return view.address();
  return PyLong_AsVoidPtr(call(tensor, names().data_ptr).ptr());
}

std::string where(const char* list, std::size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

// The passes of one library: the CPU engine inside this module, or one that was opened by its path.
struct Library {
  decltype(&samk_plan_create) plan_create = samk_plan_create;
  decltype(&samk_plan_destroy) plan_destroy = samk_plan_destroy;
  decltype(&samk_plan_workspace_bytes) plan_workspace_bytes = samk_plan_workspace_bytes;
  decltype(&samk_sq_norm) sq_norm = samk_sq_norm;
  decltype(&samk_perturb) perturb = samk_perturb;
  decltype(&samk_restore) restore = samk_restore;
  decltype(&samk_grad_stats) grad_stats = samk_grad_stats;
  decltype(&samk_combine) combine = samk_combine;
  decltype(&samk_noise) noise = samk_noise;
  decltype(&samk_descend) descend = samk_descend;
  decltype(&samk_accumulate) accumulate = samk_accumulate;
  decltype(&samk_count) count = samk_count;
  decltype(&samk_mark) mark = samk_mark;
  decltype(&samk_last_error) last_error = samk_last_error;
  decltype(&samk_check_device) check_device = nullptr;  // where there are devices
  decltype(&samk_build_info) build_info = nullptr;

  void check(int status) const {
    if (status != 0) throw std::runtime_error(last_error());
  }
  void require_devices() const {
    if (check_device == nullptr) {
      throw std::runtime_error("the CPU library serves no devices; open the CUDA library by its path");
    }
  }
};

// Opens a library that exports the C ABI. It stays open: kernels may still run when the last plan is gone.
std::shared_ptr<Library> open_library(const std::string& path) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(handle, name));
    if (function == nullptr) throw std::runtime_error(path + " exports no " + name);
  };
  decltype(&samk_abi_version) version = nullptr;
  find(version, "samk_abi_version");
  if (version() != SAMK_ABI_VERSION) {
    throw std::runtime_error(path + " speaks version " + std::to_string(version()) +
                             " of the C interface and this package version " +
                             std::to_string(SAMK_ABI_VERSION) +
                             "; reinstall the package, so that both come from one source");
  }
  auto library = std::make_shared<Library>();
  find(library->plan_create, "samk_plan_create");
  find(library->plan_destroy, "samk_plan_destroy");
  find(library->plan_workspace_bytes, "samk_plan_workspace_bytes");
  find(library->sq_norm, "samk_sq_norm");
  find(library->perturb, "samk_perturb");
  find(library->restore, "samk_restore");
  find(library->grad_stats, "samk_grad_stats");
  find(library->combine, "samk_combine");
  find(library->noise, "samk_noise");
  find(library->descend, "samk_descend");
  find(library->accumulate, "samk_accumulate");
  find(library->count, "samk_count");
  find(library->mark, "samk_mark");
  find(library->last_error, "samk_last_error");
  find(library->check_device, "samk_check_device");
  find(library->build_info, "samk_build_info");
  return library;
}

// is_random, seed, step, number by tensor, has_within, outside: see samk_ranks.
using Ranks = std::tuple<bool, std::uint64_t, std::uint32_t, std::vector<std::uint32_t>, bool, bool>;

class Plan {
 public:
  // device: the torch.device of the parameters.
  Plan(std::vector<std::int64_t> numel, std::vector<std::int32_t> row, std::shared_ptr<Library> library,
       py::object device)
      : numel_(std::move(numel)),
        row_(std::move(row)),
        library_(std::move(library)),
        device_(std::move(device)) {
    if (numel_.size() != row_.size())
      throw std::invalid_argument("Plan: numel and row must have one entry per tensor");
    plan_ = library_->plan_create(numel_.data(), static_cast<std::int64_t>(numel_.size()));
    if (plan_ == nullptr) throw std::runtime_error(library_->last_error());
  }
  ~Plan() { library_->plan_destroy(plan_); }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // note: [addresses]
  // Gradients are new tensors after every backward, so each pass reads its addresses again: well below 100 ns
  // a tensor.
  // What the tensor group vouches for (device, dtype, size and strides of parameters, gradients,
  // snapshots) is not checked again. Lists from elsewhere name the dtype they must have, and are checked
  // for device and size too; state, whose tensors are the same for many steps, is held on to and checked
  // only where a tensor or its address is new.
  //
  // Returns how many entries are not None.
  std::size_t point(int slot, const char* list, const py::list& tensors, int dtype, const py::object& must_be,
                    bool hold) {
    if (slot < 0 || slot >= kSlots) throw std::invalid_argument("Plan.point: no such slot");
    if (tensors.size() != numel_.size()) {
      throw std::invalid_argument(std::string(list) + " has " + std::to_string(tensors.size()) +
                                  " entries, but the plan has " + std::to_string(numel_.size()) + " tensors");
    }
    Table& table = tables_[slot];
    table.dtype = dtype;
    table.data.resize(numel_.size());
    if (hold) table.held.resize(numel_.size());
    std::size_t present = 0;
    for (std::size_t t = 0; t < numel_.size(); ++t) {
      PyObject* tensor = PyList_GetItem(tensors.ptr(), static_cast<Py_ssize_t>(t));
      if (tensor == nullptr) throw py::error_already_set();
      if (tensor == Py_None) {
        table.data[t] = nullptr;
        continue;
      }
      const bool is_mask = slot == kMasks || slot == kWithin || slot == kOffsets;
      const std::int64_t numel = slot == kSteps ? 1 : is_mask ? (numel_[t] + 63) / 64 : numel_[t];
      void* data = address_of(tensor);
      // A held tensor is checked again where its memory was exchanged under it.
      const bool is_known = hold && table.held[t].ptr() == tensor && table.data[t] == data;
      if (!must_be.is_none() && !is_known) {
        check_tensor(list, t, tensor, numel, must_be, hold);
        if (hold) table.held[t] = py::reinterpret_borrow<py::object>(tensor);
      }
      if (data == nullptr) {
        if (PyErr_Occurred()) throw py::error_already_set();
        if (numel > 0) {
          throw std::invalid_argument(
              where(list, t) + " has " + std::to_string(numel) +
              " elements but no memory in this process (its data_ptr is 0); pass local "
              "tensors, not DTensors or meta tensors");
        }
        data = &nothing;
      }
      table.data[t] = data;
      ++present;
    }
    return present;
  }

  // The gradients that a watch has looked at last need no second look, if they are the ones at hand. Returns
  // how many there are, or -1 if these are others.
  std::ptrdiff_t point_seen(const tensors::Watch& watch, const py::tuple& seen, const py::list& grads,
                            int dtype) {
    const std::size_t count = numel_.size();
    if (watch.grads().size() != count || seen.size() != count || grads.size() != count) return -1;
    std::ptrdiff_t present = 0;
    for (std::size_t t = 0; t < count; ++t) {
      PyObject* const grad = PyList_GET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(t));
      if (grad != PyTuple_GET_ITEM(seen.ptr(), static_cast<Py_ssize_t>(t))) return -1;
      present += grad != Py_None;
    }
    Table& table = tables_[kGrads];
    table.dtype = dtype;
    table.data = watch.grads();
    for (std::size_t t = 0; t < count; ++t) {
      const bool is_there = PyTuple_GET_ITEM(seen.ptr(), static_cast<Py_ssize_t>(t)) != Py_None;
      if (is_there && table.data[t] == nullptr) table.data[t] = &nothing;
    }
    return present;
  }

  // The words of the masks, or that no tensor has one.
  void forget_masks() {
    tables_[kMasks].data.clear();
    tables_[kOffsets].data.clear();
  }

  std::int64_t workspace_bytes() const { return library_->plan_workspace_bytes(plan_); }

  // Memory of workspace_bytes(), cleared once, and the stream and device of the passes that follow. The CPU
  // library needs neither.
  void place(std::uintptr_t workspace, std::uintptr_t stream, std::int32_t device) {
    workspace_ = at<void>(workspace);
    queue_ = {at<void>(stream), device};
  }

  void sq_norm(std::uintptr_t table, bool reads_params, int moment, double q, std::uintptr_t peak,
               double root, std::uintptr_t out, std::uintptr_t per_tensor, bool is_masked) const {
    samk_sq_norm_args args{};
    if (is_masked) args.masks = list(kMasks);
    args.grads = list(kGrads);
    if (reads_params) args.params = list(kParams);
    args.row = row_.data();
    args.table = at<const double>(table);
    args.moment = moment;
    args.q = q;
    args.peak = at<const double>(peak);
    args.root = root;
    args.out = at<double>(out);
    args.per_tensor = at<double>(per_tensor);
    args.workspace = workspace_;
    args.queue = queue_;
    run([&] { return library_->sq_norm(plan_, &args); });
  }

  // How many there have been. Counted here, where no signal can come between a perturbation and its count.
  std::int64_t perturbations() const { return perturbations_; }
  // Of a group with masters they stand where snapshots would. number: by tensor, for stochastic rounding, or
  // empty.
  void perturb(std::uintptr_t table, int shape, double q, std::uintptr_t peak, std::uintptr_t norm,
               std::uintptr_t tensor_scale, bool has_masters, std::uint64_t seed, std::uint32_t step,
               const std::vector<std::uint32_t>& number) {
    if (!number.empty() && number.size() != numel_.size()) {
      throw std::invalid_argument("perturb_: stochastic rounding needs a number for every tensor");
    }
    // Only tensors that were handed a snapshot buffer are perturbed.
    for (std::size_t t = 0; t < numel_.size(); ++t) {
      if (tables_[kSnapshots].data[t] == nullptr) tables_[kGrads].data[t] = nullptr;
    }
    samk_perturb_args args{};
    args.params = list(kParams);
    args.grads = list(kGrads);
    (has_masters ? args.masters : args.snapshots) = list(kSnapshots);
    args.masks = list(kMasks);
    args.offsets = list(kOffsets);
    args.row = row_.data();
    args.table = at<const double>(table);
    args.number = number.empty() ? nullptr : number.data();
    args.seed = seed;
    args.step = step;
    args.shape = shape;
    args.q = q;
    args.peak = at<const double>(peak);
    args.norm = at<const double>(norm);
    args.tensor_scale = at<const double>(tensor_scale);
    args.queue = queue_;
    run([&] { return library_->perturb(plan_, &args); });
    ++perturbations_;
  }

  void restore(bool has_masters) const {
    samk_restore_args args{};
    args.params = list(kParams);
    (has_masters ? args.masters : args.snapshots) = list(kSnapshots);
    args.masks = list(kMasks);
    args.offsets = list(kOffsets);
    args.queue = queue_;
    run([&] { return library_->restore(plan_, &args); });
  }

  void accumulate() const {
    samk_accumulate_args args{};
    args.scores = list(kList0);
    args.grads = list(kGrads);
    args.queue = queue_;
    run([&] { return library_->accumulate(plan_, &args); });
  }

  void count(const Ranks& ranks, std::int32_t prefix, std::int32_t shift, std::int32_t bits,
             std::uintptr_t counts) const {
    samk_count_args args{};
    args.ranks = read(ranks);
    args.masks = list(kMasks);
    args.prefix = prefix;
    args.shift = shift;
    args.bits = bits;
    args.counts = at<std::int64_t>(counts);
    args.queue = queue_;
    run([&] { return library_->count(plan_, &args); });
  }

  void mark(const Ranks& ranks, std::int32_t threshold, std::int32_t shift, bool add,
            const std::vector<std::int64_t>& position, std::uintptr_t candidates, std::int64_t capacity,
            std::uintptr_t found) const {
    samk_mark_args args{};
    args.ranks = read(ranks);
    args.masks = list(kMasks);
    args.threshold = threshold;
    args.shift = shift;
    args.add = add;
    if (candidates != 0 && position.size() != numel_.size()) {
      throw std::invalid_argument("mark_: candidates need the position of every tensor");
    }
    args.position = candidates == 0 ? nullptr : position.data();
    args.candidates = at<std::int64_t>(candidates);
    args.capacity = capacity;
    args.found = at<std::int64_t>(found);
    args.queue = queue_;
    run([&] { return library_->mark(plan_, &args); });
  }

  void grad_stats(int lists, std::uintptr_t out, std::uintptr_t per_tensor) const {
    check_count("grad_stats", lists, kMaxLists, "lists");
    samk_grad_stats_args args{};
    for (int i = 0; i < lists; ++i) args.list[i] = list(static_cast<Slot>(kList0 + i));
    args.lists = lists;
    args.out = at<double>(out);
    args.per_tensor = at<double>(per_tensor);
    args.workspace = workspace_;
    args.queue = queue_;
    run([&] { return library_->grad_stats(plan_, &args); });
  }

  void combine(int lists, int outs, std::uintptr_t coefficients, bool per_tensor) const {
    check_count("combine_", lists, kMaxLists, "lists");
    check_count("combine_", outs, kMaxOuts, "outputs");
    samk_combine_args args{};
    for (int i = 0; i < lists; ++i) args.list[i] = list(static_cast<Slot>(kList0 + i));
    for (int i = 0; i < outs; ++i) args.out[i] = list(static_cast<Slot>(kOut0 + i));
    args.lists = lists;
    args.outs = outs;
    args.coefficients = at<const double>(coefficients);
    args.per_tensor = per_tensor;
    args.queue = queue_;
    run([&] { return library_->combine(plan_, &args); });
  }

  void noise(std::uint64_t seed, std::uint32_t step, const std::vector<std::uint32_t>& number) const {
    if (number.size() != numel_.size()) {
      throw std::invalid_argument("noise_: a number is needed for every tensor");
    }
    samk_noise_args args{};
    args.out = list(kOut0);
    args.seed = seed;
    args.step = step;
    args.number = number.data();
    args.queue = queue_;
    run([&] { return library_->noise(plan_, &args); });
  }

  // fresh: an empty list says that no momentum buffer is. with_momentum: by row of the table, whether it has
  // any.
  void descend(std::uintptr_t table, int rule, const py::list& fresh, const std::vector<bool>& with_momentum,
               std::uintptr_t guard, std::uintptr_t found_inf, std::uintptr_t inv_scale, bool has_masters) {
    samk_descend_args args{};
    args.params = list(kParams);
    args.grads = list(kGrads);
    (has_masters ? args.masters : args.snapshots) = list(kSnapshots);
    args.masks = list(kMasks);
    args.offsets = list(kOffsets);
    args.row = row_.data();
    args.table = at<const double>(table);
    args.rule = rule;
    args.guard = at<const double>(guard);
    args.found_inf = at<const float>(found_inf);
    args.inv_scale = at<const float>(inv_scale);
    if (rule == SAMK_SGD) {
      args.state[0] = list(kList0);
      if (fresh.size() != 0) args.fresh = read_fresh(fresh);
      require_momentum(with_momentum);
    } else {
      args.state[0] = list(kList0);
      args.state[1] = list(kList1);
      args.step = reinterpret_cast<float* const*>(tables_[kSteps].data.data());
      require("exp_avg", kList0);
      require("exp_avg_sq", kList1);
      require("step", kSteps);
    }
    if (has_masters) require("masters", kSnapshots);
    args.workspace = workspace_;
    args.queue = queue_;
    run([&] { return library_->descend(plan_, &args); });
  }

 private:
  struct Table {
    std::vector<void*> data;
    std::vector<py::object> held;
    std::int32_t dtype = SAMK_F32;
  };

  samk_list list(Slot slot) const {
    const Table& table = tables_[slot];
    return {table.data.empty() ? nullptr : table.data.data(), table.dtype};
  }

  samk_ranks read(const Ranks& given) const {
    const auto& [is_random, seed, step, number, has_within, outside] = given;
    if (is_random && number.size() != numel_.size()) {
      throw std::invalid_argument("random ranks need a number for every tensor");
    }
    samk_ranks ranks{};
    if (!is_random) ranks.scores = list(kList0);
    ranks.is_random = is_random;
    ranks.seed = seed;
    ranks.step = step;
    ranks.number = is_random ? number.data() : nullptr;
    if (has_within) ranks.within = list(kWithin);
    ranks.outside = outside;
    return ranks;
  }

  template <class Pass>
  void run(Pass pass) const {
    int status;
    {
      py::gil_scoped_release released;
      status = pass();
    }
    library_->check(status);
  }

  static void check_count(const char* pass, int count, int most, const char* what) {
    if (count < 1 || count > most) {
      throw std::invalid_argument(std::string(pass) + ": got " + std::to_string(count) + " " + what +
                                  "; expected 1 to " + std::to_string(most));
    }
  }

  void check_tensor(const char* list, std::size_t t, PyObject* tensor, std::int64_t numel,
                    const py::object& must_be, bool is_state) const {
    auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names().dtype));
    if (!dtype) throw py::error_already_set();
    if (!dtype.is(must_be)) {
      throw std::invalid_argument(where(list, t) + " is " + std::string(py::str(dtype)) +
                                  " but the list is " + std::string(py::str(must_be)) +
                                  "; a list must have one dtype");
    }
    const long long count = PyLong_AsLongLong(call(tensor, names().numel).ptr());
    if (count == -1 && PyErr_Occurred()) throw py::error_already_set();
    if (count != numel) {
      throw std::invalid_argument(where(list, t) + " has " + std::to_string(count) + " elements, expected " +
                                  std::to_string(numel));
    }
    // A kernel would take an address of another device for its own.
    auto device = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names().device));
    if (!device) throw py::error_already_set();
    if (!device.equal(device_)) {
      throw std::invalid_argument(where(list, t) + " is on " + std::string(py::str(device)) +
                                  " but the parameters are on " + std::string(py::str(device_)) +
                                  (is_state ? "; move the optimizer's state with its parameters" : ""));
    }
  }

  // A gradient without the state its rule writes would be a write to address 0.
  void require(const char* name, Slot slot) const {
    for (std::size_t t = 0; t < numel_.size(); ++t) {
      if (tables_[kGrads].data[t] != nullptr && tables_[slot].data[t] == nullptr) missing(name, t);
    }
  }

  void require_momentum(const std::vector<bool>& with_momentum) const {
    for (std::size_t t = 0; t < numel_.size(); ++t) {
      if (tables_[kGrads].data[t] == nullptr || tables_[kList0].data[t] != nullptr) continue;
      if (with_momentum.at(row_[t])) missing("momentum_buffer", t);
    }
  }

  [[noreturn]] static void missing(const char* name, std::size_t t) {
    throw std::invalid_argument("descend_: grads[" + std::to_string(t) + "] is there but " + where(name, t) +
                                " is None; every tensor with a gradient needs its state");
  }

  const std::uint8_t* read_fresh(const py::list& fresh) {
    if (fresh.size() != numel_.size()) {
      throw std::invalid_argument("descend_: fresh has " + std::to_string(fresh.size()) +
                                  " entries, but there are " + std::to_string(numel_.size()) + " tensors");
    }
    fresh_.resize(numel_.size());
    for (std::size_t t = 0; t < numel_.size(); ++t) {
      const int flag = PyObject_IsTrue(PyList_GET_ITEM(fresh.ptr(), static_cast<Py_ssize_t>(t)));
      if (flag < 0) throw py::error_already_set();
      fresh_[t] = static_cast<std::uint8_t>(flag);
    }
    return fresh_.data();
  }

  std::vector<std::int64_t> numel_;
  std::vector<std::int32_t> row_;
  std::vector<std::uint8_t> fresh_;
  Table tables_[kSlots];
  std::shared_ptr<Library> library_;
  py::object device_;
  samk_plan* plan_ = nullptr;
  std::int64_t perturbations_ = 0;
  void* workspace_ = nullptr;
  samk_queue queue_{};
};

// The instruction sets samk_set_cpu_isa accepts on this machine, plainest first.
py::list available_isas() {
  const std::string present = samk_cpu_isa();
  py::list found;
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    if (samk_set_cpu_isa(name) == 0) found.append(name);
  }
  check(samk_set_cpu_isa(present.c_str()));
  return found;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The passes in C++; driven by sam_kernels.backends.native.";
  m.attr("abi_version") = SAMK_ABI_VERSION;

  // Tables of addresses belong to one pass at a time: a plan serves one thread at a time.
  py::class_<Library, std::shared_ptr<Library>>(m, "Library", py::module_local())
      .def(py::init<>())
      .def(py::init(&open_library))
      .def_property_readonly("is_cpu_engine",
                             [](const Library& self) { return self.check_device == nullptr; })
      .def("check_device",
           [](const Library& self, int device) {
             self.require_devices();
             self.check(self.check_device(device));
           })
      .def("build_info", [](const Library& self) {
        self.require_devices();
        return std::string(self.build_info());
      });

  py::class_<tensors::Watch>(m, "Watch", py::module_local())
      .def(py::init<const py::list&>())
      .def("look", &tensors::Watch::look)
      .def("gradients", &tensors::Watch::gradients);

  py::class_<Plan>(m, "Plan", py::module_local())
      .def(py::init([](const py::list& numel, const py::list& row, std::shared_ptr<Library> library,
                       py::object device) {
        std::vector<std::int64_t> sizes;
        std::vector<std::int32_t> rows;
        for (py::handle n : numel) sizes.push_back(n.cast<std::int64_t>());
        for (py::handle r : row) rows.push_back(r.cast<std::int32_t>());
        return new Plan(std::move(sizes), std::move(rows), std::move(library), std::move(device));
      }))
      .def("point", &Plan::point, py::arg("slot"), py::arg("name"), py::arg("tensors"), py::arg("dtype"),
           py::arg("must_be") = py::none(), py::arg("hold") = false)
      .def("point_seen", &Plan::point_seen)
      .def("workspace_bytes", &Plan::workspace_bytes)
      .def("place", &Plan::place)
      .def("sq_norm", &Plan::sq_norm)
      .def("perturb", &Plan::perturb)
      .def_property_readonly("perturbations", &Plan::perturbations)
      .def("restore", &Plan::restore)
      .def("grad_stats", &Plan::grad_stats)
      .def("combine", &Plan::combine)
      .def("noise", &Plan::noise)
      .def("descend", &Plan::descend)
      .def("forget_masks", &Plan::forget_masks)
      .def("accumulate", &Plan::accumulate)
      .def("count", &Plan::count)
      .def("mark", &Plan::mark);

  for (auto [name, slot] : {std::pair<const char*, int>{"PARAMS", kParams},
                            {"GRADS", kGrads},
                            {"SNAPSHOTS", kSnapshots},
                            {"LISTS", kList0},
                            {"OUTS", kOut0},
                            {"STEPS", kSteps},
                            {"MASKS", kMasks},
                            {"WITHIN", kWithin},
                            {"OFFSETS", kOffsets}}) {
    m.attr(name) = slot;
  }

  m.def("set_exchange", &tensors::set_exchange);
  m.def("has_items", &tensors::has_items);
  m.def("have", &tensors::have);
  m.def("are_same", &tensors::are_same);

  m.def("set_thread_pool", [](std::uintptr_t parallel_for, std::uintptr_t num_threads) {
    samk_set_thread_pool(reinterpret_cast<samk_parallel_for_fn>(parallel_for),
                         reinterpret_cast<samk_num_threads_fn>(num_threads));
  });
  m.def("isa", [] { return std::string(samk_cpu_isa()); });
  m.def("available_isas", &available_isas);
  m.def("set_isa", [](const py::object& name) {
    check(samk_set_cpu_isa(name.is_none() ? nullptr : name.cast<std::string>().c_str()));
  });
}
