// Lanes of any dtype: reading and writing the first n of them, numbers in all of them, integers.
//
// A bool in a lane is 0 or -1, in memory it is a byte.

// A number that came among the sizes.
AOT double aot_number(int64_t bits) { double x; __builtin_memcpy(&x, &bits, 8); return x; }

template <class V> constexpr int aot_lanes = sizeof(V) / sizeof(V{}[0]);

AOT m8 aot_m8(int32_t x) { return m8{} + x; }
AOT m4 aot_m4(int64_t x) { return m4{} + x; }
AOT m8 aot_mask8(bool x) { return m8{} - x; }
AOT m4 aot_mask4(bool x) { return m4{} - x; }

template <class V, class T>
__attribute__((noinline)) static V aot_some(const T *p, int64_t n, int64_t stride) {
  V v = {};
  for (int64_t i = 0; i < n; i++) v[i] = p[i * stride];
  return v;
}
template <class V, class T>
__attribute__((noinline)) static void aot_put_some(T *p, V v, int64_t n, int64_t stride) {
  for (int64_t i = 0; i < n; i++) p[i * stride] = v[i];
}

// Neighbours.
template <class V, class T> AOT V aot_get(const T *p, int64_t n) {
  if (__builtin_expect(n < aot_lanes<V>, 0)) return aot_some<V>(p, n, 1);
  typedef T memory __attribute__((vector_size(sizeof(T) * aot_lanes<V>)));
  return __builtin_convertvector(aot_raw<memory>(p), V);
}
template <class V, class T> AOT void aot_put(T *p, V v, int64_t n) {
  if (__builtin_expect(n < aot_lanes<V>, 0)) return aot_put_some(p, v, n, 1);
  typedef T memory __attribute__((vector_size(sizeof(T) * aot_lanes<V>)));
  aot_raw<memory>(p, __builtin_convertvector(v, memory));
}
// Elements a stride apart.
template <class V, class T> AOT V aot_gather(const T *p, int64_t n, int64_t stride) {
  if (__builtin_expect(n < aot_lanes<V>, 0)) return aot_some<V>(p, n, stride);
  V v;
  _Pragma("GCC unroll 8")
  for (int i = 0; i < aot_lanes<V>; i++) v[i] = p[i * stride];
  return v;
}
template <class V, class T> AOT void aot_scatter(T *p, V v, int64_t n, int64_t stride) {
  if (__builtin_expect(n < aot_lanes<V>, 0)) return aot_put_some(p, v, n, stride);
  _Pragma("GCC unroll 8")
  for (int i = 0; i < aot_lanes<V>; i++) p[i * stride] = v[i];
}

// Integers wrap around.
AOT m8 aot_iadd(m8 x, m8 y) { return (m8)((u8)x + (u8)y); }
AOT m4 aot_iadd(m4 x, m4 y) { return (m4)((u4)x + (u4)y); }
AOT m8 aot_isub(m8 x, m8 y) { return (m8)((u8)x - (u8)y); }
AOT m4 aot_isub(m4 x, m4 y) { return (m4)((u4)x - (u4)y); }
AOT m8 aot_imul(m8 x, m8 y) { return (m8)((u8)x * (u8)y); }
AOT m4 aot_imul(m4 x, m4 y) { return (m4)((u4)x * (u4)y); }
template <class T> AOT T aot_iadd(T x, T y) { T z; __builtin_add_overflow(x, y, &z); return z; }
template <class T> AOT T aot_isub(T x, T y) { T z; __builtin_sub_overflow(x, y, &z); return z; }
template <class T> AOT T aot_imul(T x, T y) { T z; __builtin_mul_overflow(x, y, &z); return z; }

// The first n lanes of x, behind them those of y.
AOT m8 aot_first8(int64_t n) { return m8{0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)n; }
AOT m4 aot_first4(int64_t n) { return m4{0, 1, 2, 3} < n; }

// Sums of floats are doubles, of a few floats each.
struct d8 { d4 low, high; };
struct s8 { d8 total; f8 some; int32_t count; };
AOT void aot_sum(d8 &s, f8 x) { s.low += aot_low(x); s.high += aot_high(x); }
AOT void aot_sum(d4 &s, d4 x) { s += x; }
AOT void aot_sum(double &s, double x) { s += x; }
AOT void aot_sum(s8 &s, f8 x) {
  s.some += x;
  if (__builtin_expect(++s.count == 32, 0)) aot_sum(s.total, s.some), s.some = f8{}, s.count = 0;
}
AOT f8 aot_summed(d8 s) { return aot_join(s.low, s.high); }
AOT float aot_across_sum(s8 s) {
  aot_sum(s.total, s.some);
  return (float)aot_across_add(s.total.low + s.total.high);
}
AOT double aot_across_sum(d4 s) { return aot_across_add(s); }
