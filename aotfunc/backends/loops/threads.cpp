// Divides the rows of a kernel among PyTorch's threads.

typedef __INT64_TYPE__ int64_t;
typedef void (*Kernel)(int64_t, int64_t, const int64_t *, void *const *);
struct Call {
  Kernel kernel;
  const int64_t *sizes;
  void *const *buffers;
};

extern "C" int torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void *), void *);

extern "C" void aot_threads(
    int64_t rows, int64_t grain, Kernel kernel, const int64_t *sizes, void *const *buffers) {
  Call call = {kernel, sizes, buffers};
  torch_parallel_for(0, rows, grain, [](int64_t begin, int64_t end, void *p) {
    Call *call = (Call *)p;
    call->kernel(begin, end, call->sizes, call->buffers);
  }, &call);
}
