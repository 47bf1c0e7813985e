// The walk: exact causal tau attention on the CPU, forward and backward, in O(T log T) time and O(T D) memory.
//
// With a = lambda_q / temperature and b = lambda_k / temperature the weight of key j for query i >= j is
//     w_ij = exp(-|a_i - b_j| + W_i + w_j),     W_i = c_i,   w_j = key_bias_j - c_j,   c = running sum of log_decay.
// For b_j <= a_i that is exp(b_j + w_j) exp(-a_i + W_i): a factor of the key times a factor of the query. So, with the items
// in the order of their positions, one accumulator walked upwards gives every query the sum over all keys below it, and one
// walked downwards the sum over all keys above it. Causality: the sequence is halved again and again, all queries of a right
// half see all keys of its left half, and pairs inside a chunk of CHUNK tokens are summed directly.
//
// The backward pass is the same pass with the roles swapped: the queries are the sources, their rows the gradients, and
// the keys of the left halves receive. Both give each receiver r two rows,
//     sum_r  = sum_s w_rs row_s     and     diff_r = sum_s sign(a - b) w_rs row_s,
// and a row has one number more than D: 1 for a key, -(grad_i . out_i) for a query.
//
// Nothing overflows, and nothing that counts underflows: accumulators and receivers carry their own log scale, as in online
// softmax, so every exponent is <= 0. Positions and log weights are float64, rows have the dtype of v.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t CHUNK = 32;      // tokens whose pairs are summed directly
constexpr double NOTHING = -1e300;  // stands for log 0, the log of an empty sum
constexpr int64_t CACHED = 4096;   // tokens whose rows stay in a processor's cache through all their levels
constexpr int64_t AHEAD = 24;      // how many items ahead of their use rows are prefetched

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(64)));
  static constexpr int64_t width = 64 / sizeof(T);
};

template <typename V>
auto lane_sum(V v) {
  constexpr int64_t width = sizeof(V) / sizeof(v[0]);
  auto total = v[0] - v[0];
  for (int64_t i = 0; i < width; i++) total += v[i];
  return total;
}

template <typename T>
double dot(const T* x, const T* y, int64_t D) {  // in float64: the gradients of lambda are differences of such products
  typedef T U __attribute__((vector_size(8 * sizeof(T)), aligned(alignof(T))));
  using V = Vector<double>::type;
  V total = {};
  int64_t d = 0;
  for (; d + 8 <= D; d += 8)
    total += __builtin_convertvector(*(const U*)(x + d), V) * __builtin_convertvector(*(const U*)(y + d), V);
  double rest = lane_sum(total);
  for (; d < D; d++) rest += (double)x[d] * y[d];
  return rest;
}

template <typename T>
constexpr T inverse_factorial(int k) {
  return k < 2 ? 1 : inverse_factorial<T>(k - 1) / k;
}

// exp of n numbers <= 0 in place, 0 where it would be subnormal; memory up to the next multiple of 64 bytes is touched
template <typename T>
void exp_in_place(T* x, int64_t n) {
  using V = typename Vector<T>::type;
  using Int = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
  typedef Int I __attribute__((vector_size(64)));
  constexpr bool single = std::is_same_v<T, float>;
  constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023, degree = single ? 7 : 13;
  constexpr T magic = single ? 12582912.0 : 6755399441055744.0;  // puts the nearest integer into the low bits
  constexpr T log2_high = single ? 0.693359375 : 0.693147180369123816490, log2_low = single ? -2.12194440e-4 : 1.90821492927058770002e-10;
  constexpr Int magic_bits = std::bit_cast<Int>(magic);
  for (int64_t i = 0; i < n; i += Vector<T>::width) {
    V v = *(V*)(x + i);
    V rounder = v * (T)1.44269504088896340736 + magic, whole = rounder - magic;
    V r = v - whole * log2_high - whole * log2_low;
    V p = r * inverse_factorial<T>(degree) + inverse_factorial<T>(degree - 1);
#pragma GCC unroll 16
    for (int k = degree - 2; k >= 0; k--) p = p * r + inverse_factorial<T>(k);
    I bits = ((I)rounder + (bias - magic_bits)) << mantissa;
    *(V*)(x + i) = v < (T)(single ? -87.0 : -708.0) ? V{} : p * (V)bits;
  }
}

// Memory that a thread keeps between calls: fresh pages cost more than the arithmetic.
struct Buffer {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(memory); }
  template <typename T>
  T* get(int64_t count) {
    size_t needed = (count * sizeof(T) + 127) / 64 * 64;
    if (needed > bytes) {
      std::free(memory);
      memory = std::aligned_alloc(64, needed);
      TORCH_CHECK(memory != nullptr, "out of memory");
      bytes = needed;
    }
    return (T*)memory;
  }
};

// One token is two items: 2 t its key, 2 t + 1 its query.
using Item = uint32_t;

template <typename T>
void sort_items(const T* lambda_k, const T* lambda_q, int64_t n, Item* items, Item* spare, Buffer& keys_buffer) {
  if constexpr (std::is_same_v<T, float>) {  // radix sort on the bits of the floats, 11 at a time
    uint32_t* keys = keys_buffer.get<uint32_t>(4 * n);
    uint32_t* spare_keys = keys + 2 * n;
    std::vector<uint32_t> count(3 * 2048);
    auto ordered = [](float x) {
      uint32_t u;
      x += 0.0f;  // -0 becomes 0
      std::memcpy(&u, &x, 4);
      return u ^ ((u >> 31) ? 0xFFFFFFFFu : 0x80000000u);
    };
    for (int64_t i = 0; i < 2 * n; i++) {  // keys first: at a tie the key counts as below the query
      uint32_t key = ordered(i < n ? lambda_k[i] : lambda_q[i - n]);
      keys[i] = key;
      items[i] = i < n ? 2 * i : 2 * (i - n) + 1;
      count[key & 2047]++, count[2048 + (key >> 11 & 2047)]++, count[4096 + (key >> 22)]++;
    }
    for (int digit = 0; digit < 3; digit++) {
      uint32_t* start = &count[digit * 2048];
      for (uint32_t total = 0, i = 0; i < 2048; i++) {
        uint32_t here = start[i];
        start[i] = total;
        total += here;
      }
      for (int64_t i = 0; i < 2 * n; i++) {
        uint32_t to = start[keys[i] >> 11 * digit & 2047]++;
        spare_keys[to] = keys[i];
        spare[to] = items[i];
      }
      std::swap(keys, spare_keys);
      std::swap(items, spare);
    }
    std::memcpy(spare, items, 2 * n * sizeof(Item));  // after three swaps the result lies in the caller's spare
  } else {
    for (int64_t i = 0; i < n; i++) items[i] = 2 * i, items[n + i] = 2 * i + 1;
    auto value = [&](Item item) { return item & 1 ? lambda_q[item >> 1] : lambda_k[item >> 1]; };
    std::stable_sort(items, items + 2 * n, [&](Item x, Item y) { return value(x) < value(y); });
  }
}

template <typename T>
struct Scratch {
  Buffer items, next, list, keys, below, above, factor[2], weight[2], scale[2], xk, xq, wk, wq, rows, ones, up, down,
      up_one, down_one;
};

// One pass over one head: sources to receivers.
template <typename T>
struct Pass {
  using V = typename Vector<T>::type;
  static constexpr int64_t W = Vector<T>::width;

  int64_t n, stride;  // tokens; length of a row, D rounded up to whole vectors
  bool backward;      // the sources are the queries
  const double *xk, *wk, *xq, *wq;  // positions and log weights (n) of keys and queries
  const T* rows;                    // of the sources, (n, stride),
  const double* ones;               // and their last number, (n), in float64: the denominator is a sum of these
  // Sums over the sources below [0] and above [1] each receiver, in units of exp(scale); after finish() sum and diff.
  T* result[2];
  double* result_one[2];
  double* scale[2];  // by item
  Scratch<T>& scratch;

  Item source() const { return backward ? 1 : 0; }

  // For each pair (left half, right half) of at least CHUNK tokens each: adds the sources of one half to the receivers of the
  // other.
  void far(const T* lambda_k, const T* lambda_q) {
    for (int side = 0; side < 2; side++) {
      std::memset(result[side], 0, n * stride * sizeof(T));
      std::memset(result_one[side], 0, n * sizeof(double));
      std::fill(scale[side], scale[side] + 2 * n, NOTHING);
    }
    if (n <= CHUNK) return;
    Item *items = scratch.items.template get<Item>(2 * n), *next = scratch.next.template get<Item>(2 * n);
    Item* list = scratch.list.template get<Item>(n);
    sort_items(lambda_k, lambda_q, n, items, next, scratch.keys);

    // exponent of an item in the accumulator walked upwards, [0], and downwards, [1]
    double* exponent[2] = {scratch.below.template get<double>(2 * n), scratch.above.template get<double>(2 * n)};
    for (int64_t t = 0; t < n; t++) {
      double sign = backward ? -1 : 1;
      exponent[0][2 * t] = wk[t] + sign * xk[t];
      exponent[1][2 * t] = wk[t] - sign * xk[t];
      exponent[0][2 * t + 1] = wq[t] - sign * xq[t];
      exponent[1][2 * t + 1] = wq[t] + sign * xq[t];
    }
    T *factor[2], *weight[2];
    for (int side = 0; side < 2; side++) {
      factor[side] = scratch.factor[side].template get<T>(n + W);
      weight[side] = scratch.weight[side].template get<T>(n + W);
    }

    // one level of the tokens begin .. end, in pairs of blocks of size / 2; `from` has the items of each pair in order, `to`
    // gets those of each block in order
    auto level = [&](int64_t begin, int64_t end, int64_t size, Item* from, Item* to) {
      int64_t pairs = (end - begin + size - 1) / size;
      at::parallel_for(0, pairs, std::max<int64_t>(1, 16384 / size), [&](int64_t first, int64_t last) {
        for (int64_t pair = first; pair < last; pair++) {  // splits a pair, keeping the order; list: the items that meet
          int64_t low = begin + pair * size, middle = std::min(low + size / 2, n), high = std::min(low + size, n);
          Item *half[2] = {to + 2 * low, to + 2 * middle}, *out = list + low;
          for (int64_t i = 2 * low; i < 2 * high; i++) {
            Item item = from[i];
            Item right = (int64_t)(item >> 1) >= middle;
            *half[right]++ = item;
            if (middle < high) {
              *out = item;
              out += right == (item & 1);
            }
          }
        }
      });
      at::parallel_for(0, 2 * pairs, std::max<int64_t>(1, 4096 / size), [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; task++) {
          int64_t low = begin + task / 2 * size, high = std::min(low + size, n), side = task % 2;
          if (low + size / 2 >= n) continue;
          weigh(list + low, high - low, side, exponent[side], scale[side], factor[side] + low, weight[side] + low);
          for (int64_t d = 0; d < stride; d += 4 * W) {
            auto go = stride - d >= 4 * W ? walk<4> : stride - d == 3 * W ? walk<3> : stride - d == 2 * W ? walk<2> : walk<1>;
            go(*this, list + low, high - low, side, factor[side] + low, weight[side] + low, d);
          }
        }
      });
    };
    int64_t size = 2 * CHUNK;
    while (size < n) size *= 2;
    for (; size > CACHED; size /= 2) {
      level(0, n, size, items, next);
      std::swap(items, next);
    }
    const int64_t block = size;
    at::parallel_for(0, (n + block - 1) / block, 1, [&](int64_t first, int64_t last) {
      for (int64_t begin = first * block; begin < std::min(last * block, n); begin += block) {
        Item *from = items, *to = next;
        for (int64_t size = block; size >= 2 * CHUNK; size /= 2, std::swap(from, to))
          level(begin, std::min(begin + block, n), size, from, to);
      }
    });
  }

  // The factors and weights of a walk, in its order. An accumulator or receiver x of log scale m takes an item of log weight s:
  // m' = max(m, s); x = x exp(m - m') + item exp(s - m').
  void weigh(const Item* list, int64_t count, int64_t side, const double* exponent, double* scale, T* factor, T* weight) const {
    double reach = NOTHING;  // log scale of the accumulator
    const Item source = this->source();
    for (int64_t i = 0; i < count; i++) {
      const Item item = list[side ? count - 1 - i : i];
      const bool is_source = (item & 1) == source;
      const double e = exponent[item], candidate = is_source ? e : NOTHING;
      const double reached = reach > candidate ? reach : candidate;  // the only step that waits for the step before it
      const double before = is_source ? reach : scale[item], added = is_source ? e : e + reach;
      const double after = before > added ? before : added;
      scale[item] = after;  // of a source: never read
      factor[i] = before - after;
      weight[i] = added - after;
      reach = reached;
    }
    exp_in_place(factor, count);
    exp_in_place(weight, count);
  }

  template <int B>
  static void walk(Pass& pass, const Item* list, int64_t count, int64_t side, const T* factor, const T* weight, int64_t d) {
    V accumulator[B] = {};
    double one = 0;
    const Item source = pass.source();
    const int64_t stride = pass.stride, step = side ? -1 : 1;
    const T* rows = pass.rows + d;
    T* result = pass.result[side] + d;
    double* result_one = pass.result_one[side];
    const Item* at = side ? list + count - 1 : list;
    for (int64_t i = 0; i < count; i++, at += step) {
      if (i + AHEAD < count) {
        Item item = at[AHEAD * step];
        const char* row = (const char*)(((item & 1) == source ? rows : result) + (item >> 1) * stride);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) __builtin_prefetch(row + 64 * b);
      }
      int64_t t = *at >> 1;
      T f = factor[i], w = weight[i];
      if ((*at & 1) == source) {
        const V* row = (const V*)(rows + t * stride);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) accumulator[b] = accumulator[b] * f + row[b] * w;
        one = one * f + pass.ones[t] * w;
      } else if (w != 0) {
        V* row = (V*)(result + t * stride);
#pragma GCC unroll 4
        for (int b = 0; b < B; b++) row[b] = row[b] * f + accumulator[b] * w;
        if (d == 0) result_one[t] = result_one[t] * f + one * w;
      }
    }
  }

  // Sums the pairs inside the chunk that begins at `first` and adds the results of the walks: result[0] becomes sum, result[1]
  // diff, both in units of exp(total), which it writes, (CHUNK).
  void finish(int64_t first, double* total) {
    const int64_t count = std::min(CHUNK, n - first);
    alignas(64) T weight[CHUNK][CHUNK], signed_weight[CHUNK][CHUNK];
    alignas(64) T rescale[CHUNK][2];
    const double *xr = (backward ? xk : xq) + first, *wr = (backward ? wk : wq) + first;
    double xs[CHUNK] = {}, ws[CHUNK] = {};
    std::memcpy(xs, (backward ? xq : xk) + first, count * sizeof(double));
    std::memcpy(ws, (backward ? wq : wk) + first, count * sizeof(double));
    const T plus = backward ? -1 : 1;  // diff is keys below minus keys above, or queries above minus queries below
    for (int64_t r = 0; r < count; r++) {
      const int64_t begin = backward ? r : 0, end = backward ? count : r + 1;
      double exponent[CHUNK], most[8];
      for (int64_t s = 0; s < CHUNK; s++) {
        const double distance = xr[r] - xs[s];
        exponent[s] = s >= begin && s < end ? ws[s] - std::abs(distance) : NOTHING;
        signed_weight[r][s] = plus * distance >= 0 ? 1 : -1;
      }
      for (int64_t i = 0; i < 8; i++) most[i] = exponent[i];
      for (int64_t s = 8; s < CHUNK; s += 8)
        for (int64_t i = 0; i < 8; i++) most[i] = exponent[s + i] > most[i] ? exponent[s + i] : most[i];
      const double below = scale[0][2 * (first + r) + !backward], above = scale[1][2 * (first + r) + !backward];
      double highest = std::max(below, above);
      for (int64_t i = 0; i < 8; i++) highest = std::max(highest, most[i] + wr[r]);
      total[r] = highest;
      for (int64_t s = 0; s < CHUNK; s++) weight[r][s] = exponent[s] + (wr[r] - highest);
      rescale[r][0] = below - highest, rescale[r][1] = above - highest;
    }
    exp_in_place(&weight[0][0], count * CHUNK);
    exp_in_place(&rescale[0][0], 2 * count);
    for (int64_t r = 0; r < count; r++)
      for (int64_t s = 0; s < CHUNK; s++) signed_weight[r][s] *= weight[r][s];

    for (int64_t d = 0; d < stride; d += 4 * W) {
      auto go = stride - d >= 4 * W ? near<4> : stride - d == 3 * W ? near<3> : stride - d == 2 * W ? near<2> : near<1>;
      go(*this, first, count, weight, signed_weight, rescale, plus, d);
    }
    double chunk_ones[CHUNK] = {};
    std::memcpy(chunk_ones, ones + first, count * sizeof(double));
    for (int64_t r = 0; r < count; r++) {
      Vector<double>::type sums = {}, diffs = {};
      for (int64_t s = 0; s < CHUNK; s += 8)
        for (int64_t i = 0; i < 8; i++) {
          sums[i] += weight[r][s + i] * chunk_ones[s + i];
          diffs[i] += signed_weight[r][s + i] * chunk_ones[s + i];
        }
      double sum = lane_sum(sums), diff = lane_sum(diffs);
      double below = result_one[0][first + r] * rescale[r][0], above = result_one[1][first + r] * rescale[r][1];
      result_one[0][first + r] = sum + below + above;
      result_one[1][first + r] = diff + plus * (below - above);
    }
  }

  template <int B>
  static void near(Pass& pass, int64_t first, int64_t count, const T (&weight)[CHUNK][CHUNK],
                   const T (&signed_weight)[CHUNK][CHUNK], const T (&rescale)[CHUNK][2], T plus, int64_t d) {
    const int64_t stride = pass.stride;
    const T* rows = pass.rows + first * stride + d;
    for (int64_t r = 0; r < count; r += 2) {  // two receivers share the loads of a source's row
      V sum[2][B] = {}, diff[2][B] = {};
      const int64_t begin = pass.backward ? r : 0, end = pass.backward ? count : std::min(r + 2, count);
      for (int64_t s = begin; s < end; s++) {
        const V* row = (const V*)(rows + s * stride);
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++)
#pragma GCC unroll 4
          for (int b = 0; b < B; b++) {
            sum[q][b] += row[b] * weight[r + q][s];
            diff[q][b] += row[b] * signed_weight[r + q][s];
          }
      }
      for (int64_t q = 0; q < std::min<int64_t>(2, count - r); q++) {
        V *below = (V*)(pass.result[0] + (first + r + q) * stride + d), *above = (V*)(pass.result[1] + (first + r + q) * stride + d);
        for (int b = 0; b < B; b++) {
          V low = below[b] * rescale[r + q][0], high = above[b] * rescale[r + q][1];
          below[b] = sum[q][b] + low + high;
          above[b] = diff[q][b] + plus * (low - high);
        }
      }
    }
  }
};

// The rows of a head inside a tensor (B, H, T, D) whose last dimension is dense.
template <typename T>
struct Rows {
  T* first;
  int64_t step;
  T* operator[](int64_t t) const { return first + t * step; }
};

template <typename T>
Rows<T> rows_of(const at::Tensor& x, int64_t head) {
  int64_t H = x.size(1);
  return {const_cast<T*>(x.const_data_ptr<std::remove_const_t<T>>()) + head / H * x.stride(0) + head % H * x.stride(1), x.stride(2)};
}

// One head and its inputs as raw pointers; decay and bias are null where there is none.
template <typename T>
struct Head {
  int64_t n, D, stride;
  double inverse_temperature;
  const T *lambda_q, *lambda_k;
  Rows<const T> v;
  const double *decay, *bias;
  Scratch<T>& scratch;

  Pass<T> pass(bool backward, Rows<const T> source, const double* lse) {
    double *xk = scratch.xk.template get<double>(n), *xq = scratch.xq.template get<double>(n);
    double *wk = scratch.wk.template get<double>(n), *wq = scratch.wq.template get<double>(n);
    T* rows = scratch.rows.template get<T>(n * stride);
    double* ones = scratch.ones.template get<double>(n);
    for (int64_t t = 0; t < n; t++) {
      xk[t] = lambda_k[t] * inverse_temperature;
      xq[t] = lambda_q[t] * inverse_temperature;
      double c = decay ? decay[t] : 0.0;
      wk[t] = (bias ? bias[t] : 0.0) - c;
      wq[t] = lse ? c - lse[t] : c;
      std::memcpy(rows + t * stride, source[t], D * sizeof(T));
      std::memset(rows + t * stride + D, 0, (stride - D) * sizeof(T));
      ones[t] = 1;
    }
    return {n, stride, backward, xk, wk, xq, wq, rows, ones,
            {scratch.up.template get<T>(n * stride), scratch.down.template get<T>(n * stride)},
            {scratch.up_one.template get<double>(n), scratch.down_one.template get<double>(n)},
            {scratch.scale[0].template get<double>(2 * n), scratch.scale[1].template get<double>(2 * n)}, scratch};
  }

  void forward(Rows<T> out, double* lse, T* diff, T* diff_one) {
    Pass<T> p = pass(false, v, nullptr);
    p.far(lambda_k, lambda_q);
    at::parallel_for(0, (n + CHUNK - 1) / CHUNK, 8, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * CHUNK; first < std::min(end * CHUNK, n); first += CHUNK) {
        double total[CHUNK];
        p.finish(first, total);
        for (int64_t t = first; t < std::min(first + CHUNK, n); t++) {
          const double Z = p.result_one[0][t];
          const T over = 1 / Z;
          const T *sum = p.result[0] + t * stride, *difference = p.result[1] + t * stride;
          T *to = out[t], *to_diff = diff + t * D;
          for (int64_t d = 0; d < D; d++) to[d] = sum[d] * over;
          for (int64_t d = 0; d < D; d++) to_diff[d] = difference[d] * over;
          diff_one[t] = p.result_one[1][t] / Z;
          lse[t] = total[t - first] + std::log(Z);
        }
      }
    });
  }

  // Adds to grad_lambda_k and grad_v, which heads share; sets grad_lambda_q and grad_weight, the gradient of the key's log
  // weight. Returns sum a da + sum b db, which is -temperature times the gradient of the temperature.
  double backward(Rows<const T> grad, Rows<const T> out, const double* lse, const T* diff, const T* diff_one,
                  T* grad_lambda_q, T* grad_lambda_k, Rows<T> grad_v, double* grad_weight) {
    Pass<T> p = pass(true, grad, lse);
    double* ones = const_cast<double*>(p.ones);
    const double center = p.xq[0];
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    std::vector<double> moment(chunks);  // one entry per chunk: the sum does not depend on the threads
    at::parallel_for(0, chunks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * CHUNK; t < std::min(end * CHUNK, n); t++) {
        ones[t] = -dot(grad[t], out[t], D);
        double da = -(dot(grad[t], diff + t * D, D) + ones[t] * diff_one[t]);
        grad_lambda_q[t] = da * inverse_temperature;
        moment[t / CHUNK] += da * (p.xq[t] - center);
      }
    });
    p.far(lambda_k, lambda_q);
    at::parallel_for(0, chunks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * CHUNK; first < std::min(end * CHUNK, n); first += CHUNK) {
        double total[CHUNK];
        p.finish(first, total);
        for (int64_t t = first; t < std::min(first + CHUNK, n); t++) {
          double back = std::exp(total[t - first]);
          T *sum = p.result[0] + t * stride, *difference = p.result[1] + t * stride;
          double db = back * (dot<T>(v[t], difference, D) + p.result_one[1][t]);
          grad_weight[t] = back * (dot<T>(v[t], sum, D) + p.result_one[0][t]);
          grad_lambda_k[t] += db * inverse_temperature;
          moment[t / CHUNK] += db * (p.xk[t] - center);
          T* to = grad_v[t];
          for (int64_t d = 0; d < D; d++) to[d] += sum[d] * (T)back;
        }
      }
    });
    double all = 0;
    for (double part : moment) all += part;
    return all;
  }
};

template <typename T>
Scratch<T>& scratch() {
  static thread_local Scratch<T> mine;
  return mine;
}

using Maybe = std::optional<at::Tensor>;

template <typename T>
Head<T> head_of(const at::Tensor& lambda_q, const at::Tensor& lambda_k, const at::Tensor& v, const at::Tensor& temperature,
                const Maybe& decay, const Maybe& bias, int64_t group, int64_t head) {
  constexpr int64_t W = Vector<T>::width;
  int64_t n = v.size(2), D = v.size(3);
  return {n, D, (D + W - 1) / W * W, 1 / temperature.const_data_ptr<double>()[head % lambda_q.size(1)],
          lambda_q.const_data_ptr<T>() + head * n, lambda_k.const_data_ptr<T>() + group * n, rows_of<const T>(v, group),
          decay ? decay->const_data_ptr<double>() + head * n : nullptr,
          bias ? bias->const_data_ptr<double>() + group * n : nullptr, scratch<T>()};
}

// Calls work(group, head) for every group of query heads that share a key/value head, and for its heads in turn. Each thread
// takes whole groups if there are enough of them; otherwise all threads work inside one group after the other.
template <typename Work>
void each_head(int64_t groups, int64_t heads, Work work) {
  auto some = [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++)
      for (int64_t head = group * heads; head < (group + 1) * heads; head++) work(group, head);
  };
  if (groups >= at::get_num_threads()) at::parallel_for(0, groups, 1, some);
  else some(0, groups);
}

// An uninitialised tensor. A large one is fresh memory, which the system provides faster in huge pages.
at::Tensor empty(at::IntArrayRef sizes, at::TensorOptions options) {
  auto x = at::empty(sizes, options);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 1 << 21;
  const uintptr_t begin = ((uintptr_t)x.data_ptr() + page - 1) / page * page, end = (uintptr_t)x.data_ptr() + x.nbytes();
  if (end > begin + 16 * page) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
  return x;
}

// lambda_q (B, H, T), lambda_k (B, Hkv, T), v (B, Hkv, T, D), temperature (H) float64, decay (B, H, T) float64 (the running
// sum of the log decays), bias (B, Hkv, T) float64; v (and below, grad and out) of any strides with dense rows, the others
// contiguous. out and grad_v lie in memory as (B, T, heads, D), the layout that the projections around the operator use.
// -> out (B, H, T, D), lse (B, H, T) float64, diff (B, H, T, D), diff_one (B, H, T)
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& lambda_q, const at::Tensor& lambda_k, const at::Tensor& v, const at::Tensor& temperature,
    const Maybe& decay, const Maybe& bias) {
  int64_t B = v.size(0), Hkv = v.size(1), n = v.size(2), D = v.size(3), H = lambda_q.size(1);
  auto out = empty({B, n, H, D}, v.options()).transpose(1, 2), diff = empty({B, H, n, D}, v.options());
  auto lse = at::empty({B, H, n}, v.options().dtype(at::kDouble)), diff_one = at::empty({B, H, n}, v.options());
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "tau_walk_forward", [&] {
    each_head(B * Hkv, H / Hkv, [&](int64_t group, int64_t head) {
      auto h = head_of<scalar_t>(lambda_q, lambda_k, v, temperature, decay, bias, group, head);
      h.forward(rows_of<scalar_t>(out, head), lse.data_ptr<double>() + head * n,
                diff.data_ptr<scalar_t>() + head * n * D, diff_one.data_ptr<scalar_t>() + head * n);
    });
  });
  return {out, lse, diff, diff_one};
}

// -> gradients of lambda_q, lambda_k, v, temperature (H) float64, and (B, H, T) float64 of the keys' log weights
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& grad, const at::Tensor& lambda_q, const at::Tensor& lambda_k, const at::Tensor& v,
    const at::Tensor& temperature, const Maybe& decay, const Maybe& bias, const at::Tensor& out, const at::Tensor& lse,
    const at::Tensor& diff, const at::Tensor& diff_one) {
  int64_t B = v.size(0), Hkv = v.size(1), n = v.size(2), D = v.size(3), H = lambda_q.size(1);
  auto grad_lambda_q = at::empty_like(lambda_q), grad_lambda_k = at::zeros_like(lambda_k);
  auto grad_v = empty({B, n, Hkv, D}, v.options()).zero_().transpose(1, 2);
  auto grad_weight = at::empty({B, H, n}, v.options().dtype(at::kDouble)), moment = at::empty({B, H}, temperature.options());
  AT_DISPATCH_FLOATING_TYPES(v.scalar_type(), "tau_walk_backward", [&] {
    each_head(B * Hkv, H / Hkv, [&](int64_t group, int64_t head) {
      auto h = head_of<scalar_t>(lambda_q, lambda_k, v, temperature, decay, bias, group, head);
      moment.data_ptr<double>()[head] = h.backward(
          rows_of<const scalar_t>(grad, head), rows_of<const scalar_t>(out, head),
          lse.const_data_ptr<double>() + head * n, diff.const_data_ptr<scalar_t>() + head * n * D,
          diff_one.const_data_ptr<scalar_t>() + head * n, grad_lambda_q.data_ptr<scalar_t>() + head * n,
          grad_lambda_k.data_ptr<scalar_t>() + group * n, rows_of<scalar_t>(grad_v, group),
          grad_weight.data_ptr<double>() + head * n);
    });
  });
  return {grad_lambda_q, grad_lambda_k, grad_v, -moment.sum(0) / temperature, grad_weight};
}

// row = kept * row + from, product and sum rounded each, as they are in torch
template <typename T>
void step(std::vector<T>& row, T kept, const T* from) {
  for (T& x : row) x *= kept;
  asm volatile("" : : "r"(row.data()) : "memory");  // no fused multiply-add
  for (size_t d = 0; d < row.size(); d++) row[d] += from[d];
}

// y_t = a_t y_(t-1) + b_t of each head: a (B, T, H, 1), b (B, T, H, D), both contiguous -> y (B, T, H, D)
at::Tensor recurrence(const at::Tensor& a, const at::Tensor& b) {
  const int64_t B = b.size(0), n = b.size(1), H = b.size(2), D = b.size(3);
  auto y = empty(b.sizes(), b.options());
  AT_DISPATCH_FLOATING_TYPES(b.scalar_type(), "recurrence", [&] {
    at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> row(D);
      for (int64_t head = begin; head < end; head++) {
        std::fill(row.begin(), row.end(), 0);
        for (int64_t t = 0; t < n; t++) {
          const int64_t at = (head / H * n + t) * H + head % H;
          step(row, a.const_data_ptr<scalar_t>()[at], b.const_data_ptr<scalar_t>() + at * D);
          std::copy_n(row.data(), D, y.data_ptr<scalar_t>() + at * D);
        }
      }
    });
  });
  return y;
}

// -> gradients of a and b
std::tuple<at::Tensor, at::Tensor> recurrence_backward(const at::Tensor& grad, const at::Tensor& a, const at::Tensor& y) {
  const int64_t B = y.size(0), n = y.size(1), H = y.size(2), D = y.size(3);
  auto grad_a = at::zeros_like(a), grad_b = empty(y.sizes(), y.options());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "recurrence_backward", [&] {
    at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> row(D);
      for (int64_t head = begin; head < end; head++) {
        std::fill(row.begin(), row.end(), 0);
        scalar_t kept = 0;
        for (int64_t t = n - 1; t >= 0; t--) {
          const int64_t at = (head / H * n + t) * H + head % H;
          step(row, kept, grad.const_data_ptr<scalar_t>() + at * D);
          std::copy_n(row.data(), D, grad_b.data_ptr<scalar_t>() + at * D);
          if (t) grad_a.data_ptr<scalar_t>()[at] = dot(row.data(), y.const_data_ptr<scalar_t>() + (at - H) * D, D);
          kept = a.const_data_ptr<scalar_t>()[at];
        }
      }
    });
  });
  return {grad_a, grad_b};
}

}  // namespace

TORCH_LIBRARY(tauformer_walk, library) {
  library.def("forward(Tensor lambda_q, Tensor lambda_k, Tensor v, Tensor temperature, Tensor? decay, Tensor? bias) -> "
              "(Tensor, Tensor, Tensor, Tensor)", &forward);
  library.def("backward(Tensor grad, Tensor lambda_q, Tensor lambda_k, Tensor v, Tensor temperature, Tensor? decay, "
              "Tensor? bias, Tensor out, Tensor lse, Tensor diff, Tensor diff_one) -> "
              "(Tensor, Tensor, Tensor, Tensor, Tensor)", &backward);
  library.def("recurrence(Tensor a, Tensor b) -> Tensor", &recurrence);
  library.def("recurrence_backward(Tensor grad, Tensor a, Tensor y) -> (Tensor, Tensor)", &recurrence_backward);
}
