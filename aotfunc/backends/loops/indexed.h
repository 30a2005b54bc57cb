// Lanes that are read where a mask allows it, or at an index of their own.

// first, first + step, first + 2 step, ...
template <class V, class T> AOT V aot_ramp(T first, int64_t step) {
  V v = {};
  _Pragma("GCC unroll 16")
  for (int i = 0; i < aot_lanes<V>; i++) v[i] = i;
  return v * (T)step + first;
}

// The first n elements that `wanted` asks for, each where `place` says, 0 for the others.
template <class V, class T, class Wanted, class Place>
AOT V aot_each_of(const T *p, int64_t n, Wanted wanted, Place place) {
  typename aot_memory<V, T>::type v = {};
  _Pragma("GCC unroll 16")
  for (int i = 0; i < aot_lanes<V>; i++)
    if (i < n && wanted(i)) __builtin_memcpy((T *)&v + i, p + place(i), sizeof(T));
  return aot_memory<V, T>::load(v);
}
template <class V, class T, class I>
AOT V aot_looked_up(const T *p, int64_t n, int64_t stride, I shift) {
  return aot_each_of<V>(
      p, n, [](int) { return true; }, [=](int i) { return i * stride + shift[i]; });
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
