// Checks the state, step by step: see native.py. Every step does what its line of Python does,
// through the same functions of CPython, whose stable ABI is declared here.

typedef __INT64_TYPE__ int64_t;
typedef __INT32_TYPE__ int32_t;

struct Object {  // fastcall.py has seen that these are so
  int64_t references;
  void *type;
};
struct Tuple : Object {
  int64_t length;
  Object *elements[];
};

extern "C" {
void *PyMem_Malloc(int64_t);
void PyMem_Free(void *);
char *PyBytes_AsString(Object *);
Object *PyTuple_New(int64_t);
Object *PyDict_GetItemWithError(Object *, Object *);
int64_t PyDict_Size(Object *);
Object *PyObject_GetItem(Object *, Object *);
Object *PyObject_GetAttr(Object *, Object *);
Object *PyObject_GenericGetDict(Object *, void *);
Object *PyObject_CallNoArgs(Object *);
Object *PyObject_Vectorcall(Object *, Object *const *, int64_t, Object *);
Object *PyObject_Call(Object *, Object *, Object *);
int PyObject_IsTrue(Object *);
int64_t PyObject_Size(Object *);
int PyDict_Contains(Object *, Object *);
int PySequence_Contains(Object *, Object *);
void PyErr_Clear();
Object *PyErr_Occurred();
int PyErr_ExceptionMatches(Object *);
extern Object *PyExc_Exception;
void Py_DecRef(Object *);

Object *aot_dict, *aot_ordered_dict, *aot_none;  // set by native.py
}

// The steps, numbered as in native.py. `a`, `b` and `to` are registers; the constants lie before
// these, the first one at -1.
enum Op {
  ITEM,        // to = a[b]
  ATTRIBUTE,   // to = getattr(a, b); a.__dict__ as Python keeps it where b is None
  TYPE,        // to = type(a)
  CALL,        // to = a()
  PYTHON,      // b, … = a(…), with the registers and numbers at `to`
  SAME,        // a is b
  ITEM_SAME,   // a[b] is to
  TYPE_SAME,   // type(a) is b
  ABSENT,      // b not in a
  FALSE,       // not a
  ITEM_FALSE,  // not a[b]
  LENGTH,      // len(a) == to
};
struct Step {
  int32_t op, to, a, b;
};

// packed by native.py: after the steps come the tensors' registers, then the words of PYTHON steps
struct Program {
  int64_t steps, registers, tensors;
  Step rest[];
};

static bool is(Object *x, Object *type) { return x->type == type; }

// Python's reference count: the lower half counts, and is negative for immortal objects.
static int32_t &references(Object *x) { return *(int32_t *)&x->references; }

static Object *kept(Object *x) {
  if (x && references(x) > 0) references(x)++;
  return x;
}

static void dropped(Object *x) {
  if (!x || references(x) < 0) return;
  if (references(x) == 1) Py_DecRef(x);
  else references(x)--;
}

// Tells whether x[key] is another object than y.
static bool other_item(Object *x, Object *key, Object *y) {
  if (is(x, aot_dict)) return PyDict_GetItemWithError(x, key) != y;
  Object *found = PyObject_GetItem(x, key);
  dropped(found);
  return found != y;
}

static bool is_dict(Object *x) { return is(x, aot_dict) || is(x, aot_ordered_dict); }

static bool not_false(Object *x) {
  return is_dict(x) ? PyDict_Size(x) : PyObject_IsTrue(x);  // an error, -1, counts too
}

static bool item_not_false(Object *x, Object *key) {
  Object *found = is(x, aot_dict) ? PyDict_GetItemWithError(x, key) : 0;
  if (found && is_dict(found)) return PyDict_Size(found);
  found = found ? kept(found) : PyObject_GetItem(x, key);
  bool yes = !found || not_false(found);
  dropped(found);
  return yes;
}

// Runs lines that are left to Python: a function of some registers fills those from `first` on.
static bool python(Object *f, const int32_t *words, Object **r, int32_t first) {
  int64_t given = words[0], made = words[1];
  Object **args = (Object **)__builtin_alloca((given + 1) * sizeof(Object *));
  for (int64_t i = 0; i < given; i++) args[i] = r[words[2 + i]];
  Object *found = PyObject_Vectorcall(f, args, given, 0);
  if (!found) return false;
  bool yes = found != aot_none;
  for (int64_t i = 0; yes && i < made; i++) r[first + i] = kept(((Tuple *)found)->elements[i]);
  dropped(found);
  return yes;
}

// Returns the tensors, or null where the state is another one or an error was raised.
static Object *checked(const Program *p, Object **r, Object *alike) {
  const int32_t *words = (const int32_t *)(p->rest + p->steps);
  for (const Step *s = p->rest, *end = s + p->steps; s < end; s++) {
    Object *a = r[s->a], *b = r[s->b], *x = 0;
    switch (s->op) {
      case ITEM:
        x = is(a, aot_dict) ? kept(PyDict_GetItemWithError(a, b)) : PyObject_GetItem(a, b);
        break;
      case ATTRIBUTE:
        x = b == aot_none ? PyObject_GenericGetDict(a, 0) : PyObject_GetAttr(a, b);
        break;
      case TYPE: x = kept((Object *)a->type); break;
      case CALL: x = PyObject_CallNoArgs(a); break;
      case PYTHON:
        if (!python(a, words + s->to, r, s->b)) return 0;
        continue;
      case SAME:
        if (a != b) return 0;
        continue;
      case ITEM_SAME:
        if (other_item(a, b, r[s->to])) return 0;
        continue;
      case TYPE_SAME:
        if (a->type != b) return 0;
        continue;
      case ABSENT:
        if (is(a, aot_dict) ? PyDict_Contains(a, b) : PySequence_Contains(a, b)) return 0;
        continue;
      case FALSE:
        if (not_false(a)) return 0;
        continue;
      case ITEM_FALSE:
        if (item_not_false(a, b)) return 0;
        continue;
      case LENGTH:
        if ((is_dict(a) ? PyDict_Size(a) : PyObject_Size(a)) != s->to) return 0;
        continue;
    }
    if (!x) return 0;
    r[s->to] = x;
  }
  Tuple *found = (Tuple *)PyTuple_New(p->tensors);
  if (!found) return 0;
  for (int64_t i = 0; i < p->tensors; i++) found->elements[i] = kept(r[words[i]]);
  if (p->tensors) {
    Object *same = PyObject_Call(alike, found, 0);
    bool yes = same && PyObject_IsTrue(same) == 1;
    dropped(same);
    if (!yes) {
      dropped(found);
      return 0;
    }
  }
  return found;
}

// `self` is the program, its constants, the comparison of metadata, and the Python check, which
// decides about every state that is not found to be the same.
extern "C" Object *aot_check(Object *self, Object *const *args, int64_t count) {
  Object **of = ((Tuple *)self)->elements;
  const Program *p = (const Program *)PyBytes_AsString(of[0]);
  if (count == 2) {
    Tuple *k = (Tuple *)of[1];
    Object **all = (Object **)PyMem_Malloc((k->length + p->registers) * sizeof(Object *));
    Object **r = all + k->length, *found = 0;
    if (all) {
      for (int64_t i = 0; i < k->length; i++) r[~i] = k->elements[i];
      __builtin_memset(r, 0, p->registers * sizeof(Object *));
      r[0] = args[0], r[1] = args[1];
      found = checked(p, r, of[2]);
      for (int64_t i = 2; i < p->registers; i++) dropped(r[i]);
      PyMem_Free(all);
    }
    if (found || (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_Exception))) return found;
    PyErr_Clear();
  }
  return PyObject_Vectorcall(of[3], args, count, 0);
}
