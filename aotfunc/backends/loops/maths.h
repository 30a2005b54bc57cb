// Maths functions, within 2 units in the last place and right on all special values.
//
// aot_exp aot_exp2 aot_expm1 aot_log aot_log2 aot_log10 aot_log1p aot_sigmoid
// aot_sin aot_cos aot_tan aot_asin aot_acos aot_atan aot_atan2 aot_hypot
// aot_sinh aot_cosh aot_tanh aot_asinh aot_acosh aot_atanh aot_erf aot_erfc aot_lgamma
// aot_pow aot_fmod, each of float, double, f8 and d4.

// In float32 exp, sigmoid, log, tanh and erf are our own, of the polynomials above; the others are
// Sleef's.

// AOT_SLEEF: libtorch_cpu exports Sleef's vector functions.
#if defined(AOT_SLEEF) && defined(__AVX2__) && defined(__FMA__)
#define AOT_SLEEF8(name, ulp, as) \
  extern "C" f8 Sleef_##name##f8_##ulp##avx2(f8) noexcept; \
  AOT f8 as(f8 x) { return Sleef_##name##f8_##ulp##avx2(x); }
#define AOT_SLEEF4(name, ulp, as) \
  extern "C" d4 Sleef_##name##d4_##ulp##avx2(d4) noexcept; \
  AOT d4 as(d4 x) { return Sleef_##name##d4_##ulp##avx2(x); }
#define AOT_SLEEF2(name, ulp) \
  extern "C" f8 Sleef_##name##f8_##ulp##avx2(f8, f8) noexcept; \
  extern "C" d4 Sleef_##name##d4_##ulp##avx2(d4, d4) noexcept; \
  AOT f8 aot_##name(f8 x, f8 y) { return Sleef_##name##f8_##ulp##avx2(x, y); } \
  AOT d4 aot_##name(d4 x, d4 y) { return Sleef_##name##d4_##ulp##avx2(x, y); } \
  AOT_NUMBER2(aot_##name)
#else
#define AOT_SLEEF8(name, ulp, as) \
  AOT f8 as(f8 x) { return aot_each(x, [](float a) { return __builtin_##name##f(a); }); }
#define AOT_SLEEF4(name, ulp, as) \
  AOT d4 as(d4 x) { return aot_each(x, [](double a) { return __builtin_##name(a); }); }
#define AOT_SLEEF2(name, ulp) \
  AOT f8 aot_##name(f8 x, f8 y) { \
    return aot_each(x, y, [](float a, float b) { return __builtin_##name##f(a, b); }); \
  } \
  AOT d4 aot_##name(d4 x, d4 y) { \
    return aot_each(x, y, [](double a, double b) { return __builtin_##name(a, b); }); \
  } \
  AOT_NUMBER2(aot_##name)
#endif

#define AOT_SLEEF1(name, ulp) \
  AOT_SLEEF8(name, ulp, aot_##name) \
  AOT_SLEEF4(name, ulp, aot_##name) \
  AOT_NUMBER1(aot_##name)

AOT_SLEEF1(exp2, u10)
AOT_SLEEF1(expm1, u10)
AOT_SLEEF1(log2, u10)
AOT_SLEEF1(log10, u10)
AOT_SLEEF1(log1p, u10)
AOT_SLEEF1(sin, u10)
AOT_SLEEF1(cos, u10)
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
AOT_SLEEF4(exp, u10, aot_exp)
AOT_SLEEF4(log, u10, aot_log)
AOT_SLEEF4(tanh, u10, aot_tanh)
AOT_SLEEF4(erf, u10, aot_erf)

// 2^n e^r with |r| <= log(2) / 2, the rounding errors of r and 1 + r added at the end. The power in
// two factors: results may be denormal.
AOT f8 aot_exp(f8 x) {
  x = x < -105 ? aot_f8(-105) : x > 90 ? aot_f8(90) : x;
  f8 n = aot_round(x * 0x1.715476p+0f);
  f8 high = aot_fma(n, aot_f8(-0x1.62e4p-1f), x), low = n * -0x1.7f7d1cp-20f;
  f8 r = high + low, s = 1 + r;
  f8 lost = ((high - r) + low) + (r - (s - 1));
  f8 p = s + aot_fma(r * r, aot_exp_polynomial(r), lost);
  m8 whole = __builtin_convertvector(x == x ? n : f8{}, m8), half = whole >> 1;
  return p * (f8)((half + 127) << 23) * (f8)((whole - half + 127) << 23);
}
AOT_NUMBER1(aot_exp)

// log(2^n (1 + f)) with sqrt(1/2) <= 1 + f < sqrt(2).
AOT f8 aot_log(f8 x) {
  m8 small = x < 0x1p-126f;
  u8 bits = (u8)(small ? x * 0x1p23f : x);
  m8 n = (m8)(bits - 0x3f3504f3) >> 23;
  f8 f = (f8)(bits - ((u8)n << 23)) - 1;
  f8 e = __builtin_convertvector(n - (small & 23), f8);
  f8 low = aot_fma(f * f, aot_fma(f, aot_log_polynomial(f), aot_f8(-0.5f)), e * 0x1.7f7d1cp-20f);
  f8 y = aot_fma(e, aot_f8(0x1.62e4p-1f), f + low);
  y = x == __builtin_inff() ? x : y;
  return x > 0 ? y : x == 0 ? aot_f8(-__builtin_inff()) : x - x + __builtin_nanf("");
}
AOT_NUMBER1(aot_log)

AOT f8 aot_tanh(f8 x) {
  f8 a = aot_abs(x), z = x * x;
  f8 small = aot_fma(a * z, aot_tanh_polynomial(z), a);
  return aot_copysign(a < 0.625f ? small : 1 - 2 / (aot_exp(2 * a) + 1), x);
}
AOT_NUMBER1(aot_tanh)

AOT f8 aot_erf(f8 x) {
  f8 a = aot_abs(x), most = a > 4 ? aot_f8(4) : a;
  f8 small = aot_fma(a, aot_erf_polynomial(a * a), a);
  return aot_copysign(a < 1 ? small : 1 - aot_exp(aot_erfc_polynomial(most)), x);
}
AOT_NUMBER1(aot_erf)

// 1 / (1 + exp(-x)), of the exponential that cannot overflow, and without what rounding the
// denominator has lost.
template <class V> AOT V aot_sigmoid_of(V x) {
  V e = aot_exp(-aot_abs(x)), s = 1 + e, lost = e - (s - 1);
  V y = (x < 0 ? e : V{} + 1) / s;
  return y - y * lost * (x < 0 ? 1 - y : y);
}
AOT f8 aot_sigmoid(f8 x) { return aot_sigmoid_of(x); }
AOT d4 aot_sigmoid(d4 x) { return aot_sigmoid_of(x); }
AOT_NUMBER1(aot_sigmoid)

// Sleef's overflow where e^x does, a little early: there they are e^(x - c) (e^c / 2).
AOT_SLEEF8(sinh, u10, aot_small_sinh)
AOT_SLEEF4(sinh, u10, aot_small_sinh)
AOT_SLEEF8(cosh, u10, aot_small_cosh)
AOT_SLEEF4(cosh, u10, aot_small_cosh)
AOT f8 aot_half_exp(f8 x) { return aot_exp(x - 88) * 0x1.f1056e0000000p+125f; }
AOT d4 aot_half_exp(d4 x) { return aot_exp(x - 709) * 0x1.d422d2be5dc9bp+1021; }
AOT f8 aot_large(f8) { return aot_f8(88); }
AOT d4 aot_large(d4) { return aot_d4(709); }
template <class V> AOT V aot_sinh_of(V x) {
  V a = aot_abs(x);
  return a > aot_large(x) ? aot_copysign(aot_half_exp(a), x) : aot_small_sinh(x);
}
template <class V> AOT V aot_cosh_of(V x) {
  V a = aot_abs(x);
  return a > aot_large(x) ? aot_half_exp(a) : aot_small_cosh(x);
}
AOT f8 aot_sinh(f8 x) { return aot_sinh_of(x); }
AOT d4 aot_sinh(d4 x) { return aot_sinh_of(x); }
AOT_NUMBER1(aot_sinh)
AOT f8 aot_cosh(f8 x) { return aot_cosh_of(x); }
AOT d4 aot_cosh(d4 x) { return aot_cosh_of(x); }
AOT_NUMBER1(aot_cosh)

// Sleef's overflow where the square of x does: there they are log(2 x).
AOT_SLEEF8(asinh, u10, aot_small_asinh)
AOT_SLEEF4(asinh, u10, aot_small_asinh)
AOT_SLEEF8(acosh, u10, aot_small_acosh)
AOT_SLEEF4(acosh, u10, aot_small_acosh)
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
AOT f8 aot_asinh(f8 x) { return aot_asinh_of(x); }
AOT d4 aot_asinh(d4 x) { return aot_asinh_of(x); }
AOT_NUMBER1(aot_asinh)
AOT f8 aot_acosh(f8 x) { return aot_acosh_of(x); }
AOT d4 aot_acosh(d4 x) { return aot_acosh_of(x); }
AOT_NUMBER1(aot_acosh)

// Exact, as the C library's: by long division.
AOT f8 aot_fmod(f8 x, f8 y) {
  return aot_each(x, y, [](float a, float b) { return __builtin_fmodf(a, b); });
}
AOT d4 aot_fmod(d4 x, d4 y) {
  return aot_each(x, y, [](double a, double b) { return __builtin_fmod(a, b); });
}
AOT_NUMBER2(aot_fmod)
