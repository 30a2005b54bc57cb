/* Counts what malloc and its kin have handed out, and the most of it at any time. */
#include <errno.h>
#include <malloc.h>
#include <stddef.h>

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static long now, most;

static void *taken(void *p) {
    if (!p) return p;
    long n = __atomic_add_fetch(&now, (long)malloc_usable_size(p), __ATOMIC_RELAXED);
    long m = __atomic_load_n(&most, __ATOMIC_RELAXED);
    while (n > m && !__atomic_compare_exchange_n(&most, &m, n, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return p;
}

static void given_back(void *p) {
    if (p) __atomic_sub_fetch(&now, (long)malloc_usable_size(p), __ATOMIC_RELAXED);
}

void *malloc(size_t n) { return taken(__libc_malloc(n)); }
void *calloc(size_t n, size_t m) { return taken(__libc_calloc(n, m)); }
void *memalign(size_t a, size_t n) { return taken(__libc_memalign(a, n)); }
void *aligned_alloc(size_t a, size_t n) { return taken(__libc_memalign(a, n)); }
void free(void *p) { given_back(p); __libc_free(p); }

void *realloc(void *p, size_t n) {
    given_back(p);
    void *q = __libc_realloc(p, n);
    if (!q && n) { taken(p); return q; }  /* p is as it was */
    return taken(q);
}

int posix_memalign(void **out, size_t a, size_t n) {
    void *p = __libc_memalign(a, n);
    if (!p) return ENOMEM;
    *out = taken(p);
    return 0;
}

void allocations_restart(void) { most = now; }
long allocations_now(void) { return now; }
long allocations_most(void) { return most; }
