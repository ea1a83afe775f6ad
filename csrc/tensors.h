// Lists of torch's tensors, looked at from C++ without a torch header and without a Python loop.
//
// note: [tensors]
// torch 2.10 and later hand out DLPack's exchange functions, one of which fills in a view of a tensor without
// making an object. Its structures are those of DLPack 1.3 and do not change within a major version. Where
// there is no such function, tensors are asked by their methods, and lists are watched in Python.
#ifndef SAM_KERNELS_TENSORS_H_
#define SAM_KERNELS_TENSORS_H_

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace tensors {

namespace py = pybind11;

struct Device {
  std::int32_t type;
  std::int32_t id;
  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};

struct Dtype {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
  bool operator==(const Dtype& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};

// DLTensor. Shape and strides are the tensor's own memory.
struct View {
  void* data;
  Device device;
  std::int32_t ndim;
  Dtype dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;
  std::uint64_t byte_offset;

  void* address() const { return data == nullptr ? nullptr : static_cast<char*>(data) + byte_offset; }
  std::int64_t numel() const {
    std::int64_t product = 1;
    for (int d = 0; d < ndim; ++d) product *= shape[d];
    return product;
  }
};

// DLPackExchangeAPI.
struct Exchange {
  struct Version {
    std::uint32_t major, minor;
  };
  Version version;
  Exchange* previous;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*view_of_object)(void* object, View* view);  // 0, or -1 and a Python error; may be absent
  void* current_stream;
};

inline const Exchange*& exchange() {
  static const Exchange* known = nullptr;
  return known;
}

// Takes what torch.Tensor.__dlpack_c_exchange_api__ is; returns whether tensors can be viewed from now on.
inline bool set_exchange(const py::object& capsule) {
  exchange() = nullptr;
  if (capsule.is_none()) return false;
  const auto* const given =
      static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (given == nullptr) throw py::error_already_set();
  if (given->version.major != 1 || given->view_of_object == nullptr) return false;
  exchange() = given;
  return true;
}

// Whether the tensor can be viewed; one that is sparse, without memory or of another kind cannot.
inline bool look_at(PyObject* tensor, View* view) {
  if (exchange() == nullptr) return false;
  try {
    if (exchange()->view_of_object(tensor, view) != 0) {
      PyErr_Clear();
      return false;
    }
  } catch (...) {  // what torch throws at objects of another kind
    return false;
  }
  // Tensors that only pretend to have memory have no address.
  return view->data != nullptr || view->numel() == 0;
}

// What a tensor was when it was first seen: steps along dimensions of one element say nothing.
class Layout {
 public:
  explicit Layout(const View& view) : numel_(view.numel()), is_contiguous_(is_contiguous(view)) {
    for (int d = 0; d < view.ndim; ++d) steps_.push_back({view.shape[d], stride(view, d)});
  }
  // Whether a tensor has the same elements at the same places behind its address.
  bool is_of(const View& view) const {
    if (numel_ == 0) return view.numel() == 0;
    if (is_contiguous_) return is_contiguous(view) && view.numel() == numel_;
    if (view.ndim != static_cast<std::int32_t>(steps_.size())) return false;
    for (int d = 0; d < view.ndim; ++d) {
      if (view.shape[d] != steps_[d].size) return false;
      if (view.shape[d] != 1 && stride(view, d) != steps_[d].stride) return false;
    }
    return true;
  }

 private:
  struct Step {
    std::int64_t size, stride;
  };
  static std::int64_t stride(const View& view, int d) {
    if (view.strides != nullptr) return view.strides[d];
    std::int64_t product = 1;
    for (int e = d + 1; e < view.ndim; ++e) product *= view.shape[e];
    return product;
  }
  static bool is_contiguous(const View& view) {
    if (view.strides == nullptr) return true;
    std::int64_t expected = 1;
    for (int d = view.ndim - 1; d >= 0; --d) {
      if (view.shape[d] != 1 && view.strides[d] != expected) return view.numel() == 0;
      expected *= view.shape[d];
    }
    return true;
  }

  std::int64_t numel_;
  bool is_contiguous_;
  std::vector<Step> steps_;
};

// Watches the parameters of a tensor group: what they were, and what gradients they have now.
class Watch {
 public:
  enum Seen { kUnsure, kMoved, kSame };

  explicit Watch(const py::list& params) : params_(params) {
    for (py::handle param : params) {
      View view;
      if (!look_at(param.ptr(), &view)) throw std::invalid_argument("a parameter cannot be viewed");
      if (addresses_.empty()) {
        device_ = view.device;
        dtype_ = view.dtype;
      }
      layouts_.emplace_back(view);
      addresses_.push_back(view.address());
    }
  }

  // Whether all have the device, dtype and layout they had, and are where they were. Unsure where one has
  // not, or cannot be viewed any more: then Python has to look.
  int look() {
    int seen = kSame;
    for (std::size_t t = 0; t < layouts_.size(); ++t) {
      View view;
      if (!look_at(PyList_GET_ITEM(params_.ptr(), static_cast<Py_ssize_t>(t)), &view)) return kUnsure;
      if (!fits(t, view)) return kUnsure;
      if (view.address() != addresses_[t]) seen = kMoved;
    }
    if (seen == kMoved) remember();
    return seen;
  }

  // Lets go of the gradients.
  void forget() { grads_.clear(); }

  // Their addresses, if these are the very tensors that were seen last and are still held; else null.
  const std::vector<void*>* addresses_of(const py::list& grads) const {
    if (grads_.size() != layouts_.size() || grads.size() != grads_.size()) return nullptr;
    for (std::size_t t = 0; t < grads_.size(); ++t) {
      if (PyList_GET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(t)) != grads_[t].ptr()) return nullptr;
    }
    return &grad_addresses_;
  }

  // The gradients, and how many there are; None where one is not as dense and not in the same order as its
  // parameter.
  py::object gradients() {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    py::list found(layouts_.size());
    std::size_t present = 0;
    forget();
    grad_addresses_.resize(layouts_.size());
    for (std::size_t t = 0; t < layouts_.size(); ++t) {
      const auto place = static_cast<Py_ssize_t>(t);
      PyObject* const grad = PyObject_GetAttr(PyList_GET_ITEM(params_.ptr(), place), name);
      if (grad == nullptr) throw py::error_already_set();
      PyList_SET_ITEM(found.ptr(), place, grad);
      grad_addresses_[t] = nullptr;
      if (grad == Py_None) continue;
      View view;
      if (!look_at(grad, &view) || !fits(t, view)) return py::none();
      grad_addresses_[t] = view.address();
      ++present;
    }
    for (py::handle grad : found) grads_.push_back(py::reinterpret_borrow<py::object>(grad));
    return py::make_tuple(std::move(found), present);
  }

 private:
  bool fits(std::size_t t, const View& view) const {
    return view.device == device_ && view.dtype == dtype_ && layouts_[t].is_of(view);
  }
  void remember() {
    for (std::size_t t = 0; t < addresses_.size(); ++t) {
      View view;
      look_at(PyList_GET_ITEM(params_.ptr(), static_cast<Py_ssize_t>(t)), &view);
      addresses_[t] = view.address();
    }
  }

  py::list params_;
  Device device_{};
  Dtype dtype_{};
  std::vector<Layout> layouts_;
  std::vector<void*> addresses_;
  std::vector<py::object> grads_;
  std::vector<void*> grad_addresses_;
};

// Whether the values of a dict are these very objects, in this order.
inline bool has_values(const py::dict& dict, const py::list& values) {
  if (PyDict_GET_SIZE(dict.ptr()) != PyList_GET_SIZE(values.ptr())) return false;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t i = 0; PyDict_Next(dict.ptr(), &position, &key, &value); ++i) {
    if (value != PyList_GET_ITEM(values.ptr(), i)) return false;
  }
  return true;
}

// Whether each dict has this very object under the name.
inline bool hold(const py::list& dicts, const py::str& name, const py::list& objects) {
  const Py_ssize_t count = PyList_GET_SIZE(dicts.ptr());
  if (count != PyList_GET_SIZE(objects.ptr())) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const dict = PyList_GET_ITEM(dicts.ptr(), i);
    if (!PyDict_Check(dict)) return false;
    PyObject* const found = PyDict_GetItemWithError(dict, name.ptr());
    if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (found != PyList_GET_ITEM(objects.ptr(), i)) return false;
  }
  return true;
}

// Whether two lists have the very same objects.
inline bool are_same(const py::list& xs, const py::list& ys) {
  const Py_ssize_t count = PyList_GET_SIZE(xs.ptr());
  if (count != PyList_GET_SIZE(ys.ptr())) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (PyList_GET_ITEM(xs.ptr(), i) != PyList_GET_ITEM(ys.ptr(), i)) return false;
  }
  return true;
}

}  // namespace tensors

#endif  // SAM_KERNELS_TENSORS_H_
