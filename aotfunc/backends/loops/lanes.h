// Lanes of any dtype: reading and writing the first n of them, numbers in all of them, integers.
//
// A bool in a lane is 0 or -1, in memory it is a byte.

// A number that came among the sizes.
AOT double aot_number(int64_t bits) { double x; __builtin_memcpy(&x, &bits, 8); return x; }

template <class V> constexpr int aot_lanes = sizeof(V) / sizeof(V{}[0]);

template <class V> struct aot_unaligned { V v; } __attribute__((packed, may_alias));
template <class V> AOT V aot_raw(const void *p) { return ((const aot_unaligned<V> *)p)->v; }
template <class V> AOT void aot_raw(void *p, V v) { ((aot_unaligned<V> *)p)->v = v; }

// Converts memory of T to lanes of V, and back.
template <class V, class T> struct aot_memory {
  typedef T type __attribute__((vector_size(sizeof(T) * aot_lanes<V>)));
  AOT V load(type x) { return __builtin_convertvector(x, V); }
  AOT type store(V x) { return __builtin_convertvector(x, type); }
};
template <class T> struct aot_halves {
  typedef halves type;
  AOT floats load(halves x) { return aot_float(x, T{}); }
  AOT halves store(floats x) { return aot_narrow(x, T{}); }
};
template <> struct aot_memory<floats, bf16> : aot_halves<bf16> {};
template <> struct aot_memory<floats, f16> : aot_halves<f16> {};

// Lanes of n elements, a stride apart.
template <class V, class T>
__attribute__((noinline)) static V aot_some(const T *p, int64_t n, int64_t stride) {
  typename aot_memory<V, T>::type v = {};
  for (int64_t i = 0; i < n; i++) __builtin_memcpy((T *)&v + i, p + i * stride, sizeof(T));
  return aot_memory<V, T>::load(v);
}
template <class V, class T>
__attribute__((noinline)) static void aot_put_some(T *p, V v, int64_t n, int64_t stride) {
  auto m = aot_memory<V, T>::store(v);
  for (int64_t i = 0; i < n; i++) __builtin_memcpy(p + i * stride, (T *)&m + i, sizeof(T));
}

// Lanes of neighbours.
template <class V, class T> AOT V aot_first(V, const T *p, int64_t n) {
  return aot_some<V>(p, n, 1);
}
template <class V, class T> AOT void aot_put_first(T *p, V v, int64_t n) {
  aot_put_some(p, v, n, 1);
}
// Whether an instruction reads the first n of them, also if that is all.
template <class V, class T> constexpr bool aot_at_once = false;
#if AOT_BYTES == 64
#define AOT_FIRST(vector, number, as, instruction) \
  template <> constexpr bool aot_at_once<vector, number> = true; \
  AOT vector aot_first(vector, const number *p, int64_t n) { \
    typedef as lanes __attribute__((vector_size(64))); \
    return (vector)__builtin_ia32_load##instruction((const as *)p, lanes{}, (1u << n) - 1); \
  } \
  AOT void aot_put_first(number *p, vector v, int64_t n) { \
    typedef as lanes __attribute__((vector_size(64))); \
    __builtin_ia32_store##instruction((as *)p, (lanes)v, (1u << n) - 1); \
  }
AOT_FIRST(floats, float, float, ups512_mask)
AOT_FIRST(doubles, double, double, upd512_mask)
AOT_FIRST(ints, int32_t, int, dqusi512_mask)
AOT_FIRST(longs, int64_t, long long, dqudi512_mask)
#define AOT_FIRST_HALVES(half) \
  template <> constexpr bool aot_at_once<floats, half> = true; \
  AOT floats aot_first(floats, const half *p, int64_t n) { \
    auto x = __builtin_ia32_loaddquhi256_mask((const short *)p, shorts{}, (1u << n) - 1); \
    return aot_float((halves)x, half{}); \
  } \
  AOT void aot_put_first(half *p, floats v, int64_t n) { \
    __builtin_ia32_storedquhi256_mask((short *)p, (shorts)aot_narrow(v, half{}), (1u << n) - 1); \
  }
AOT_FIRST_HALVES(bf16)
AOT_FIRST_HALVES(f16)
#endif
template <class V, class T> AOT V aot_get(const T *p) {
  typedef aot_memory<V, T> memory;
  return memory::load(aot_raw<typename memory::type>(p));
}
template <class V, class T> AOT V aot_get(const T *p, int64_t n) {
  const bool some = n < aot_lanes<V>;
  if constexpr (aot_at_once<V, T>)  // no branch: compilers are sooner done
    return aot_first(V{}, p, some ? n : aot_lanes<V>);
  return __builtin_expect(some, 0) ? aot_first(V{}, p, n) : aot_get<V>(p);
}
template <class V, class T> AOT void aot_put(T *p, V v) {
  aot_raw(p, aot_memory<V, T>::store(v));
}
template <class V, class T> AOT void aot_put(T *p, V v, int64_t n) {
  if (__builtin_expect(n < aot_lanes<V>, 0)) return aot_put_first(p, v, n);
  aot_put(p, v);
}
// Lanes of elements a stride apart.
template <class V, class T> AOT V aot_gather(const T *p, int64_t n, int64_t stride) {
  if (__builtin_expect(n < aot_lanes<V>, 0)) return aot_some<V>(p, n, stride);
  typename aot_memory<V, T>::type v;
  _Pragma("GCC unroll 16")
  for (int i = 0; i < aot_lanes<V>; i++)
    __builtin_memcpy((T *)&v + i, p + i * stride, sizeof(T));
  return aot_memory<V, T>::load(v);
}
template <class V, class T> AOT void aot_scatter(T *p, V v, int64_t n, int64_t stride) {
  if (__builtin_expect(n < aot_lanes<V>, 0)) return aot_put_some(p, v, n, stride);
  auto m = aot_memory<V, T>::store(v);
  _Pragma("GCC unroll 16")
  for (int i = 0; i < aot_lanes<V>; i++)
    __builtin_memcpy(p + i * stride, (T *)&m + i, sizeof(T));
}
template <int... i> struct aot_numbers {};
template <int n, int... i> struct aot_up_to : aot_up_to<n - 1, n - 1, i...> {};
template <int... i> struct aot_up_to<0, i...> { typedef aot_numbers<i...> type; };
// The lanes of x from the first of them on, each before the one of y.
template <int first, class V, int... i> AOT V aot_between(V x, V y, aot_numbers<i...>) {
  return __builtin_shufflevector(x, y, (first + i / 2 + i % 2 * aot_lanes<V>)...);
}
// Every second lane of x, then of y.
template <int first, class V, int... i> AOT V aot_second(V x, V y, aot_numbers<i...>) {
  return __builtin_shufflevector(x, y, (first + 2 * i)...);
}

// Lanes of real or imaginary parts of neighbours, and neighbours of both parts.
template <class V, int part, class T> AOT V aot_get_part(const T *p, int64_t n) {
  enum : int64_t { L = aot_lanes<V> };
  const V x = aot_get<V>(p - part, 2 * n);
  const V y = aot_get<V>(p - part + L, 2 * n > L ? 2 * n - L : 0);
  return aot_second<part>(x, y, typename aot_up_to<L>::type{});
}
template <class V, class T> AOT void aot_put_parts(T *p, V real, V imag, int64_t n) {
  enum : int64_t { L = aot_lanes<V> };
  typename aot_up_to<L>::type lanes;
  aot_put(p, aot_between<0>(real, imag, lanes), 2 * n);
  aot_put(p + L, aot_between<L / 2>(real, imag, lanes), 2 * n > L ? 2 * n - L : 0);
}

// Reads a block of n times m numbers, m of them neighbours, as vectors across these: `rows` of
// them, or zeros. Each round moves the lower and upper half of the lines between each other's
// elements.
template <int rows, class V, class T>
AOT void aot_turn(V *out, const T *p, int64_t stride, int64_t n, int64_t m) {
  enum : int64_t { L = aot_lanes<V> };
  typedef typename aot_up_to<L>::type lanes;
  for (int64_t first = 0; first < rows; first += L) {
    V x[L], y[L];
    int64_t left = m - first < 0 ? 0 : m - first;
    _Pragma("GCC unroll 16")
    for (int64_t i = 0; i < L; i++)
      x[i] = i < n && left ? aot_get<V>(p + i * stride + first, left) : V{};
    _Pragma("GCC unroll 4")
    for (int64_t round = 1; round < L; round *= 2) {
      _Pragma("GCC unroll 8")
      for (int64_t i = 0; i < L / 2; i++) {
        y[2 * i] = aot_between<0>(x[i], x[i + L / 2], lanes{});
        y[2 * i + 1] = aot_between<L / 2>(x[i], x[i + L / 2], lanes{});
      }
      _Pragma("GCC unroll 16")
      for (int64_t i = 0; i < L; i++) x[i] = y[i];
    }
    _Pragma("GCC unroll 16")
    for (int64_t i = 0; i < L; i++) out[first + i] = x[i];
  }
}

// Integers wrap around.
AOT ints aot_iadd(ints x, ints y) { return (ints)((uints)x + (uints)y); }
AOT longs aot_iadd(longs x, longs y) { return (longs)((ulongs)x + (ulongs)y); }
AOT ints aot_isub(ints x, ints y) { return (ints)((uints)x - (uints)y); }
AOT longs aot_isub(longs x, longs y) { return (longs)((ulongs)x - (ulongs)y); }
AOT ints aot_imul(ints x, ints y) { return (ints)((uints)x * (uints)y); }
AOT longs aot_imul(longs x, longs y) { return (longs)((ulongs)x * (ulongs)y); }
template <class T> AOT T aot_iadd(T x, T y) { T z; __builtin_add_overflow(x, y, &z); return z; }
template <class T> AOT T aot_isub(T x, T y) { T z; __builtin_sub_overflow(x, y, &z); return z; }
template <class T> AOT T aot_imul(T x, T y) { T z; __builtin_mul_overflow(x, y, &z); return z; }

// Quotients and remainders of integers are rounded to zero; the least number by -1 wraps around,
// where the instruction would end the process.
template <class T> AOT T aot_quotient(T x, T y) { return y == -1 ? aot_isub(T{}, x) : (T)(x / y); }
template <class T> AOT T aot_ifmod(T x, T y) { return y == -1 ? T{} : (T)(x % y); }
AOT ints aot_quotient(ints x, ints y) { return aot_each(x, y, aot_quotient<int32_t>); }
AOT longs aot_quotient(longs x, longs y) { return aot_each(x, y, aot_quotient<int64_t>); }
AOT ints aot_ifmod(ints x, ints y) { return aot_each(x, y, aot_ifmod<int32_t>); }
AOT longs aot_ifmod(longs x, longs y) { return aot_each(x, y, aot_ifmod<int64_t>); }

// Shifts by less than 0 or by all bits, and more, leave nothing, or the sign.
template <class U, class V, class T> AOT V aot_shifted_left(V x, V n, T bits) {
  return (n >= 0) & (n < bits) ? (V)((U)x << (U)(n & (bits - 1))) : V{};
}
template <class V, class T> AOT V aot_shifted_right(V x, V n, T bits) {
  return x >> ((n >= 0) & (n < bits) ? n : V{} + (bits - 1));
}
AOT ints aot_bitwise_left_shift(ints x, ints n) { return aot_shifted_left<uints>(x, n, 32); }
AOT longs aot_bitwise_left_shift(longs x, longs n) { return aot_shifted_left<ulongs>(x, n, 64); }
AOT ints aot_bitwise_right_shift(ints x, ints n) { return aot_shifted_right(x, n, 32); }
AOT longs aot_bitwise_right_shift(longs x, longs n) { return aot_shifted_right(x, n, 64); }
template <class T> AOT T aot_bitwise_left_shift(T x, T n) {
  return n < 0 || n >= (int)(8 * sizeof(T)) ? T{} : (T)((uint64_t)x << n);
}
template <class T> AOT T aot_bitwise_right_shift(T x, T n) {
  const int bits = 8 * sizeof(T), last = (T)-1 < 0 ? bits - 1 : bits;
  return n < 0 || n >= bits ? (T)((int64_t)x >> last) : (T)(x >> n);
}

// The number of each lane.
template <class V> AOT V aot_count() {
  V v;
  for (int i = 0; i < aot_lanes<V>; i++) v[i] = i;
  return v;
}
AOT ints aot_before(floats, int64_t n) { return aot_count<ints>() < (int32_t)n; }
AOT ints aot_before(ints, int64_t n) { return aot_count<ints>() < (int32_t)n; }
AOT longs aot_before(doubles, int64_t n) { return aot_count<longs>() < n; }
AOT longs aot_before(longs, int64_t n) { return aot_count<longs>() < n; }
// x in the first n lanes, and the neutral element in the lanes behind them.
template <class V> AOT V aot_or(V x, V neutral, int64_t n) {
  return n < aot_lanes<V> ? aot_before(x, n) ? x : neutral : x;
}

// Combines all lanes into one number, pairwise.
template <int half, class V, int... i> AOT V aot_moved(V x, aot_numbers<i...>) {
  return __builtin_shufflevector(x, x, ((i + half) % aot_lanes<V>)...);
}
template <int half, class V, class F> AOT V aot_halved(V x, F f) {
  x = f(x, aot_moved<half>(x, typename aot_up_to<aot_lanes<V>>::type{}));
  if constexpr (half > 1) x = aot_halved<half / 2>(x, f);
  return x;
}
template <class V, class F> AOT auto aot_across(V x, F f) {
  return aot_halved<aot_lanes<V> / 2>(x, f)[0];
}

// Sums of floats are doubles, of a few floats each.
struct sums { doubles low, high; };
struct long_sums { sums total; floats some; };
AOT void aot_sum(sums &s, floats x) { s.low += aot_low(x); s.high += aot_high(x); }
AOT void aot_sum(doubles &s, doubles x) { s += x; }
AOT void aot_sum(double &s, double x) { s += x; }
AOT void aot_sum(long_sums &s, floats x) { s.some += x; }
AOT void aot_carry(long_sums &s) { aot_sum(s.total, s.some), s.some = floats{}; }
AOT floats aot_summed(sums s) { return aot_join(s.low, s.high); }
AOT floats aot_summed(long_sums s) { aot_carry(s); return aot_summed(s.total); }
AOT double aot_across_sum(doubles s) {
  return aot_across(s, [](doubles x, doubles y) { return x + y; });
}
AOT float aot_across_sum(long_sums s) {
  aot_carry(s);
  return (float)aot_across_sum(s.total.low + s.total.high);
}

// Scans: a function of what has been accumulated, and of the next value, in their order. Lanes are
// next to each other in a scan of lanes, elsewhere each is a scan of its own. Floats accumulate as
// doubles, as in PyTorch.
struct aot_plus {
  AOT double of(double x, double y) { return x + y; }
  AOT doubles of(doubles x, doubles y) { return x + y; }
  template <class T> AOT T of(T x, T y) { return aot_iadd(x, y); }
};
struct aot_times {
  AOT double of(double x, double y) { return x * y; }
  AOT doubles of(doubles x, doubles y) { return x * y; }
  template <class T> AOT T of(T x, T y) { return aot_imul(x, y); }
};
struct aot_greatest {
  template <class T> AOT T of(T x, T y) { return (x > y) | (x != x) ? x : y; }
};
struct aot_smallest {
  template <class T> AOT T of(T x, T y) { return (x < y) | (x != x) ? x : y; }
};
AOT sums aot_sums(double x) { return {aot_doubles(x), aot_doubles(x)}; }
template <class F, class A, class X> AOT X aot_scan(A &a, X x) { return (X)(a = F::of(a, (A)x)); }
template <class F> AOT floats aot_scan(sums &a, floats x) {
  a = {F::of(a.low, aot_low(x)), F::of(a.high, aot_high(x))};
  return aot_summed(a);
}
template <class F, class A, class V> AOT V aot_scan_lanes(A &a, V x) {
  _Pragma("GCC unroll 16")
  for (int i = 0; i < aot_lanes<V>; i++) x[i] = a = F::of(a, (A)x[i]);
  return x;
}
