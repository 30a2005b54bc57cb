// What Python calls for a loop that looped.py has printed: arguments are read, results allocated,
// and the printed function runs. This follows launch.cpp and loop.h in one source.

extern "C" {
void *malloc(__SIZE_TYPE__);
void free(void *);
int PyErr_CheckSignals();
int aoti_torch_get_dim(Tensor, int64_t *);
int aoti_torch_get_strides(Tensor, int64_t **);
}

struct Words {
  const int64_t *at;
  int64_t next() { return *at++; }
  const int64_t *take(int64_t n) { return (at += n) - n; }
};

static bool signalled(Run &run) {
  PyEval_RestoreThread(run.python);
  bool yes = PyErr_CheckSignals();
  run.python = PyEval_SaveThread();
  return yes;
}

static void
divide(Kernel kernel, int64_t rows, int64_t grain, const int64_t *sizes, void *const *buffers) {
  Call call = {kernel, sizes, buffers};
  if (aot_forked || torch_parallel_for(0, rows, grain, part, &call))
    kernel(0, rows, sizes, buffers);
}

static bool is_laid_out(Tensor t, int64_t dims, const int64_t *strides) {
  int64_t n = 0, *have;
  if (aoti_torch_get_dim(t, &n) || n != dims || aoti_torch_get_strides(t, &have)) return false;
  for (int64_t i = 0; i < n; i++)
    if (have[i] != strides[i]) return false;
  return true;
}

// `self` is what looped.py packs, as bytes, the plain form, and the constants, which it keeps.
extern "C" Object *aot_loop(Object *self, Object *const *args, int64_t count) {
  Words words = {(int64_t *)PyBytes_AsString(PyTuple_GetItem(self, 0))};
  Object *plain = PyTuple_GetItem(self, 1);
  Printed printed = (Printed)words.next();
  int64_t n_slots = words.next(), bytes = words.next();
  int64_t inputs = words.next(), results = words.next(), made = 0;
  Slot *slots = (Slot *)__builtin_alloca((n_slots + 1) * sizeof(Slot));
  Tensor *tensors = (Tensor *)__builtin_alloca((results + 1) * sizeof(Tensor));
  bool usual = count == inputs;
  for (int64_t i = 0; usual && i < inputs; i++) {
    int64_t dims = words.next();
    const int64_t *strides = words.take(dims);
    usual = args[i]->type == aot_tensor || args[i]->type == aot_parameter;
    if (!usual) break;
    Tensor t = (char *)args[i] + aot_offset;
    int32_t device = 0;
    usual = !aoti_torch_get_device_type(t, &device) && device == CPU &&
        !aoti_torch_get_data_ptr(t, (void **)slots + i) && slots[i] &&
        is_laid_out(t, dims, strides);
  }
  for (; usual && made < results; made++) {
    int64_t slot = words.next(), dtype = words.next(), dims = words.next();
    const int64_t *shape = words.take(dims), *strides = words.take(dims);
    void *data = 0;
    Tensor *out = tensors + made;
    usual = !aoti_torch_empty_strided(dims, shape, strides, (int32_t)dtype, CPU, 0, out);
    if (!usual) break;
    usual = !aoti_torch_get_data_ptr(*out, &data);
    slots[slot] = (Slot)data;
  }
  char *memory = usual ? (char *)malloc(bytes) : 0;
  End end = OUT_OF_RANGE;
  if (memory) {
    for (int64_t n = words.next(); n--;) {  // constants
      int64_t slot = words.next();
      slots[slot] = (Slot)words.next();
    }
    for (int64_t n = words.next(); n--;) {  // what is made on the way
      int64_t slot = words.next();
      slots[slot] = memory + words.next();
    }
    Run run = {0, PyEval_SaveThread(), signalled, divide};
    end = printed(slots, words.at, run);
    PyEval_RestoreThread(run.python);
    free(memory);
  }
  Object *result = end == DONE ? PyTuple_New(results) : 0;
  for (int64_t i = 0; i < made; i++) {
    if (result)
      if (Object *out = aot_wrap(tensors[i]))
        PyTuple_SetItem(result, i, out);
      else
        Py_DecRef(result), result = 0;
    aoti_torch_delete_tensor_object(tensors[i]);
  }
  return end == OUT_OF_RANGE ? PyObject_Vectorcall(plain, args, count, 0) : result;
}
