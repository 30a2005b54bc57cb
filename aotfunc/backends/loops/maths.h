// Maths functions, within 2 units in the last place and right on all special values.
//
// aot_exp aot_exp2 aot_expm1 aot_log aot_log2 aot_log10 aot_log1p aot_sigmoid
// aot_sin aot_cos aot_tan aot_asin aot_acos aot_atan aot_atan2 aot_hypot
// aot_sinh aot_cosh aot_tanh aot_asinh aot_acosh aot_atanh aot_erf aot_erfc aot_lgamma
// aot_pow aot_fmod, each of float, double, floats and doubles.

// In float32 exp, sigmoid, log, sin, cos, tanh and erf are our own, of the polynomials above; the
// others are Sleef's.

// AOT_SLEEF: libtorch_cpu exports Sleef's vector functions.
#if defined(AOT_SLEEF) && defined(__AVX2__) && defined(__FMA__)
#if AOT_BYTES == 64
#define AOT_SLEEF_FLOATS(name, ulp) Sleef_##name##f16_##ulp##avx512f
#define AOT_SLEEF_DOUBLES(name, ulp) Sleef_##name##d8_##ulp##avx512f
#else
#define AOT_SLEEF_FLOATS(name, ulp) Sleef_##name##f8_##ulp##avx2
#define AOT_SLEEF_DOUBLES(name, ulp) Sleef_##name##d4_##ulp##avx2
#endif
#define AOT_SLEEF_OF_FLOATS(name, ulp, as) \
  extern "C" floats AOT_SLEEF_FLOATS(name, ulp)(floats) noexcept; \
  AOT floats as(floats x) { return AOT_SLEEF_FLOATS(name, ulp)(x); }
#define AOT_SLEEF_OF_DOUBLES(name, ulp, as) \
  extern "C" doubles AOT_SLEEF_DOUBLES(name, ulp)(doubles) noexcept; \
  AOT doubles as(doubles x) { return AOT_SLEEF_DOUBLES(name, ulp)(x); }
#define AOT_SLEEF_OF_BOTH(name, ulp, as) \
  extern "C" floats AOT_SLEEF_FLOATS(name, ulp)(floats, floats) noexcept; \
  extern "C" doubles AOT_SLEEF_DOUBLES(name, ulp)(doubles, doubles) noexcept; \
  AOT floats as(floats x, floats y) { return AOT_SLEEF_FLOATS(name, ulp)(x, y); } \
  AOT doubles as(doubles x, doubles y) { return AOT_SLEEF_DOUBLES(name, ulp)(x, y); }
#else
#define AOT_SLEEF_OF_FLOATS(name, ulp, as) \
  AOT floats as(floats x) { return aot_each(x, [](float a) { return __builtin_##name##f(a); }); }
#define AOT_SLEEF_OF_DOUBLES(name, ulp, as) \
  AOT doubles as(doubles x) { return aot_each(x, [](double a) { return __builtin_##name(a); }); }
#define AOT_SLEEF_OF_BOTH(name, ulp, as) \
  AOT floats as(floats x, floats y) { \
    return aot_each(x, y, [](float a, float b) { return __builtin_##name##f(a, b); }); \
  } \
  AOT doubles as(doubles x, doubles y) { \
    return aot_each(x, y, [](double a, double b) { return __builtin_##name(a, b); }); \
  }
#endif

#define AOT_SLEEF2(name, ulp) \
  AOT_SLEEF_OF_BOTH(name, ulp, aot_##name) \
  AOT_NUMBER2(aot_##name)
#define AOT_SLEEF1(name, ulp) \
  AOT_SLEEF_OF_FLOATS(name, ulp, aot_##name) \
  AOT_SLEEF_OF_DOUBLES(name, ulp, aot_##name) \
  AOT_NUMBER1(aot_##name)

AOT_SLEEF1(exp2, u10)
AOT_SLEEF1(expm1, u10)
AOT_SLEEF1(log2, u10)
AOT_SLEEF1(log10, u10)
AOT_SLEEF1(log1p, u10)
AOT_SLEEF1(tan, u10)
AOT_SLEEF1(asin, u10)
AOT_SLEEF1(acos, u10)
AOT_SLEEF1(atan, u10)
AOT_SLEEF1(atanh, u10)
AOT_SLEEF1(erfc, u15)
AOT_SLEEF1(lgamma, u10)
AOT_SLEEF2(pow, u10)
AOT_SLEEF2(atan2, u10)
AOT_SLEEF2(hypot, u05)
AOT_SLEEF_OF_DOUBLES(sin, u10, aot_sin)
AOT_SLEEF_OF_DOUBLES(cos, u10, aot_cos)
AOT_SLEEF_OF_FLOATS(sin, u10, aot_far_sin)
AOT_SLEEF_OF_FLOATS(cos, u10, aot_far_cos)
AOT_SLEEF_OF_DOUBLES(exp, u10, aot_exp)
AOT_SLEEF_OF_DOUBLES(log, u10, aot_log)
AOT_SLEEF_OF_DOUBLES(tanh, u10, aot_tanh)
AOT_SLEEF_OF_DOUBLES(erf, u10, aot_erf)

// p 2^n for whole |n| < 300. Without an instruction the power is two factors: results may be
// denormal.
#if AOT_BYTES == 64
AOT floats aot_scaled(floats p, floats n) {
  return __builtin_ia32_scalefps512_mask(p, n, p, -1, 4);
}
#else
AOT floats aot_scaled(floats p, floats n) {
  ints whole = __builtin_convertvector(n == n ? n : floats{}, ints), half = whole >> 1;
  return p * (floats)((half + 127) << 23) * (floats)((whole - half + 127) << 23);
}
#endif

// 2^n e^r with |r| <= log(2) / 2.
AOT floats aot_exp(floats x) {
  x = aot_least(aot_floats(90), aot_most(aot_floats(-105), x));
  floats n = aot_round(x * 0x1.715476p+0f);
  floats high = aot_fma(n, aot_floats(-0x1.62e4p-1f), x);
  floats r = aot_fma(n, aot_floats(-0x1.7f7d1cp-20f), high);
  floats p = aot_fma(aot_fma(aot_exp_polynomial(r), r, aot_floats(1)), r, aot_floats(1));
  return aot_scaled(p, n);
}
AOT_NUMBER1(aot_exp)

// sin(x - n pi), and its sign turned where the last bit of `odd` is set. pi is in three parts, all
// of one sign, so that -0 stays; while |x| <= aot_far the first difference is exact and what is
// left out of pi does not count. Adding aot_whole rounds to whole numbers.
#ifdef __FMA__
static const float aot_far = 32768, aot_whole = 0x1.8p23f;
#else
static const float aot_far = -1, aot_whole = 0x1.8p23f;
#endif
AOT floats aot_sin_of(floats x, floats n, floats odd) {
  floats r = aot_fma(n, aot_floats(-0x1.921fb4p+1f), x);
  r = aot_fma(n, aot_floats(-0x1.4442d0p-23f), r);
  r = aot_fma(n, aot_floats(-0x1.846988p-47f), r);
  floats z = r * r, s = aot_fma(r * z, aot_sin_polynomial(z), r);
  floats y = aot_least(aot_floats(1), aot_abs(s));
  return (floats)((ints)y ^ (((ints)odd << 31) ^ ((ints)r & (int32_t)0x80000000)));
}
AOT floats aot_sin(floats x) {
  floats whole = aot_fma(x, aot_floats(0x1.45f306p-2f), aot_floats(aot_whole));
  floats y = aot_sin_of(x, whole - aot_whole, whole);
  if (__builtin_expect(!aot_any_above(aot_abs(x), aot_far), 1)) return y;
  return aot_abs(x) > aot_far ? aot_far_sin(x) : y;
}
AOT_NUMBER1(aot_sin)
AOT floats aot_cos(floats x) {
  floats whole = aot_fma(x, aot_floats(0x1.45f306p-2f), aot_floats(0.5f)) + aot_whole;
  floats y = aot_sin_of(x, whole - aot_whole - 0.5f, whole);
  if (__builtin_expect(!aot_any_above(aot_abs(x), aot_far), 1)) return y;
  return aot_abs(x) > aot_far ? aot_far_cos(x) : y;
}
AOT_NUMBER1(aot_cos)

// log(2^n (1 + f)) with sqrt(1/2) <= 1 + f < sqrt(2).
AOT floats aot_log(floats x) {
  ints small = x < 0x1p-126f;
  uints bits = (uints)(small ? x * 0x1p23f : x);
  ints n = (ints)(bits - 0x3f3504f3) >> 23;
  floats f = (floats)(bits - ((uints)n << 23)) - 1;
  floats e = __builtin_convertvector(n - (small & 23), floats);
  floats p = aot_fma(f, aot_log_polynomial(f), aot_floats(-0.5f));
  floats low = aot_fma(f * f, p, e * 0x1.7f7d1cp-20f);
  floats y = aot_fma(e, aot_floats(0x1.62e4p-1f), f + low);
  y = x == __builtin_inff() ? x : y;
  return x > 0 ? y : x == 0 ? aot_floats(-__builtin_inff()) : x - x + __builtin_nanf("");
}
AOT_NUMBER1(aot_log)

// An odd function. With an instruction that picks 16 of 32 numbers it has one polynomial for each
// interval of |x|, the first one less |x|; elsewhere two polynomials and the exponential.
#if AOT_BYTES == 64
AOT floats aot_pick(const float *table, ints i) {
  return __builtin_shuffle(aot_raw<floats>(table), aot_raw<floats>(table + 16), i);
}
AOT floats aot_piecewise(const float (&table)[7][32], float first, float most, floats x) {
  floats a = aot_least(aot_floats(most), aot_abs(x));
  ints small = a < first;
  ints i = (small ? (ints)aot_floats(first) - 1 : (ints)a) >> 21;
  floats d = a - aot_pick(table[0], i), p = aot_pick(table[6], i);
  _Pragma("GCC unroll 5")
  for (int k = 5; k > 1; k--) p = aot_fma(p, d, aot_pick(table[k], i));
  return aot_copysign(aot_fma(p, d, small ? a : aot_pick(table[1], i)), x);
}
AOT floats aot_tanh(floats x) { return aot_piecewise(aot_tanh_pieces, 0x1.4p-4f, 9.5f, x); }
AOT floats aot_erf(floats x) { return aot_piecewise(aot_erf_pieces, 0x1.4p-6f, 3.99f, x); }
#else
AOT floats aot_tanh(floats x) {
  floats a = aot_abs(x), z = x * x;
  floats small = aot_fma(a * z, aot_tanh_polynomial(z), a);
  return aot_copysign(a < 0.625f ? small : 1 - 2 / (aot_exp(2 * a) + 1), x);
}
AOT floats aot_erf(floats x) {
  floats a = aot_abs(x), most = a > 4 ? aot_floats(4) : a;
  floats small = aot_fma(a, aot_erf_polynomial(a * a), a);
  return aot_copysign(a < 1 ? small : 1 - aot_exp(aot_erfc_polynomial(most)), x);
}
#endif
AOT_NUMBER1(aot_tanh)
AOT_NUMBER1(aot_erf)

// 1 / (1 + exp(-x)), from the exponential that cannot overflow, corrected by the rounding error of
// the denominator.
template <class V> AOT V aot_sigmoid_of(V x) {
  V e = aot_exp(-aot_abs(x)), s = 1 + e, lost = e - (s - 1);
  V y = (x < 0 ? e : V{} + 1) / s;
  return y - y * lost * (x < 0 ? 1 - y : y);
}
AOT floats aot_sigmoid(floats x) { return aot_sigmoid_of(x); }
AOT doubles aot_sigmoid(doubles x) { return aot_sigmoid_of(x); }
AOT_NUMBER1(aot_sigmoid)

// Sleef's overflow where e^x does, a little early: there they are e^(x - c) (e^c / 2).
AOT_SLEEF_OF_FLOATS(sinh, u10, aot_small_sinh)
AOT_SLEEF_OF_DOUBLES(sinh, u10, aot_small_sinh)
AOT_SLEEF_OF_FLOATS(cosh, u10, aot_small_cosh)
AOT_SLEEF_OF_DOUBLES(cosh, u10, aot_small_cosh)
AOT floats aot_half_exp(floats x) { return aot_exp(x - 88) * 0x1.f1056e0000000p+125f; }
AOT doubles aot_half_exp(doubles x) { return aot_exp(x - 709) * 0x1.d422d2be5dc9bp+1021; }
AOT floats aot_large(floats) { return aot_floats(88); }
AOT doubles aot_large(doubles) { return aot_doubles(709); }
template <class V> AOT V aot_sinh_of(V x) {
  V a = aot_abs(x);
  return a > aot_large(x) ? aot_copysign(aot_half_exp(a), x) : aot_small_sinh(x);
}
template <class V> AOT V aot_cosh_of(V x) {
  V a = aot_abs(x);
  return a > aot_large(x) ? aot_half_exp(a) : aot_small_cosh(x);
}
AOT floats aot_sinh(floats x) { return aot_sinh_of(x); }
AOT doubles aot_sinh(doubles x) { return aot_sinh_of(x); }
AOT_NUMBER1(aot_sinh)
AOT floats aot_cosh(floats x) { return aot_cosh_of(x); }
AOT doubles aot_cosh(doubles x) { return aot_cosh_of(x); }
AOT_NUMBER1(aot_cosh)

// Sleef's overflow where the square of x does: there they are log(2 x).
AOT_SLEEF_OF_FLOATS(asinh, u10, aot_small_asinh)
AOT_SLEEF_OF_DOUBLES(asinh, u10, aot_small_asinh)
AOT_SLEEF_OF_FLOATS(acosh, u10, aot_small_acosh)
AOT_SLEEF_OF_DOUBLES(acosh, u10, aot_small_acosh)
template <class V> AOT V aot_log_of_double(V x) {
  auto log2 = x[0];
  log2 = 0x1.62e42fefa39efp-1;
  return aot_log(x) + log2;
}
template <class V> AOT V aot_asinh_of(V x) {
  V large = aot_copysign(aot_log_of_double(aot_abs(x)), x);
  return aot_abs(x) > 0x1p30 ? large : aot_small_asinh(x);
}
template <class V> AOT V aot_acosh_of(V x) {
  return x > 0x1p30 ? aot_log_of_double(x) : aot_small_acosh(x);
}
AOT floats aot_asinh(floats x) { return aot_asinh_of(x); }
AOT doubles aot_asinh(doubles x) { return aot_asinh_of(x); }
AOT_NUMBER1(aot_asinh)
AOT floats aot_acosh(floats x) { return aot_acosh_of(x); }
AOT doubles aot_acosh(doubles x) { return aot_acosh_of(x); }
AOT_NUMBER1(aot_acosh)

// Exact. Sleef's is NaN where the quotient overflows; the C library's divides at length.
AOT_SLEEF_OF_BOTH(fmod, , aot_fmod_of_near)
AOT float aot_long_fmod(float x, float y) { return __builtin_fmodf(x, y); }
AOT double aot_long_fmod(double x, double y) { return __builtin_fmod(x, y); }
template <class V, class T> AOT V aot_fmod_of(V x, V y, T (*at_length)(T, T)) {
  const V rest = aot_fmod_of_near(x, y);
  const auto lost = (rest != rest) & (x - x == 0) & (y != 0) & (y == y);
  auto any = lost[0];
  for (int i = 1; i < aot_lanes<V>; i++) any |= lost[i];
  return __builtin_expect(any != 0, 0) ? aot_each(x, y, at_length) : rest;
}
AOT floats aot_fmod(floats x, floats y) { return aot_fmod_of<floats, float>(x, y, aot_long_fmod); }
AOT doubles aot_fmod(doubles x, doubles y) {
  return aot_fmod_of<doubles, double>(x, y, aot_long_fmod);
}
AOT_NUMBER2(aot_fmod)

// The logarithm of the sum of two powers, as a scan accumulates it.
struct aot_log_of_sum {
  template <class T> AOT T of(T x, T y) {
    T least = x > y ? y : x, most = x > y ? x : y;
    T apart = x == y ? T{} : least - most;  // of infinities, too
    return most + aot_log1p(aot_exp(apart));
  }
};

// The same along lanes. Where no lane is far below the greatest, all are powers of their distance
// to it, and one logarithm is enough for all.
AOT doubles aot_scan_logs(double &a, doubles x) {
  double most = a;
  bool near = true;
  for (int i = 0; i < DOUBLES; i++) most = x[i] > most ? x[i] : most;
  for (int i = 0; i < DOUBLES; i++) near &= x[i] > most - 100;
  if (!near) return aot_scan_lanes<aot_log_of_sum>(a, x);
  double total = aot_exp(a - most);
  x = aot_exp(x - most);
  for (int i = 0; i < DOUBLES; i++) x[i] = total += x[i];
  x = most + aot_log(x);
  a = x[DOUBLES - 1];
  return x;
}
AOT floats aot_scan_logs(double &a, floats x) {
  doubles low = aot_scan_logs(a, aot_low(x));
  return aot_summed(sums{low, aot_scan_logs(a, aot_high(x))});
}
