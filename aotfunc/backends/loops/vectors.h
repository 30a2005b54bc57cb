// Vectors, loads and stores of every float dtype, selects, rounding and reductions.
//
//   f8, d4      8 floats, 4 doubles: arithmetic and comparisons as for numbers, scalars broadcast
//   m8, m4      what comparing them gives: 0 or -1 in each lane; also 8 int32, 4 int64
//   bf16, f16   how these are stored; they are computed with as floats
//
// A function that takes f8 or d4 takes float and double too, with the same result in each lane.

typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;

typedef float f8 __attribute__((vector_size(32)));
typedef double d4 __attribute__((vector_size(32)));
typedef int32_t m8 __attribute__((vector_size(32)));
typedef int64_t m4 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint64_t u4 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef float f4 __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

#define AOT static inline __attribute__((always_inline))

// The same function in every lane, where there is no instruction for all of them.
template <class V, class F> AOT V aot_each(V x, F f) {
  _Pragma("GCC unroll 8")
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); i++) x[i] = f(x[i]);
  return x;
}
template <class V, class F> AOT V aot_each(V x, V y, F f) {
  _Pragma("GCC unroll 8")
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); i++) x[i] = f(x[i], y[i]);
  return x;
}

AOT f8 aot_f8(float x) { return f8{x, x, x, x, x, x, x, x}; }
AOT d4 aot_d4(double x) { return d4{x, x, x, x}; }
// Number or vector, the vector that holds it.
AOT f8 aot_vector(float x) { return aot_f8(x); }
AOT d4 aot_vector(double x) { return aot_d4(x); }

// Bits.
AOT m8 aot_bits(f8 x) { return (m8)x; }
AOT m4 aot_bits(d4 x) { return (m4)x; }
AOT f8 aot_from_bits(m8 x) { return (f8)x; }
AOT d4 aot_from_bits(m4 x) { return (d4)x; }

// bfloat16 and float16, to and from float: round to nearest even, NaN stays NaN.
AOT u8 aot_wide(h8 x) { return __builtin_convertvector(x, u8); }
AOT f8 aot_float(h8 x, bf16) { return (f8)(aot_wide(x) << 16); }
AOT h8 aot_narrow(f8 x, bf16) {
  u8 u = (u8)x;
  u8 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (u8)(m8{} + 0x7fc0), h8);
}
#ifdef __F16C__
typedef int16_t aot_s8 __attribute__((vector_size(16)));
AOT f8 aot_float(h8 x, f16) { return __builtin_ia32_vcvtph2ps256((aot_s8)x); }
AOT h8 aot_narrow(f8 x, f16) { return (h8)__builtin_ia32_vcvtps2ph256(x, 0); }
#else
AOT f8 aot_float(h8 x, f16) {
  u8 h = aot_wide(x), sign = (h & 0x8000) << 16, rest = (h & 0x7fff) << 13;
  // 2^112 moves the exponent from float16's bias to float's, denormals too
  f8 finite = (f8)rest * 0x1p112f;
  u8 special = rest | 0x7f800000;
  return (f8)(((h & 0x7c00) == 0x7c00 ? special : (u8)finite) | sign);
}
AOT h8 aot_narrow(f8 x, f16) {
  u8 u = (u8)x, sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  u8 normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  u8 small = (u8)((f8)a + 0.5f) - 0x3f000000;  // the adder rounds to 2^-24
  u8 big = a > 0x7f800000 ? (u8)(m8{} + 0x7e00) : (u8)(m8{} + 0x7c00);
  u8 r = a >= 0x477ff000 ? big : a < 0x38800000 ? small : normal;
  return __builtin_convertvector(r | sign, h8);
}
#endif

// Loads: all lanes, or the first n with zeros behind them.
template <class V> struct aot_unaligned { V v; } __attribute__((packed, may_alias));
template <class V> AOT V aot_raw(const void *p) { return ((const aot_unaligned<V> *)p)->v; }
template <class V> AOT void aot_raw(void *p, V v) { ((aot_unaligned<V> *)p)->v = v; }
template <class V, class T> AOT V aot_raw(const T *p, int64_t n, int64_t stride) {
  V v = {};
  for (int64_t i = 0; i < n; i++) v[i] = p[i * stride];
  return v;
}
AOT h8 aot_halves(const void *p, int64_t n, int64_t stride) {
  return aot_raw<h8>((const uint16_t *)p, n, stride);
}
AOT f8 aot_load8(const float *p) { return aot_raw<f8>(p); }
AOT f8 aot_load8(const bf16 *p) { return aot_float(aot_raw<h8>(p), bf16{}); }
AOT f8 aot_load8(const f16 *p) { return aot_float(aot_raw<h8>(p), f16{}); }
AOT d4 aot_load4(const double *p) { return aot_raw<d4>(p); }
// n lanes, `stride` elements apart.
AOT f8 aot_load8(const float *p, int64_t n, int64_t stride = 1) { return aot_raw<f8>(p, n, stride); }
AOT f8 aot_load8(const bf16 *p, int64_t n, int64_t stride = 1) {
  return aot_float(aot_halves(p, n, stride), bf16{});
}
AOT f8 aot_load8(const f16 *p, int64_t n, int64_t stride = 1) {
  return aot_float(aot_halves(p, n, stride), f16{});
}
AOT d4 aot_load4(const double *p, int64_t n, int64_t stride = 1) {
  return aot_raw<d4>(p, n, stride);
}

// Stores, likewise.
template <class V, class T> AOT void aot_put(T *p, V v, int64_t n, int64_t stride) {
  for (int64_t i = 0; i < n; i++) p[i * stride] = v[i];
}
AOT void aot_store8(float *p, f8 v) { aot_raw(p, v); }
AOT void aot_store8(bf16 *p, f8 v) { aot_raw(p, aot_narrow(v, bf16{})); }
AOT void aot_store8(f16 *p, f8 v) { aot_raw(p, aot_narrow(v, f16{})); }
AOT void aot_store4(double *p, d4 v) { aot_raw(p, v); }
AOT void aot_store8(float *p, f8 v, int64_t n, int64_t stride = 1) { aot_put(p, v, n, stride); }
AOT void aot_store8(bf16 *p, f8 v, int64_t n, int64_t stride = 1) {
  aot_put((uint16_t *)p, aot_narrow(v, bf16{}), n, stride);
}
AOT void aot_store8(f16 *p, f8 v, int64_t n, int64_t stride = 1) {
  aot_put((uint16_t *)p, aot_narrow(v, f16{}), n, stride);
}
AOT void aot_store4(double *p, d4 v, int64_t n, int64_t stride = 1) { aot_put(p, v, n, stride); }

// One element of any dtype, as a float or double.
AOT float aot_load(const float *p) { return *p; }
AOT double aot_load(const double *p) { return *p; }
AOT float aot_load(const bf16 *p) { return aot_load8(p, 1)[0]; }
AOT float aot_load(const f16 *p) { return aot_load8(p, 1)[0]; }
AOT void aot_store(float *p, float v) { *p = v; }
AOT void aot_store(double *p, double v) { *p = v; }
AOT void aot_store(bf16 *p, float v) { aot_store8(p, aot_f8(v), 1); }
AOT void aot_store(f16 *p, float v) { aot_store8(p, aot_f8(v), 1); }
// To bfloat16 or float16 and back: what a cast in the middle of a chain does.
AOT f8 aot_as_bf16(f8 x) { return aot_float(aot_narrow(x, bf16{}), bf16{}); }
AOT f8 aot_as_f16(f8 x) { return aot_float(aot_narrow(x, f16{}), f16{}); }
AOT float aot_as_bf16(float x) { return aot_as_bf16(aot_f8(x))[0]; }
AOT float aot_as_f16(float x) { return aot_as_f16(aot_f8(x))[0]; }

// Half of an f8 as doubles, and two halves as an f8.
AOT d4 aot_low(f8 x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3), d4);
}
AOT d4 aot_high(f8 x) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, 4, 5, 6, 7), d4);
}
AOT f8 aot_join(d4 low, d4 high) {
  return __builtin_shufflevector(
      __builtin_convertvector(low, f4), __builtin_convertvector(high, f4), 0, 1, 2, 3, 4, 5, 6, 7);
}

// Selects. The mask is a comparison of vectors, or a bool.
AOT f8 aot_where(m8 m, f8 a, f8 b) { return m ? a : b; }
AOT d4 aot_where(m4 m, d4 a, d4 b) { return m ? a : b; }
AOT float aot_where(bool m, float a, float b) { return m ? a : b; }
AOT double aot_where(bool m, double a, double b) { return m ? a : b; }

// For every vector function: the same for a number.
#define AOT_NUMBER1(name) \
  AOT float name(float x) { return name(aot_f8(x))[0]; } \
  AOT double name(double x) { return name(aot_d4(x))[0]; }
#define AOT_NUMBER2(name) \
  AOT float name(float x, float y) { return name(aot_f8(x), aot_f8(y))[0]; } \
  AOT double name(double x, double y) { return name(aot_d4(x), aot_d4(y))[0]; }
#define AOT_BOTH1(name, expression) \
  AOT f8 name(f8 x) { return expression; } \
  AOT d4 name(d4 x) { return expression; } \
  AOT float name(float x) { return expression; } \
  AOT double name(double x) { return expression; }
#define AOT_BOTH2(name, expression) \
  AOT f8 name(f8 x, f8 y) { return expression; } \
  AOT d4 name(d4 x, d4 y) { return expression; } \
  AOT float name(float x, float y) { return expression; } \
  AOT double name(double x, double y) { return expression; }

// NaN wins, as in torch.maximum.
AOT_BOTH2(aot_max, (x > y) | (x != x) ? x : y)
AOT_BOTH2(aot_min, (x < y) | (x != x) ? x : y)
AOT_BOTH1(aot_relu, x <= 0 ? decltype(x){} : x)
AOT_BOTH1(aot_reciprocal, 1 / x)

AOT f8 aot_abs(f8 x) { return (f8)((m8)x & 0x7fffffff); }
AOT d4 aot_abs(d4 x) { return (d4)((m4)x & 0x7fffffffffffffff); }
AOT_NUMBER1(aot_abs)
AOT f8 aot_copysign(f8 x, f8 y) {
  return (f8)(((m8)x & 0x7fffffff) | ((m8)y & (int32_t)0x80000000));
}
AOT d4 aot_copysign(d4 x, d4 y) {
  return (d4)(((m4)x & 0x7fffffffffffffff) | ((m4)y & (int64_t)0x8000000000000000));
}
AOT_NUMBER2(aot_copysign)
// -1, 0 or 1; 0 for NaN, as torch.sign.
AOT f8 aot_sign(f8 x) { return __builtin_convertvector((x < 0) - (x > 0), f8); }
AOT d4 aot_sign(d4 x) { return __builtin_convertvector((x < 0) - (x > 0), d4); }
AOT_NUMBER1(aot_sign)

// Rounding and roots: the correctly rounded instructions.
#ifdef __AVX__
#define AOT_INSTRUCTION(name, imm, libm) \
  AOT f8 name(f8 x) { return __builtin_ia32_roundps256(x, imm); } \
  AOT d4 name(d4 x) { return __builtin_ia32_roundpd256(x, imm); } \
  AOT_NUMBER1(name)
AOT f8 aot_sqrt(f8 x) { return __builtin_ia32_sqrtps256(x); }
AOT d4 aot_sqrt(d4 x) { return __builtin_ia32_sqrtpd256(x); }
#else
#define AOT_INSTRUCTION(name, imm, libm) \
  AOT f8 name(f8 x) { return aot_each(x, [](float a) { return __builtin_##libm##f(a); }); } \
  AOT d4 name(d4 x) { return aot_each(x, [](double a) { return __builtin_##libm(a); }); } \
  AOT_NUMBER1(name)
AOT f8 aot_sqrt(f8 x) { return aot_each(x, [](float a) { return __builtin_sqrtf(a); }); }
AOT d4 aot_sqrt(d4 x) { return aot_each(x, [](double a) { return __builtin_sqrt(a); }); }
#endif
AOT_INSTRUCTION(aot_round, 8, rint)  // halves to even
AOT_INSTRUCTION(aot_floor, 9, floor)
AOT_INSTRUCTION(aot_ceil, 10, ceil)
AOT_INSTRUCTION(aot_trunc, 11, trunc)
AOT float aot_sqrt(float x) { return __builtin_sqrtf(x); }
AOT double aot_sqrt(double x) { return __builtin_sqrt(x); }
AOT_BOTH1(aot_rsqrt, 1 / aot_sqrt(x))

// x * y + z, rounded once where the CPU can.
#ifdef __FMA__
AOT f8 aot_fma(f8 x, f8 y, f8 z) { return __builtin_ia32_vfmaddps256(x, y, z); }
AOT d4 aot_fma(d4 x, d4 y, d4 z) { return __builtin_ia32_vfmaddpd256(x, y, z); }
#else
AOT f8 aot_fma(f8 x, f8 y, f8 z) { return x * y + z; }
AOT d4 aot_fma(d4 x, d4 y, d4 z) { return x * y + z; }
#endif

// All lanes into one number, pairwise.
#define AOT_ACROSS(name, op) \
  AOT float name(f8 x) { \
    f8 a = op(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3)); \
    f8 b = op(a, __builtin_shufflevector(a, a, 2, 3, 0, 1, 6, 7, 4, 5)); \
    return op(b, __builtin_shufflevector(b, b, 1, 0, 3, 2, 5, 4, 7, 6))[0]; \
  } \
  AOT double name(d4 x) { \
    d4 a = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1)); \
    return op(a, __builtin_shufflevector(a, a, 1, 0, 3, 2))[0]; \
  }
AOT_BOTH2(aot_add, x + y)
AOT_BOTH2(aot_mul, x * y)
AOT_ACROSS(aot_across_add, aot_add)
AOT_ACROSS(aot_across_mul, aot_mul)
AOT_ACROSS(aot_across_max, aot_max)
AOT_ACROSS(aot_across_min, aot_min)
