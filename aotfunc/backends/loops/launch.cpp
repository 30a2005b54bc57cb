// A launch as Python calls it: a kernel's outputs are allocated, and it runs.
//
// CPython's stable ABI and PyTorch's C shim are declared here, so that no headers are needed. This
// does the usual case; launch.py's plain form is called for any other, for a wrong argument and
// after a failure.

typedef __INT64_TYPE__ int64_t;
typedef __INT32_TYPE__ int32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef void *Tensor;  // a pointer to an at::Tensor

enum { CPU = 0 };  // c10::DeviceType

struct Object {  // launch.py has seen that it is this
  int64_t references;
  void *type;
};

typedef void (*Kernel)(int64_t, int64_t, const int64_t *, void *const *);

// launch.py packs these words, order[buffers], sizes[lengths], and for each output its dtype,
// its bytes, the input whose memory it takes or -1, its number of dimensions, its sizes and its
// strides.
struct Plan {
  int64_t inputs, outputs, buffers, lengths, rows, grain, elements;  // of the largest output
  Kernel kernel;
  int64_t rest[];
};

extern "C" {
#ifdef __linux__
int madvise(void *, __SIZE_TYPE__, int);
#endif
Object *PyTuple_New(int64_t);
Object *PyTuple_GetItem(Object *, int64_t);
int PyTuple_SetItem(Object *, int64_t, Object *);
char *PyBytes_AsString(Object *);
Object *PyObject_Vectorcall(Object *, Object *const *, int64_t, Object *);
void *PyEval_SaveThread();
void PyEval_RestoreThread(void *);
void Py_DecRef(Object *);

int aoti_torch_get_device_type(Tensor, int32_t *);
int aoti_torch_get_data_ptr(Tensor, void **);
int aoti_torch_get_numel(Tensor, int64_t *);
int aoti_torch_empty_strided(
    int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, Tensor *);
int aoti_torch__reinterpret_tensor(
    Tensor, int64_t, const int64_t *, const int64_t *, int64_t, Tensor *);
int aoti_torch_delete_tensor_object(Tensor);
int torch_parallel_for(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void *), void *);

// facts that launch.py finds out
int64_t aot_offset;                // of the at::Tensor in a Python tensor
void *aot_tensor, *aot_parameter;  // the Python classes
Object *(*aot_wrap)(Tensor);       // THPVariable_Wrap
int64_t aot_grain;                 // a thread gets no less than this many elements
int32_t aot_forked;                // PyTorch's threads are not there
}

struct Call {
  Kernel kernel;
  const int64_t *sizes;
  void *const *buffers;
};

static void part(int64_t begin, int64_t end, void *p) {
  Call *call = (Call *)p;
  call->kernel(begin, end, call->sizes, call->buffers);
}

static void run(const Plan *plan, int64_t elements, Call *call) {
  int64_t rows = plan->rows, grain = plan->grain;
  bool large = elements >= aot_grain;
  if (grain <= 0) grain = large ? (int64_t)((__int128)aot_grain * rows / elements) : rows;
  if (grain < 1) grain = 1;
  if (!large && rows <= grain) return plan->kernel(0, rows, call->sizes, call->buffers);
  void *state = PyEval_SaveThread();
  if (aot_forked || rows <= grain || torch_parallel_for(0, rows, grain, part, call))
    plan->kernel(0, rows, call->sizes, call->buffers);
  PyEval_RestoreThread(state);
}

// Puts large memory, which is often new, in huge pages: the system clears these four times as fast
// as it makes small ones.
static void in_huge_pages(void *data, int64_t bytes) {
#ifdef __linux__
  enum : uint64_t { PAGE = 1 << 21 };
  enum { MADV_HUGEPAGE = 14 };
  if (bytes < (int64_t)(2 * PAGE)) return;
  uint64_t first = ((uint64_t)data + PAGE - 1) & ~(PAGE - 1);
  uint64_t last = ((uint64_t)data + bytes) & ~(PAGE - 1);
  madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
}

// `self` is the plan, as bytes, and the plain form
extern "C" Object *aot_launch(Object *self, Object *const *args, int64_t count) {
  Plan *plan = (Plan *)PyBytes_AsString(PyTuple_GetItem(self, 0));
  int64_t inputs = plan->inputs, outputs = plan->outputs, made = 0, elements = plan->elements;
  const int64_t *order = plan->rest, *sizes = order + plan->buffers, *word = sizes + plan->lengths;
  void **data = (void **)__builtin_alloca((inputs + outputs + plan->buffers) * sizeof(void *));
  void **buffers = data + inputs + outputs;
  Tensor *tensors = (Tensor *)__builtin_alloca((outputs + 1) * sizeof(Tensor));
  bool usual = count == inputs;
  for (int64_t i = 0; usual && i < inputs; i++) {
    usual = args[i]->type == aot_tensor || args[i]->type == aot_parameter;
    if (!usual) break;
    Tensor t = (char *)args[i] + aot_offset;
    int64_t n = 0;
    int32_t device = 0;
    usual = !aoti_torch_get_device_type(t, &device) && device == CPU &&
        !aoti_torch_get_data_ptr(t, data + i) && !aoti_torch_get_numel(t, &n) &&
        (data[i] || !n);
    if (n > elements) elements = n;
  }
  for (; usual && made < outputs; made++) {
    int64_t taken = word[2], dims = word[3];
    const int64_t *shape = word + 4, *strides = shape + dims;
    Tensor *out = tensors + made;
    usual = taken < 0
        ? !aoti_torch_empty_strided(dims, shape, strides, (int32_t)word[0], CPU, 0, out)
        : !aoti_torch__reinterpret_tensor(
              (char *)args[taken] + aot_offset, dims, shape, strides, 0, out);
    if (!usual) break;
    usual = !aoti_torch_get_data_ptr(*out, data + inputs + made);
    if (taken < 0) in_huge_pages(data[inputs + made], word[1]);
    word = strides + dims;
  }
  if (usual) {
    for (int64_t i = 0; i < plan->buffers; i++) buffers[i] = data[order[i]];
    Call call = {plan->kernel, sizes, buffers};
    run(plan, elements, &call);
  }
  Object *result = 0;
  if (usual && outputs == 1)
    result = aot_wrap(tensors[0]);
  else if (usual && (result = PyTuple_New(outputs)))
    for (int64_t i = 0; result && i < outputs; i++)
      if (Object *out = aot_wrap(tensors[i]))
        PyTuple_SetItem(result, i, out);
      else
        Py_DecRef(result), result = 0;
  for (int64_t i = 0; i < made; i++) aoti_torch_delete_tensor_object(tensors[i]);
  return usual ? result : PyObject_Vectorcall(PyTuple_GetItem(self, 1), args, count, 0);
}

// A kernel for the first launch, which shows whether launches work here.
extern "C" void aot_first(int64_t begin, int64_t end, const int64_t *, void *const *buffers) {
  for (int64_t i = begin; i < end; i++) ((float *)buffers[1])[i] = ((float *)buffers[0])[i];
}
