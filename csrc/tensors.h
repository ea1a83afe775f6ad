// Lists of torch's tensors, looked at from C++ without a torch header and without a Python loop.
//
// note: [tensors]
// torch 2.10 and later hand out DLPack's exchange functions, one of which fills in a view of a tensor without
// making an object. Its structures are those of DLPack 1.3 and do not change within a major version. Where
// there is no such function, tensors are asked by their methods, and lists are watched in Python.
#ifndef SAM_KERNELS_TENSORS_H_
#define SAM_KERNELS_TENSORS_H_

#include <pybind11/pybind11.h>

#include <cstddef>
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

static_assert(sizeof(View) == 48 && offsetof(View, shape) == 24 && offsetof(View, byte_offset) == 40,
              "DLTensor has another layout here");
static_assert(offsetof(Exchange, view_of_object) == 40, "DLPackExchangeAPI has another layout here");

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
      const bool is_refused =
          PyErr_ExceptionMatches(PyExc_Exception) && !PyErr_ExceptionMatches(PyExc_MemoryError);
      if (PyErr_Occurred() && !is_refused) throw py::error_already_set();  // somebody pressed ctrl-C
      PyErr_Clear();
      return false;
    }
  } catch (py::error_already_set&) {
    throw;
  } catch (...) {  // what torch throws at objects of another kind
    return false;
  }
  // Tensors that only pretend to have memory have no address.
  return view->data != nullptr || view->numel() == 0;
}

// What a tensor was when it was first seen: strides of dimensions of one element say nothing.
class Layout {
 public:
  explicit Layout(const View& view) : numel_(view.numel()) {
    for (int d = 0; d < view.ndim; ++d) dimensions_.push_back({view.shape[d], stride(view, d)});
  }
  std::int64_t numel() const { return numel_; }
  // Whether a tensor has this shape and the same order of elements in memory.
  bool is_of(const View& view) const {
    if (view.ndim != static_cast<std::int32_t>(dimensions_.size())) return false;
    for (int d = 0; d < view.ndim; ++d) {
      if (view.shape[d] != dimensions_[d].size) return false;
      if (numel_ > 0 && view.shape[d] != 1 && stride(view, d) != dimensions_[d].stride) return false;
    }
    return true;
  }

 private:
  struct Dimension {
    std::int64_t size, stride;
  };
  static std::int64_t stride(const View& view, int d) {
    if (view.strides != nullptr) return view.strides[d];
    std::int64_t product = 1;
    for (int e = d + 1; e < view.ndim; ++e) product *= view.shape[e];
    return product;
  }

  std::int64_t numel_;
  std::vector<Dimension> dimensions_;
};

// Watches the parameters of a tensor group: what they were, and what gradients they have now. Owns no object
// of Python, so that none is kept from the garbage collector; whoever asks brings the lists.
class Watch {
 public:
  enum Seen { kUnsure, kMoved, kSame };  // UNSURE, MOVED, SAME of sam_kernels/watch.py

  explicit Watch(const py::list& params) {
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

  // Whether all have the device, dtype, shape and strides they had, and are where they were. Unsure where one
  // has not, or cannot be viewed any more: then Python has to look.
  int look(const py::list& params) {
    if (params.size() != layouts_.size()) return kUnsure;
    std::vector<void*> found(layouts_.size());
    for (std::size_t t = 0; t < layouts_.size(); ++t) {
      View view;
      if (!look_at(item(params, t), &view) || !fits(t, view)) return kUnsure;
      found[t] = view.address();
    }
    if (found == addresses_) return kSame;
    addresses_ = std::move(found);
    return kMoved;
  }

  // The gradients, and how many there are; None where one is not as dense and not in the same order as its
  // parameter.
  py::object gradients(const py::list& params) {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    if (params.size() != layouts_.size()) return py::none();
    py::list found(layouts_.size());
    std::size_t present = 0;
    grads_.assign(layouts_.size(), nullptr);
    for (std::size_t t = 0; t < layouts_.size(); ++t) {
      PyObject* const grad = PyObject_GetAttr(item(params, t), name);
      if (grad == nullptr) throw py::error_already_set();
      PyList_SET_ITEM(found.ptr(), static_cast<Py_ssize_t>(t), grad);
      if (grad == Py_None) continue;
      View view;
      if (!look_at(grad, &view) || !fits(t, view) || is_negated(grad, t)) return py::none();
      grads_[t] = view.address();
      ++present;
    }
    return py::make_tuple(std::move(found), present);
  }

  // Addresses of the gradients that were returned last.
  const std::vector<void*>& grads() const { return grads_; }

 private:
  static PyObject* item(const py::list& list, std::size_t t) {
    return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(t));
  }
  bool fits(std::size_t t, const View& view) const {
    return view.device == device_ && view.dtype == dtype_ && layouts_[t].is_of(view);
  }
  // Behind complex numbers torch flips signs by a bit of the tensor, which views do not show. More than one
  // element would lie apart, as imaginary parts do.
  bool is_negated(PyObject* grad, std::size_t t) const {
    if (layouts_[t].numel() != 1) return false;
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    PyObject* const answer = PyObject_CallMethodNoArgs(grad, name);
    if (answer == nullptr) throw py::error_already_set();
    const bool is_set = answer != Py_False;
    Py_DECREF(answer);
    return is_set;
  }

  Device device_{};
  Dtype dtype_{};
  std::vector<Layout> layouts_;
  std::vector<void*> addresses_;
  std::vector<void*> grads_;
};

// Whether a dict has these very keys and values, in this order.
inline bool has_items(const py::dict& dict, const py::list& keys, const py::list& values) {
  const Py_ssize_t count = PyDict_GET_SIZE(dict.ptr());
  if (count != PyList_GET_SIZE(keys.ptr()) || count != PyList_GET_SIZE(values.ptr())) return false;
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t i = 0; PyDict_Next(dict.ptr(), &position, &key, &value); ++i) {
    if (key != PyList_GET_ITEM(keys.ptr(), i) || value != PyList_GET_ITEM(values.ptr(), i)) return false;
  }
  return true;
}

// Whether each dict has this very object under the name.
inline bool have(const py::list& dicts, const py::str& name, const py::list& objects) {
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
