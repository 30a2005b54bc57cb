// A loop without Python between its steps: the instructions of one step, run again and again on
// other memory. This follows launch.cpp in one source.

extern "C" {
void *malloc(__SIZE_TYPE__);
void free(void *);
int PyErr_CheckSignals();
int aoti_torch_get_dim(Tensor, int64_t *);
int aoti_torch_get_strides(Tensor, int64_t **);
}

// what an instruction does; its words are one of these, their number, and its operands
enum { LAUNCH, COPY, SHOW, SWITCH, CHECK, LOOP };

enum { SIGNALS = 1024 };  // after so many steps it is seen whether the user interrupts

enum End { DONE, OUT_OF_RANGE, INTERRUPTED };

typedef char *Slot;  // the address of a value

struct Words {
  const int64_t *at;
  int64_t next() { return *at++; }
  const int64_t *take(int64_t n) { return (at += n) - n; }
};

struct Run {
  Slot *slots;
  void **buffers;  // of one launch
  void *python;    // the thread's state, without which Python cannot be called
  int64_t steps;

  bool interrupted() {
    if (++steps % SIGNALS) return false;
    PyEval_RestoreThread(python);
    bool yes = PyErr_CheckSignals();
    python = PyEval_SaveThread();
    return yes;
  }
};

template <class T> static bool
in_range(const T *x, int64_t dims, const int64_t *shape, const int64_t *strides, T low, T high) {
  if (!dims) return *x >= low && *x < high;
  for (int64_t i = 0; i < *shape; i++)
    if (!in_range(x + i * *strides, dims - 1, shape + 1, strides + 1, low, high)) return false;
  return true;
}

static End run_loop(Words, Run &);

static End run_code(const int64_t *word, const int64_t *end, Run &run) {
  Slot *slots = run.slots;
  for (; word < end; word += word[1]) {
    const int64_t *at = word + 2;
    switch (*word) {
      case LAUNCH: {
        int64_t rows = at[1], grain = at[2], count = at[3];
        for (int64_t i = 0; i < count; i++) run.buffers[i] = slots[at[4 + i]];
        Call call = {(Kernel)at[0], at + 4 + count, run.buffers};
        if (!grain || aot_forked || torch_parallel_for(0, rows, grain, part, &call))
          call.kernel(0, rows, call.sizes, call.buffers);
        break;
      }
      case COPY: __builtin_memcpy(slots[at[0]], slots[at[1]], at[2]); break;
      case SHOW: slots[at[0]] = slots[at[1]] + at[2]; break;
      case SWITCH: {
        void *place = slots[at[0]];
        int64_t index = at[1] == 1 ? *(bool *)place : *(int64_t *)place, branches = at[2];
        if (index < 0 || index >= branches) return OUT_OF_RANGE;
        const int64_t *code = at + 3 + branches;
        for (int64_t i = 0; i < index; i++) code += at[3 + i];
        if (End end = run_code(code, code + at[3 + index], run)) return end;
        break;
      }
      case CHECK: {
        Slot x = slots[at[0]] + at[4] * at[1];
        int64_t dims = at[5], low = at[2], high = at[3];
        const int64_t *shape = at + 6, *strides = shape + dims;
        bool right = at[1] == 8
            ? in_range((int64_t *)x, dims, shape, strides, low, high)
            : in_range((int32_t *)x, dims, shape, strides, (int32_t)low, (int32_t)high);
        if (!right) return OUT_OF_RANGE;
        break;
      }
      case LOOP:
        if (End end = run_loop({at}, run)) return end;
    }
  }
  return DONE;
}

__attribute__((noinline)) static End run_loop(Words words, Run &run) {
  Slot *slots = run.slots;
  int64_t consts = words.next(), carries = words.next(), rows = words.next();
  int64_t stacks = words.next(), length = words.next(), reverse = words.next();
  int64_t holds = words.next();    // the slot of the condition, or -1
  int64_t inputs = consts + carries + rows, results = carries + stacks;
  const int64_t *given = words.take(inputs);
  Slot *own = slots + words.next();  // the step's inputs
  const int64_t *ends = words.take(results);
  const int64_t *bytes = words.take(rows + stacks);  // of a row
  const int64_t *spare = words.take(2 * carries);    // slots of two places, and the bytes of one
  const int64_t *next = words.take(carries);         // the result that is carried on, or -1
  int64_t n_homes = words.next();
  const int64_t *homes = words.take(2 * n_homes);    // slots and the results that they are
  int64_t n_copies = words.next();
  const int64_t *copies = words.take(3 * n_copies);  // results, slots, bytes
  int64_t test_words = words.next(), step_words = words.next();
  const int64_t *test = words.take(test_words), *step = words.take(step_words);
  for (int64_t i = 0; i < inputs; i++) own[i] = slots[given[i]];
  Slot *first = (Slot *)__builtin_alloca((rows + results + 1) * sizeof(Slot));
  Slot *places = first + rows;  // of this step's results
  for (int64_t i = 0; i < rows; i++) first[i] = own[consts + carries + i];
  for (int64_t t = 0; t < length; t++) {
    if (holds >= 0) {
      if (End end = run_code(test, test + test_words, run)) return end;
      if (!*(bool *)slots[holds]) break;
    }
    int64_t row = reverse ? length - 1 - t : t;
    for (int64_t i = 0; i < rows; i++) own[consts + carries + i] = first[i] + row * bytes[i];
    for (int64_t i = 0; i < carries; i++)
      places[i] = slots[spare[2 * i]] + (t & 1) * spare[2 * i + 1];
    for (int64_t i = 0; i < stacks; i++)
      places[carries + i] = slots[ends[carries + i]] + row * bytes[rows + i];
    for (int64_t i = 0; i < n_homes; i++) slots[homes[2 * i]] = places[homes[2 * i + 1]];
    if (End end = run_code(step, step + step_words, run)) return end;
    for (const int64_t *c = copies; c < copies + 3 * n_copies; c += 3)
      __builtin_memcpy(places[c[0]], slots[c[1]], c[2]);
    for (int64_t i = 0; i < carries; i++)
      if (next[i] >= 0) own[consts + i] = places[next[i]];
    if (run.interrupted()) return INTERRUPTED;
  }
  for (int64_t i = 0; i < carries; i++)
    __builtin_memcpy(slots[ends[i]], own[consts + i], spare[2 * i + 1]);
  return DONE;
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
  int64_t n_slots = words.next(), bytes = words.next(), most_buffers = words.next();
  int64_t inputs = words.next(), results = words.next(), made = 0;
  Run run = {};
  run.slots = (Slot *)__builtin_alloca((n_slots + 1) * sizeof(Slot));
  run.buffers = (void **)__builtin_alloca((most_buffers + 1) * sizeof(void *));
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
        !aoti_torch_get_data_ptr(t, (void **)run.slots + i) && run.slots[i] &&
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
    run.slots[slot] = (Slot)data;
  }
  char *memory = usual ? (char *)malloc(bytes) : 0;
  End end = OUT_OF_RANGE;
  if (memory) {
    for (int64_t n = words.next(); n--;) {  // constants
      int64_t slot = words.next();
      run.slots[slot] = (Slot)words.next();
    }
    for (int64_t n = words.next(); n--;) {  // what is made on the way
      int64_t slot = words.next();
      run.slots[slot] = memory + words.next();
    }
    int64_t code = words.next();
    run.python = PyEval_SaveThread();
    end = run_code(words.at, words.at + code, run);
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
