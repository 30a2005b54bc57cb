// Lanes that are read under a mask, or at indices of their own.

// first, first + step, first + 2 step, ...
template <class V, class T> AOT V aot_ramp(T first, int64_t step) {
  V v = {};
  _Pragma("GCC unroll 16")
  for (int i = 0; i < aot_lanes<V>; i++) v[i] = i;
  return v * (T)step + first;
}

// Reads the first n elements that `wanted` asks for, each at its `place`; the others are 0.
template <class V, class T, class Wanted, class Place>
AOT V aot_each_of(const T *p, int64_t n, Wanted wanted, Place place) {
  typename aot_memory<V, T>::type v = {};
  _Pragma("GCC unroll 16")
  for (int i = 0; i < aot_lanes<V>; i++)
    if (i < n && wanted(i)) __builtin_memcpy((T *)&v + i, p + place(i), sizeof(T));
  return aot_memory<V, T>::load(v);
}
typedef long long quads __attribute__((vector_size(AOT_BYTES)));
#if AOT_BYTES == 64
AOT floats aot_gathered(const float *p, int64_t n, ints at) {
  return __builtin_ia32_gathersiv16sf(floats{}, p, at, n < 16 ? (1u << n) - 1 : -1, 4);
}
AOT doubles aot_gathered(const double *p, int64_t n, longs at) {
  return __builtin_ia32_gatherdiv8df(doubles{}, p, (quads)at, n < 8 ? (1u << n) - 1 : -1, 8);
}
template <class V> AOT V aot_looked_up(const float *p, int64_t n, int64_t stride, ints shift) {
  return aot_gathered(p, n, shift + aot_ramp<ints>(0, stride));
}
template <class V> AOT V aot_looked_up(const double *p, int64_t n, int64_t stride, longs shift) {
  return aot_gathered(p, n, shift + aot_ramp<longs>((int64_t)0, stride));
}
#endif
template <class V, class T, class I>
AOT V aot_looked_up(const T *p, int64_t n, int64_t stride, I shift) {
  return aot_each_of<V>(
      p, n, [](int) { return true; }, [=](int i) { return i * stride + shift[i]; });
}

// Returns whether any lane is not 0.
template <class I> AOT bool aot_any(I x) {
#if AOT_BYTES == 64
  return __builtin_ia32_ptestmq512((quads)x, (quads)x, -1);
#elif defined(__AVX__)
  return !__builtin_ia32_ptestz256((quads)x, (quads)x);
#else
  bool any = false;
  for (int i = 0; i < aot_lanes<I>; i++) any |= x[i] != 0;
  return any;
#endif
}

// Reads elements that lie within two registers from p on as lanes of these, others one by one.
#if AOT_BYTES == 64
template <class V> AOT floats aot_in_two(const float *p, int64_t n, ints at) {
  uints from = (uints)at;
  if (n < 16 || from[15] > 31 || aot_any((ints)(from > from[15]))) return aot_gathered(p, n, at);
  uint32_t read = ((uint64_t)2 << from[15]) - 1;
  floats low = __builtin_ia32_loadups512_mask(p, floats{}, read);
  floats high = __builtin_ia32_loadups512_mask(p + 16, floats{}, read >> 16);
  return __builtin_shuffle(low, high, at);
}
template <class V> AOT doubles aot_in_two(const double *p, int64_t n, longs at) {
  ulongs from = (ulongs)at;
  if (n < 8 || from[7] > 15 || aot_any((longs)(from > from[7]))) return aot_gathered(p, n, at);
  uint32_t read = (2u << from[7]) - 1;
  doubles low = __builtin_ia32_loadupd512_mask(p, doubles{}, read);
  doubles high = __builtin_ia32_loadupd512_mask(p + 8, doubles{}, read >> 8);
  return __builtin_shuffle(low, high, at);
}
#endif
template <class V, class T, class I> AOT V aot_in_two(const T *p, int64_t n, I at) {
  return aot_looked_up<V>(p, n, 0, at);
}

// Reads elements at places that were computed, which often lie beside each other.
template <class V, class T, class I>
AOT V aot_nearby(const T *p, int64_t n, int64_t stride, I shift) {
  typedef decltype(I{}[0] + 0) number;
  I from = shift + aot_ramp<I>((number)0, stride) - shift[0];
  p += shift[0];
  if (aot_any(from - aot_ramp<I>((number)0, 1))) return aot_in_two<V>(p, n, from);
  return aot_get<V>(p, n);
}

// Adds a value at each of these places, some of which may be the same.
template <class V, class T, class I>
AOT void aot_add_each(T *p, V v, int64_t n, int64_t stride, I shift) {
  _Pragma("GCC unroll 16")
  for (int i = 0; i < aot_lanes<V>; i++)
    if (i < n) p[i * stride + shift[i]] += v[i];
}
template <class V, class T, class M, class I>
AOT V aot_masked(const T *p, int64_t n, int64_t stride, M mask, I shift) {
  return aot_each_of<V>(
      p, n, [=](int i) { return mask[i] != 0; }, [=](int i) { return i * stride + shift[i]; });
}
template <class V, class T, class M>
AOT V aot_masked(const T *p, int64_t n, int64_t stride, M mask) {
  typedef decltype(M{}[0] + 0) number;
  M all = mask | (aot_ramp<M>((number)0, 1) >= (number)n);
  bool whole = true;
  _Pragma("GCC unroll 16")
  for (int i = 0; i < aot_lanes<V>; i++) whole &= all[i] != 0;
  if (whole) return stride == 1 ? aot_get<V>(p, n) : aot_gather<V>(p, n, stride);
  return aot_each_of<V>(
      p, n, [=](int i) { return mask[i] != 0; }, [=](int i) { return i * stride; });
}
