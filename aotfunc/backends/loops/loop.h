// What a printed loop (looped.py) and the function that Python calls for it (loop.cpp) share.

typedef char *Slot;  // the address of a value

typedef void (*Kernel)(int64_t, int64_t, const int64_t *, void *const *);

enum End { DONE, OUT_OF_RANGE, INTERRUPTED };

struct Run {
  int64_t steps;
  void *python;  // the thread's state, without which Python cannot be called
  bool (*signalled)(Run &);
  void (*divide)(Kernel, int64_t rows, int64_t grain, const int64_t *sizes, void *const *buffers);

  // After so many steps it is seen whether the user interrupts.
  bool interrupted() { return ++steps % 1024 == 0 && signalled(*this); }
};

// The loop's values, and numbers that its text leaves open: lengths and addresses of kernels.
typedef End (*Printed)(const Slot *, const int64_t *numbers, Run &);

template <class T> static bool
in_range(const T *x, int64_t dims, const int64_t *shape, const int64_t *strides, T low, T high) {
  if (!dims) return *x >= low && *x < high;
  for (int64_t i = 0; i < *shape; i++)
    if (!in_range(x + i * *strides, dims - 1, shape + 1, strides + 1, low, high)) return false;
  return true;
}
