// The node of autograd of a compiled call, in C++: see native_node.py, which it calls for its
// backward as the node of a torch.autograd.Function would.

#include <Python.h>

#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <utility>

using at::Tensor;
using namespace torch::autograd;

PyObject *THPVariable_Wrap(const at::TensorBase &);
extern "C" {
int64_t aot_offset;  // of the Tensor in a Python tensor
}

namespace {

// Nodes are shared_ptr's in some versions of PyTorch, and intrusive ones in others.
using Ref = decltype(Edge::function);
template <class P>
struct WeakOf;
template <class T>
struct WeakOf<std::shared_ptr<T>> {
  using type = std::weak_ptr<T>;
};
template <class T>
struct WeakOf<c10::intrusive_ptr<T>> {
  using type = c10::weak_intrusive_ptr<T>;
};
using Weak = WeakOf<Ref>::type;
template <class P>
constexpr bool is_shared = std::is_same_v<P, std::shared_ptr<Node>>;

template <class N, class P = Ref>
auto made() {
  if constexpr (is_shared<P>)
    return std::shared_ptr<N>(new N(), [](N *node) { deleteNode(node); });
  else
    return c10::make_intrusive<N>();
}
template <class N, class P = Ref>
P itself(N *node) {
  if constexpr (is_shared<P>)
    return node->shared_from_this();
  else
    return P::unsafe_reclaim_from_nonowning(node);
}

struct Gil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~Gil() { PyGILState_Release(state); }
};

[[noreturn]] void raise() {  // what Python has raised
  python_error e;
  e.persist();
  throw e;
}
struct Owned {
  PyObject *it;
  explicit Owned(PyObject *x) : it(x) {
    if (!x) raise();
  }
  Owned(const Owned &) = delete;
  ~Owned() { Py_XDECREF(it); }
  PyObject *release() { return std::exchange(it, nullptr); }
};

const Tensor &tensor(PyObject *x) { return *(const Tensor *)((char *)x + aot_offset); }

PyObject *list_of(const variable_list &tensors) {
  Owned found(PyList_New(tensors.size()));
  for (size_t i = 0; i < tensors.size(); i++)
    PyList_SET_ITEM(found.it, i, THPVariable_Wrap(tensors[i]));
  return found.release();
}

variable_list tensors_in(PyObject *sequence) {
  Owned fast(PySequence_Fast(sequence, "gradients are a sequence"));
  variable_list found;
  for (Py_ssize_t i = 0, n = PySequence_Fast_GET_SIZE(fast.it); i < n; i++) {
    PyObject *x = PySequence_Fast_GET_ITEM(fast.it, i);
    found.push_back(x == Py_None ? Tensor() : tensor(x));
  }
  return found;
}

struct Saving : Node {
  // none after the last backward; shared, as a hook that unpacks lets other threads run
  using All = std::vector<SavedVariable>;
  std::shared_ptr<All> saved = std::make_shared<All>();
  void release_variables() override {
    Gil gil;
    saved = nullptr;
  }
  void save(const Tensor &t, bool is_result) { saved->emplace_back(t, is_result); }
  variable_list unpacked() {
    TORCH_CHECK(saved, ERR_BACKWARD_TWICE);
    variable_list found;
    auto all = saved;
    for (SavedVariable &s : *all) found.push_back(s.unpack(itself<Node>(this)));
    return found;
  }
};

// Results have nodes of their own where there are several: see lifted.py.
struct LiftNode : Saving {
  std::string name() const override { return "LiftBackward"; }
  variable_list apply(variable_list &&cts) override { return std::move(cts); }
};

enum { PLAN, COMPUTE, QUICK, SLOW };  // of `self`, which native_node.py makes

PyObject *part(PyObject *self, int i) { return PyTuple_GET_ITEM(self, i); }

struct CallNode : Saving {
  PyObject *self = nullptr, *state = nullptr;  // the attributes of what Python sees of the node
  variable_list inputs;                        // those that gradients depend on
  std::vector<c10::Storage> memory;            // theirs at the call
  std::vector<int64_t> versions;
  std::vector<std::pair<Weak, size_t>> lifts;  // of the results that keep themselves
  bool last = false;                           // the backward that begins is the last one
  bool forgotten = false;                      // the inputs have gone with the last backward

  ~CallNode() override {
    if (!Py_IsInitialized()) return;
    Gil gil;
    Py_XDECREF(self);
    Py_XDECREF(state);
  }
  std::string name() const override { return "CompiledFunctionBackward"; }
  void will_release_variables() override { last = true; }
  void forget() { forgotten = true, inputs.clear(), memory.clear(); }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs &) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "compiled autograd does not know the nodes of calls that aotfunc has compiled");
  }

  // Returns the number of the first input that has other memory, else -1.
  long moved() const {
    for (size_t i = 0; i < memory.size(); i++)
      if (inputs[i].storage().unsafeGetStorageImpl() != memory[i].unsafeGetStorageImpl()) return i;
    return -1;
  }

  variable_list apply(variable_list &&cts) override {
    Gil gil;
    bool frees = std::exchange(last, false);
    bool usual = saved && !GradMode::is_enabled() && moved() < 0;
    for (Tensor &c : cts) usual = usual && c.defined();
    if (!usual) return slowly(Py_None, cts);
    variable_list values = unpacked();
    size_t count = values.size();
    for (Tensor &c : cts) values.push_back(std::move(c));
    Owned given(list_of(values));
    values.clear(), cts.clear();
    if (frees) release_variables();  // a value is free after its last use
    Owned found(PyObject_CallOneArg(part(self, QUICK), given.it));
    if (found.it == Py_None) {
      cts = tensors_in(given.it);
      cts.erase(cts.begin(), cts.begin() + count);
      PyList_SetSlice(given.it, count, PyList_GET_SIZE(given.it), nullptr);
      return slowly(given.it, cts);
    }
    if (frees) {
      forget();
      Py_CLEAR(state);
    }
    return tensors_in(found.it);
  }

  variable_list slowly(PyObject *read, variable_list &cts) {
    if (!state) {
      Owned held(list_of(inputs)), before(PyList_New(0));
      for (int64_t v : versions) PyList_Append(before.it, Owned(PyLong_FromLong(v)).it);
      PyObject *known = forgotten ? Py_None : held.it;
      state = Owned(Py_BuildValue("{sOsO}", "inputs", known, "versions", before.it)).release();
    }
    Owned now(Py_NewRef(state)), given(list_of(cts));
    Owned capsule(PyCapsule_New(new Ref(itself<Node>(this)), nullptr, [](PyObject *x) {
      delete (Ref *)PyCapsule_GetPointer(x, nullptr);
    }));
    cts.clear();
    Owned found(PyObject_CallFunction(
        part(self, SLOW), "OOlOO", capsule.it, now.it, moved(), read, given.it));
    if (PyDict_GetItemString(now.it, "inputs") == Py_None) forget();
    return tensors_in(found.it);
  }
};

// Calls a function that may throw for Python.
template <class F>
PyObject *called(F f) {
  try {
    return f();
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

CallNode &node_of(PyObject *capsule) {
  return static_cast<CallNode &>(**(Ref *)PyCapsule_GetPointer(capsule, nullptr));
}

// Returns the results of a call as those of a new node.
PyObject *results(PyObject *self, PyObject *const *args, Py_ssize_t n) {
  auto node = made<CallNode>();
  RECORD_FUNCTION("CompiledFunction", c10::ArrayRef<const c10::IValue>(), node->sequence_nr());
  Owned list(PyList_New(n));
  for (Py_ssize_t i = 0; i < n; i++) PyList_SET_ITEM(list.it, i, Py_NewRef(args[i]));
  PyObject *computed;
  {
    at::AutoGradMode off(false);
    computed = PyObject_CallOneArg(part(self, COMPUTE), list.it);
  }
  Owned all(computed);
  auto get = [&](int64_t i) -> const Tensor & { return tensor(PyTuple_GET_ITEM(all.it, i)); };
  node->self = Py_NewRef(self);
  auto *plan = (const int64_t *)PyBytes_AS_STRING(part(self, PLAN));
  auto next = [&] { return *plan++; };
  for (int64_t k = next(); k--;)
    node->add_next_edge(impl::gradient_edge(tensor(args[next()])));
  for (int64_t k = next(); k--;) {
    const Tensor &t = tensor(args[next()]);
    node->inputs.push_back(t);
    node->memory.push_back(t.storage());
    node->versions.push_back(t.is_inference() ? 0 : t._version());
  }
  int64_t count = next(), size = PyTuple_GET_SIZE(all.it);
  for (int64_t i = 0; i < count; i++)
    impl::set_gradient_edge(get(i), Edge(node, node->add_input_metadata(get(i))));
  for (int64_t i = count; i < size; i++)
    node->save(get(i), get(i).grad_fn().get() == node.get());
  for (int64_t k = next(); k--;) node->save(get(next()), true);
  for (int64_t groups = next(); groups--;) {
    auto lift = made<LiftNode>();
    for (int64_t keeps = next(), k = next(); k--;) {
      int64_t i = next();
      lift->add_next_edge(Edge(node, i));
      impl::set_gradient_edge(get(i), Edge(lift, lift->add_input_metadata(get(i))));
      if (!keeps) continue;
      node->lifts.emplace_back(Ref(lift), lift->saved->size());
      lift->save(get(i), true);
    }
  }
  return PyTuple_GetSlice(all.it, 0, count);
}

}  // namespace

extern "C" {

PyObject *aot_call(PyObject *self, PyObject *const *args, Py_ssize_t n) {
  return called([&] { return results(self, args, n); });
}

PyObject *aot_saved(PyObject *, PyObject *const *args, Py_ssize_t) {
  return called([&] { return list_of(node_of(args[0]).unpacked()); });
}

PyObject *aot_release(PyObject *, PyObject *const *args, Py_ssize_t) {
  node_of(args[0]).release_variables();
  return Py_NewRef(Py_None);
}

// Returns a result as autograd knows it behind its own node; None if that is gone.
PyObject *aot_lifted(PyObject *, PyObject *const *args, Py_ssize_t) {
  return called([&]() -> PyObject * {
    auto &[weak, i] = node_of(args[0]).lifts[PyLong_AsLong(args[1])];
    Ref node = weak.lock();
    auto *lift = static_cast<LiftNode *>(node.get());
    auto saved = lift ? lift->saved : nullptr;
    if (!saved) return Py_NewRef(Py_None);
    return THPVariable_Wrap((*saved)[i].unpack(node));
  });
}
}
