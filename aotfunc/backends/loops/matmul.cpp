// Products of matrices: c[b, i, j] = the sum over k of a[b, i, k] * b[b, k, j].
//
// A tile of sums stays in registers while k runs: some rows of two vectors. The columns of a tile
// lie in memory as vectors, or are packed so; a row of `a` is read number by number, from
// where it is, or packed where many tiles read it. Which sums are added up in which order depends
// on the sizes alone, not on threads. WAY is the function that computes rows.

struct Matrix { int64_t start, batch, row, column; };  // where it begins, and steps

// The arguments that matmul.py packs.
struct Sizes { int64_t m, n, k; Matrix a, b, c; };

enum : int64_t {
  ROWS = AOT_BYTES == 64 ? 12 : 6,  // of a tile: with two vectors each they fill the registers
  BLOCK = 48,                       // rows of a task
  DEEP = 256,                       // of k at a time
  MANY = 1024,                      // columns at a time
  FEW = 4,                          // tiles beside each other that are worth packed rows
};

template <class T> struct Piece {
  const T *a;
  int64_t down, along;  // of a
  const T *b;
  int64_t next;  // row of b
  int64_t k;
  T *c;
  int64_t row, column;  // of c
  int64_t rows, columns;
  bool more;  // is added to c
};

// Adds the sums of a tile in memory, so many vectors for each row, to c.
template <class V, class T>
__attribute__((noinline)) static void put(const Piece<T> &p, const V *done, int64_t width) {
  for (int64_t i = 0; i < p.rows; i++)
    for (int64_t j = 0; j < width; j++) {
      const int64_t n = p.columns - j * aot_lanes<V>;
      if (n <= 0) break;
      T *c = p.c + i * p.row + j * aot_lanes<V> * p.column;
      V s = done[i * width + j];
      if (p.column == 1) {
        if (p.more) s += aot_get<V>(c, n);
        aot_put(c, s, n);
      } else {
        for (int64_t l = 0; l < n && l < aot_lanes<V>; l++)
          c[l * p.column] = p.more ? c[l * p.column] + s[l] : s[l];
      }
    }
}

template <class V, class T, int rows, int width> static void tile(const Piece<T> &p) {
  V sum[rows][width] = {};
  const T *a[rows / 3], *b = p.b;
  const int64_t down = p.down, along = p.along;
  for (int i = 0; i < rows / 3; i++) a[i] = p.a + 3 * i * down;
  for (int64_t k = 0; k < p.k; k++) {
    V y[width];
    _Pragma("GCC unroll 2")
    for (int j = 0; j < width; j++) y[j] = aot_raw<V>(b + j * aot_lanes<V>);
    b += p.next;
    _Pragma("GCC unroll 4")
    for (int i = 0; i < rows / 3; i++) {
      _Pragma("GCC unroll 3")
      for (int r = 0; r < 3; r++) {
        const V x = a[i][r * down] - V{};
        _Pragma("GCC unroll 2")
        for (int j = 0; j < width; j++) sum[3 * i + r][j] = aot_fma(x, y[j], sum[3 * i + r][j]);
      }
      a[i] += along;
    }
  }
  const bool usual =
      p.column == 1 && !p.more && p.rows == rows && p.columns >= width * aot_lanes<V>;
  V rest[rows][width];
  T *const to = usual ? p.c : (T *)rest;
  const int64_t row = usual ? p.row : width * aot_lanes<V>;
  _Pragma("GCC unroll 12")
  for (int i = 0; i < rows; i++)
    _Pragma("GCC unroll 2")
    for (int j = 0; j < width; j++) aot_raw(to + i * row + j * aot_lanes<V>, sum[i][j]);
  if (!usual) put(p, rest[0], width);
}

// Transposes n lines, each contiguous along k, into a vector for each k, `apart` from each other.
// The next vector overwrites what is written behind a vector's n lanes.
template <class V, class T>
static void pack(T *to, int64_t apart, const T *p, int64_t line, int64_t n, int64_t k) {
  enum : int64_t { L = aot_lanes<V> };
  V block[L];
  for (int64_t first = 0; first < k; first += L) {
    const int64_t m = k - first < L ? k - first : (int64_t)L;
    aot_turn<L>(block, p + first, line, n, m);
    for (int64_t i = 0; i < m; i++) aot_raw(to + (first + i) * apart, block[i]);
  }
}

// Packs rows of b as vectors, with zeros behind the last column.
template <class V, class T>
static void pack_columns(T *to, int64_t wide, const T *b, int64_t row, int64_t column, int64_t n,
                         int64_t k) {
  for (int64_t j = 0; j < wide; j += aot_lanes<V>) {
    const int64_t left = n - j < 0 ? 0 : n - j < aot_lanes<V> ? n - j : aot_lanes<V>;
    const T *from = b + j * column;
    if (column == 1)
      for (int64_t i = 0; i < k; i++) aot_put(to + i * wide + j, aot_get<V>(from + i * row, left));
    else if (row == 1)
      pack<V>(to + j, wide, from, column, left, k);
    else
      for (int64_t i = 0; i < k; i++)
        for (int64_t l = 0; l < aot_lanes<V>; l++)
          to[i * wide + j + l] = l < left ? from[i * row + l * column] : 0;
  }
}

// Packs rows of a, so many for each k, with zeros behind the last.
template <class V, class T>
static void pack_rows(T *to, int64_t rows, const T *a, int64_t row, int64_t column, int64_t n,
                      int64_t k) {
  if (column == 1 && rows <= aot_lanes<V>) return pack<V>(to, rows, a, row, n, k);
  for (int64_t i = 0; i < k; i++)
    for (int64_t r = 0; r < rows; r++) to[i * rows + r] = r < n ? a[i * column + r * row] : 0;
}

template <class V, class T, int width> static void tile_of(int64_t rows, const Piece<T> &p) {
  rows == 6 ? tile<V, T, 6, width>(p) : tile<V, T, ROWS, width>(p);
}

// Computes some rows of c.
template <class V, class T>
static void rows_of(const Sizes &s, const T *a, const T *b, T *c, int64_t first, int64_t last) {
  enum : int64_t { WIDE = 2 * aot_lanes<V> };
  static thread_local struct { T columns[DEEP * MANY], rows[(DEEP + 1) * 16]; }
      packed __attribute__((aligned(64)));
  for (int64_t k = 0; k < s.k; k += DEEP)
    for (int64_t j = 0; j < s.n; j += MANY) {
      const int64_t deep = s.k - k < DEEP ? s.k - k : DEEP, many = s.n - j < MANY ? s.n - j : MANY;
      const bool direct = s.b.column == 1 && last - first <= BLOCK;
      const T *left = b + k * s.b.row + j * s.b.column;
      for (int64_t w = 0; w < many; w += WIDE)
        if (!direct || many - w < WIDE)
          pack_columns<V>(packed.columns + w * deep, many - w > aot_lanes<V> ? WIDE : WIDE / 2,
                          left + w * s.b.column, s.b.row, s.b.column, many - w, deep);
      for (int64_t i = first; i < last; i += ROWS) {
        const int64_t n = last - i < ROWS ? last - i : ROWS;
        const int64_t rows = n > 6 ? ROWS : 6;
        Piece<T> p = {a + i * s.a.row + k * s.a.column, s.a.row, s.a.column};
        if (n < rows || (s.a.row != 1 && many > FEW * WIDE)) {
          pack_rows<V>(packed.rows, rows, p.a, s.a.row, s.a.column, n, deep);
          p.a = packed.rows, p.down = 1, p.along = rows;
        }
        p.k = deep, p.row = s.c.row, p.column = s.c.column, p.rows = n, p.more = k > 0;
        for (int64_t w = 0; w < many; w += WIDE) {
          p.columns = many - w;
          p.c = c + i * s.c.row + (j + w) * s.c.column;
          const bool one = p.columns <= aot_lanes<V>;
          if (direct && p.columns >= WIDE)
            p.b = left + w, p.next = s.b.row;
          else
            p.b = packed.columns + w * deep, p.next = one ? WIDE / 2 : WIDE;
          one ? tile_of<V, T, 1>(rows, p) : tile_of<V, T, 2>(rows, p);
        }
      }
    }
}

// Computes one row of c, several vectors of its columns at a time.
template <class V, class T>
static void row_of(const Sizes &s, const T *a, const T *b, T *c, int64_t, int64_t) {
  enum : int64_t { L = aot_lanes<V>, WIDE = 4 * L };
  for (int64_t j = 0; j < s.n; j += WIDE) {
    V sum[4] = {};
    const int64_t n = s.n - j;
    const T *p = b + j;
    if (n >= WIDE)
      for (int64_t k = 0; k < s.k; k++, p += s.b.row)
        for (int i = 0; i < 4; i++)
          sum[i] = aot_fma(a[k * s.a.column] - V{}, aot_raw<V>(p + i * L), sum[i]);
    else
      for (int64_t k = 0; k < s.k; k++, p += s.b.row)
        for (int i = 0; i < 4 && i * L < n; i++)
          sum[i] = aot_fma(a[k * s.a.column] - V{}, aot_get<V>(p + i * L, n - i * L), sum[i]);
    for (int i = 0; i < 4 && i * L < n; i++) {
      T *to = c + (j + i * L) * s.c.column;
      s.c.column == 1 ? aot_put(to, sum[i], n - i * L)
                      : aot_scatter(to, sum[i], n - i * L < L ? n - i * L : L, s.c.column);
    }
  }
}

// Adds the lanes of two vectors in pairs `half` apart: of a block of two halves, the first is x's.
template <int half, class V, int... i> AOT V added(V x, V y, aot_numbers<i...>) {
  enum { L = sizeof...(i), block = 2 * half };
  return __builtin_shufflevector(x, y, (i % block < half ? i : L + i - half)...) +
      __builtin_shufflevector(x, y, (i % block < half ? i + half : L + i)...);
}
template <class V, int half> AOT void added(V *x) {
  _Pragma("GCC unroll 8")
  for (int i = 0; i < half; i++)
    x[i] = added<half>(x[i], x[i + half], typename aot_up_to<aot_lanes<V>>::type{});
  if constexpr (half > 1) added<V, half / 2>(x);
}

// Returns the products of a with as many columns as there are lanes; a's last lanes are zeros.
template <class V, class T>
AOT V short_dots(const T *a, const T *b, int64_t column, int64_t k) {
  enum : int64_t { L = aot_lanes<V> };
  V x[L] = {};
  for (int64_t l = 0; l < k; l += L) {
    const V y = aot_get<V>(a + l, k - l);
    _Pragma("GCC unroll 16")
    for (int i = 0; i < L; i++) x[i] = aot_fma(y, aot_get<V>(b + i * column + l, k - l), x[i]);
  }
  added<V, L / 2>(x);
  return x[0];
}

// Computes one row of c from columns of b that are contiguous, as the row of a is.
template <class V, class T>
static void dots_of(const Sizes &s, const T *a, const T *b, T *c, int64_t, int64_t) {
  enum : int64_t { L = aot_lanes<V> };
  int64_t j = 0;
  if (s.k < 4 * L)
    for (; j + L <= s.n; j += L, b += L * s.b.column, c += L * s.c.column) {
      const V sums = short_dots<V>(a, b, s.b.column, s.k);
      s.c.column == 1 ? aot_put(c, sums) : aot_scatter(c, sums, L, s.c.column);
    }
  for (; j < s.n; j++, b += s.b.column, c += s.c.column) {
    V sum[4] = {};
    int64_t k = 0;
    for (; k + 4 * L <= s.k; k += 4 * L)
      for (int i = 0; i < 4; i++)
        sum[i] = aot_fma(aot_raw<V>(a + k + i * L), aot_raw<V>(b + k + i * L), sum[i]);
    for (; k < s.k; k += L)
      sum[0] = aot_fma(aot_get<V>(a + k, s.k - k), aot_get<V>(b + k, s.k - k), sum[0]);
    *c = aot_across((sum[0] + sum[1]) + (sum[2] + sum[3]), [](V x, V y) { return x + y; });
  }
}

// Computes rows `begin` to `end` of all batches' blocks.
template <class V, class T>
AOT void product(int64_t begin, int64_t end, const int64_t *sizes, void *const *buffers) {
  const Sizes &s = *(const Sizes *)sizes;
  const T *a = (const T *)buffers[0] + s.a.start, *b = (const T *)buffers[1] + s.b.start;
  T *c = (T *)buffers[2] + s.c.start;
  const int64_t blocks = (s.m + BLOCK - 1) / BLOCK;
  while (begin < end) {
    const int64_t batch = begin / blocks, first = begin % blocks;
    const int64_t last = blocks - first < end - begin ? blocks : first + end - begin;
    const T *x = a + batch * s.a.batch, *y = b + batch * s.b.batch;
    T *z = c + batch * s.c.batch;
    WAY<V>(s, x, y, z, first * BLOCK, last * BLOCK < s.m ? last * BLOCK : s.m);
    begin += last - first;
  }
}

extern "C" __attribute__((visibility("default"))) void aot_matmul(
    int64_t begin, int64_t end, const int64_t *sizes, void *const *buffers) {
  product<VECTOR, NUMBER>(begin, end, sizes, buffers);
}
