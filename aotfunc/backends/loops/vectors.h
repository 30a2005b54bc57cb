// Vectors, loads and stores of every float dtype, selects, rounding and reductions.
//
//   floats, doubles  as many as a register holds: 16 and 8, or 8 and 4. Arithmetic and comparisons
//                    as for numbers, scalars broadcast
//   ints, longs      as many integers; also what comparing gives: 0 or -1 in each lane
//   bf16, f16        how these are stored; they are computed with as floats
//
// A function that takes floats or doubles takes float and double too, with the same result in each
// lane.

typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && \
    defined(__AVX512VL__) && !defined(__clang__)
#define AOT_BYTES 64
#define AOT_LOW 0, 1, 2, 3, 4, 5, 6, 7
#define AOT_HIGH 8, 9, 10, 11, 12, 13, 14, 15
#else
#define AOT_BYTES 32
#define AOT_LOW 0, 1, 2, 3
#define AOT_HIGH 4, 5, 6, 7
#endif
enum { FLOATS = AOT_BYTES / 4, DOUBLES = AOT_BYTES / 8 };

typedef float floats __attribute__((vector_size(AOT_BYTES)));
typedef double doubles __attribute__((vector_size(AOT_BYTES)));
typedef int32_t ints __attribute__((vector_size(AOT_BYTES)));
typedef int64_t longs __attribute__((vector_size(AOT_BYTES)));
typedef uint32_t uints __attribute__((vector_size(AOT_BYTES)));
typedef uint64_t ulongs __attribute__((vector_size(AOT_BYTES)));
typedef uint16_t halves __attribute__((vector_size(AOT_BYTES / 2)));
typedef float half_floats __attribute__((vector_size(AOT_BYTES / 2)));

struct bf16 { uint16_t bits; operator float() const; void operator=(float); };
struct f16 { uint16_t bits; operator float() const; void operator=(float); };

#define AOT static inline __attribute__((always_inline))

// Calls a function in every lane, if there is no instruction for all of them.
template <class V, class F> AOT V aot_each(V x, F f) {
  _Pragma("GCC unroll 16")
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); i++) x[i] = f(x[i]);
  return x;
}
template <class V, class F> AOT V aot_each(V x, V y, F f) {
  _Pragma("GCC unroll 16")
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); i++) x[i] = f(x[i], y[i]);
  return x;
}

// A number in all lanes, -0 too.
AOT floats aot_floats(float x) { return x - floats{}; }
AOT doubles aot_doubles(double x) { return x - doubles{}; }
AOT ints aot_ints(int32_t x) { return ints{} + x; }
AOT longs aot_longs(int64_t x) { return longs{} + x; }
AOT ints aot_mask(ints, bool x) { return ints{} - x; }
AOT longs aot_mask(longs, bool x) { return longs{} - x; }

// bfloat16 and float16, to and from float: round to nearest even, NaN stays NaN.
AOT uints aot_wide(halves x) { return __builtin_convertvector(x, uints); }
AOT floats aot_float(halves x, bf16) { return (floats)(aot_wide(x) << 16); }
AOT halves aot_narrow(floats x, bf16) {
  uints u = (uints)x;
  uints rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (uints)(ints{} + 0x7fc0), halves);
}
typedef int16_t shorts __attribute__((vector_size(AOT_BYTES / 2)));
#ifdef __F16C__
#if AOT_BYTES == 64
AOT floats aot_float(halves x, f16) {
  return __builtin_ia32_vcvtph2ps512_mask((shorts)x, floats{}, -1, 4);
}
AOT halves aot_narrow(floats x, f16) {
  return (halves)__builtin_ia32_vcvtps2ph512_mask(x, 0, shorts{}, -1);
}
#else
AOT floats aot_float(halves x, f16) { return __builtin_ia32_vcvtph2ps256((shorts)x); }
AOT halves aot_narrow(floats x, f16) { return (halves)__builtin_ia32_vcvtps2ph256(x, 0); }
#endif
#else
AOT floats aot_float(halves x, f16) {
  uints h = aot_wide(x), sign = (h & 0x8000) << 16, rest = (h & 0x7fff) << 13;
  // 2^112 moves the exponent from float16's bias to float's, denormals too
  floats finite = (floats)rest * 0x1p112f;
  uints special = rest | 0x7f800000;
  return (floats)(((h & 0x7c00) == 0x7c00 ? special : (uints)finite) | sign);
}
AOT halves aot_narrow(floats x, f16) {
  uints u = (uints)x, sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  uints normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  uints small = (uints)((floats)a + 0.5f) - 0x3f000000;  // the adder rounds to 2^-24
  uints big = a > 0x7f800000 ? (uints)(ints{} + 0x7e00) : (uints)(ints{} + 0x7c00);
  uints r = a >= 0x477ff000 ? big : a < 0x38800000 ? small : normal;
  return __builtin_convertvector(r | sign, halves);
}
#endif

// One of them.
#define AOT_HALF(half) \
  inline half::operator float() const { return aot_float(halves{} + bits, half{})[0]; } \
  inline void half::operator=(float x) { bits = aot_narrow(aot_floats(x), half{})[0]; }
AOT_HALF(bf16)
AOT_HALF(f16)
// Rounds to bfloat16 or float16 and back, as a cast in the middle of a chain does.
AOT floats aot_as_bf16(floats x) { return aot_float(aot_narrow(x, bf16{}), bf16{}); }
AOT floats aot_as_f16(floats x) { return aot_float(aot_narrow(x, f16{}), f16{}); }
AOT float aot_as_bf16(float x) { return aot_as_bf16(aot_floats(x))[0]; }
AOT float aot_as_f16(float x) { return aot_as_f16(aot_floats(x))[0]; }

// Half of the floats as doubles, and two halves as floats.
#if AOT_BYTES == 64  // GCC 12 converts them in four steps
AOT doubles aot_doubled(half_floats x) {
  return __builtin_ia32_cvtps2pd512_mask(x, doubles{}, -1, 4);
}
#else
AOT doubles aot_doubled(half_floats x) { return __builtin_convertvector(x, doubles); }
#endif
AOT doubles aot_low(floats x) { return aot_doubled(__builtin_shufflevector(x, x, AOT_LOW)); }
AOT doubles aot_high(floats x) { return aot_doubled(__builtin_shufflevector(x, x, AOT_HIGH)); }
AOT floats aot_join(doubles low, doubles high) {
  return __builtin_shufflevector(
      __builtin_convertvector(low, half_floats), __builtin_convertvector(high, half_floats),
      AOT_LOW, AOT_HIGH);
}

// For every vector function: the same for a number.
#define AOT_NUMBER1(name) \
  AOT float name(float x) { return name(aot_floats(x))[0]; } \
  AOT double name(double x) { return name(aot_doubles(x))[0]; }
#define AOT_NUMBER2(name) \
  AOT float name(float x, float y) { return name(aot_floats(x), aot_floats(y))[0]; } \
  AOT double name(double x, double y) { return name(aot_doubles(x), aot_doubles(y))[0]; }
#define AOT_BOTH1(name, expression) \
  AOT floats name(floats x) { return expression; } \
  AOT doubles name(doubles x) { return expression; } \
  AOT float name(float x) { return expression; } \
  AOT double name(double x) { return expression; }
#define AOT_BOTH2(name, expression) \
  AOT floats name(floats x, floats y) { return expression; } \
  AOT doubles name(doubles x, doubles y) { return expression; } \
  AOT float name(float x, float y) { return expression; } \
  AOT double name(double x, double y) { return expression; }

// NaN wins, as in torch.maximum.
AOT_BOTH2(aot_max, (x > y) | (x != x) ? x : y)
AOT_BOTH2(aot_min, (x < y) | (x != x) ? x : y)
AOT_BOTH1(aot_relu, x <= 0 ? decltype(x){} : x)
AOT_BOTH1(aot_reciprocal, 1 / x)

AOT floats aot_abs(floats x) { return (floats)((ints)x & 0x7fffffff); }
AOT doubles aot_abs(doubles x) { return (doubles)((longs)x & 0x7fffffffffffffff); }
AOT_NUMBER1(aot_abs)
AOT floats aot_copysign(floats x, floats y) {
  return (floats)(((ints)x & 0x7fffffff) | ((ints)y & (int32_t)0x80000000));
}
AOT doubles aot_copysign(doubles x, doubles y) {
  return (doubles)(((longs)x & 0x7fffffffffffffff) | ((longs)y & (int64_t)0x8000000000000000));
}
AOT_NUMBER2(aot_copysign)
// -1, 0 or 1; 0 for NaN, as torch.sign.
AOT floats aot_sign(floats x) { return __builtin_convertvector((x < 0) - (x > 0), floats); }
AOT doubles aot_sign(doubles x) { return __builtin_convertvector((x < 0) - (x > 0), doubles); }
AOT_NUMBER1(aot_sign)

// Rounding and roots: the correctly rounded instructions.
#if AOT_BYTES == 64
#define AOT_INSTRUCTION(name, imm, libm) \
  AOT floats name(floats x) { return __builtin_ia32_rndscaleps_mask(x, imm, x, -1, 4); } \
  AOT doubles name(doubles x) { return __builtin_ia32_rndscalepd_mask(x, imm, x, -1, 4); } \
  AOT_NUMBER1(name)
AOT floats aot_sqrt(floats x) { return __builtin_ia32_sqrtps512_mask(x, x, -1, 4); }
AOT doubles aot_sqrt(doubles x) { return __builtin_ia32_sqrtpd512_mask(x, x, -1, 4); }
#elif defined(__AVX__)
#define AOT_INSTRUCTION(name, imm, libm) \
  AOT floats name(floats x) { return __builtin_ia32_roundps256(x, imm); } \
  AOT doubles name(doubles x) { return __builtin_ia32_roundpd256(x, imm); } \
  AOT_NUMBER1(name)
AOT floats aot_sqrt(floats x) { return __builtin_ia32_sqrtps256(x); }
AOT doubles aot_sqrt(doubles x) { return __builtin_ia32_sqrtpd256(x); }
#else
#define AOT_INSTRUCTION(name, imm, libm) \
  AOT floats name(floats x) { \
    return aot_each(x, [](float a) { return __builtin_##libm##f(a); }); \
  } \
  AOT doubles name(doubles x) { \
    return aot_each(x, [](double a) { return __builtin_##libm(a); }); \
  } \
  AOT_NUMBER1(name)
AOT floats aot_sqrt(floats x) { return aot_each(x, [](float a) { return __builtin_sqrtf(a); }); }
AOT doubles aot_sqrt(doubles x) { return aot_each(x, [](double a) { return __builtin_sqrt(a); }); }
#endif
AOT_INSTRUCTION(aot_round, 8, rint)  // halves to even
AOT_INSTRUCTION(aot_floor, 9, floor)
AOT_INSTRUCTION(aot_ceil, 10, ceil)
AOT_INSTRUCTION(aot_trunc, 11, trunc)
AOT float aot_sqrt(float x) { return __builtin_sqrtf(x); }
AOT double aot_sqrt(double x) { return __builtin_sqrt(x); }
AOT_BOTH1(aot_rsqrt, 1 / aot_sqrt(x))

// The lesser and the greater one; y where either is NaN.
#if AOT_BYTES == 64
AOT floats aot_least(floats x, floats y) { return __builtin_ia32_minps512_mask(x, y, y, -1, 4); }
AOT floats aot_most(floats x, floats y) { return __builtin_ia32_maxps512_mask(x, y, y, -1, 4); }
#else
AOT floats aot_least(floats x, floats y) { return x < y ? x : y; }
AOT floats aot_most(floats x, floats y) { return x > y ? x : y; }
#endif

// Returns whether any lane is greater than this.
#if AOT_BYTES == 64
AOT bool aot_any_above(floats x, float y) {
  return __builtin_ia32_cmpps512_mask(x, aot_floats(y), 14, -1, 4);
}
#elif defined(__AVX__)
AOT bool aot_any_above(floats x, float y) { return __builtin_ia32_movmskps256((floats)(x > y)); }
#else
AOT bool aot_any_above(floats x, float y) {
  ints above = x > y;
  int32_t any = 0;
  for (int i = 0; i < FLOATS; i++) any |= above[i];
  return any;
}
#endif

// x * y + z, rounded once if the CPU can.
#if AOT_BYTES == 64
AOT floats aot_fma(floats x, floats y, floats z) {
  return __builtin_ia32_vfmaddps512_mask(x, y, z, -1, 4);
}
AOT doubles aot_fma(doubles x, doubles y, doubles z) {
  return __builtin_ia32_vfmaddpd512_mask(x, y, z, -1, 4);
}
#elif defined(__FMA__)
AOT floats aot_fma(floats x, floats y, floats z) { return __builtin_ia32_vfmaddps256(x, y, z); }
AOT doubles aot_fma(doubles x, doubles y, doubles z) {
  return __builtin_ia32_vfmaddpd256(x, y, z);
}
#else
AOT floats aot_fma(floats x, floats y, floats z) { return x * y + z; }
AOT doubles aot_fma(doubles x, doubles y, doubles z) { return x * y + z; }
#endif
AOT float aot_fma(float x, float y, float z) {
  return aot_fma(aot_floats(x), aot_floats(y), aot_floats(z))[0];
}
AOT double aot_fma(double x, double y, double z) {
  return aot_fma(aot_doubles(x), aot_doubles(y), aot_doubles(z))[0];
}
