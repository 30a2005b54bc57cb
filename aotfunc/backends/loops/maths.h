// Maths functions, within 2 units in the last place and right on all special values.
//
// aot_exp aot_exp2 aot_expm1 aot_log aot_log2 aot_log10 aot_log1p aot_sigmoid
// aot_sin aot_cos aot_tan aot_asin aot_acos aot_atan aot_atan2 aot_hypot
// aot_sinh aot_cosh aot_tanh aot_asinh aot_acosh aot_atanh aot_erf aot_erfc aot_lgamma
// aot_pow aot_fmod, each of float, double, f8 and d4.

// AOT_SLEEF: libtorch_cpu exports Sleef's vector functions.
#if defined(AOT_SLEEF) && defined(__AVX2__) && defined(__FMA__)
#define AOT_SLEEF1(name, ulp) \
  extern "C" f8 Sleef_##name##f8_##ulp##avx2(f8) noexcept; \
  extern "C" d4 Sleef_##name##d4_##ulp##avx2(d4) noexcept; \
  AOT f8 aot_##name(f8 x) { return Sleef_##name##f8_##ulp##avx2(x); } \
  AOT d4 aot_##name(d4 x) { return Sleef_##name##d4_##ulp##avx2(x); } \
  AOT_NUMBER1(aot_##name)
#define AOT_SLEEF2(name, ulp) \
  extern "C" f8 Sleef_##name##f8_##ulp##avx2(f8, f8) noexcept; \
  extern "C" d4 Sleef_##name##d4_##ulp##avx2(d4, d4) noexcept; \
  AOT f8 aot_##name(f8 x, f8 y) { return Sleef_##name##f8_##ulp##avx2(x, y); } \
  AOT d4 aot_##name(d4 x, d4 y) { return Sleef_##name##d4_##ulp##avx2(x, y); } \
  AOT_NUMBER2(aot_##name)
#else
#define AOT_SLEEF1(name, ulp) \
  AOT f8 aot_##name(f8 x) { return aot_each(x, [](float a) { return __builtin_##name##f(a); }); } \
  AOT d4 aot_##name(d4 x) { return aot_each(x, [](double a) { return __builtin_##name(a); }); } \
  AOT_NUMBER1(aot_##name)
#define AOT_SLEEF2(name, ulp) \
  AOT f8 aot_##name(f8 x, f8 y) { \
    return aot_each(x, y, [](float a, float b) { return __builtin_##name##f(a, b); }); \
  } \
  AOT d4 aot_##name(d4 x, d4 y) { \
    return aot_each(x, y, [](double a, double b) { return __builtin_##name(a, b); }); \
  } \
  AOT_NUMBER2(aot_##name)
#endif

AOT_SLEEF1(exp, u10)
AOT_SLEEF1(exp2, u10)
AOT_SLEEF1(expm1, u10)
AOT_SLEEF1(log, u10)
AOT_SLEEF1(log2, u10)
AOT_SLEEF1(log10, u10)
AOT_SLEEF1(log1p, u10)
AOT_SLEEF1(sin, u10)
AOT_SLEEF1(cos, u10)
AOT_SLEEF1(tan, u10)
AOT_SLEEF1(asin, u10)
AOT_SLEEF1(acos, u10)
AOT_SLEEF1(atan, u10)
AOT_SLEEF1(sinh, u10)
AOT_SLEEF1(cosh, u10)
AOT_SLEEF1(tanh, u10)
AOT_SLEEF1(asinh, u10)
AOT_SLEEF1(acosh, u10)
AOT_SLEEF1(atanh, u10)
AOT_SLEEF1(erf, u10)
AOT_SLEEF1(erfc, u15)
AOT_SLEEF1(lgamma, u10)
AOT_SLEEF2(pow, u10)
AOT_SLEEF2(atan2, u10)
AOT_SLEEF2(hypot, u05)

// 1 / (1 + exp(-x)), by the exponential that cannot overflow.
template <class V> AOT V aot_sigmoid_of(V x) {
  V e = aot_exp(-aot_abs(x)), r = 1 / (1 + e);
  return x < 0 ? e * r : r;
}
AOT f8 aot_sigmoid(f8 x) { return aot_sigmoid_of(x); }
AOT d4 aot_sigmoid(d4 x) { return aot_sigmoid_of(x); }
AOT_NUMBER1(aot_sigmoid)

// Exact, as the C library's: by long division.
AOT f8 aot_fmod(f8 x, f8 y) {
  return aot_each(x, y, [](float a, float b) { return __builtin_fmodf(a, b); });
}
AOT d4 aot_fmod(d4 x, d4 y) {
  return aot_each(x, y, [](double a, double b) { return __builtin_fmod(a, b); });
}
AOT_NUMBER2(aot_fmod)
