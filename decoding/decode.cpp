// One query against many keys without reading them all: exactly, in O(log T) rows (cache.py's ExactCache), and from a state
// that does not grow (StreamCache).
//
// Exactly. All keys but the latest, at most SEGMENT, are cut into segments of SEGMENT times a power of two, each sorted by lambda.
// A query with position a = lambda_q / temperature sums a segment's keys below it as exp(-a) sum_j exp(b_j + w_j) v'_j, and those
// above it by the mirror image (attention.cpp has the derivation; b_j = lambda_k,j / temperature, w_j is the key's log weight, v' = [v, 1]).
// Running sums of both kinds are kept at every BLOCK-th row only: a query finds its block, reads the sums of the rows before and
// after that block, and takes the block's own rows one by one. Keys after the last segment are taken one by one too.
//
// Log weights count from the end of a segment: w_j = key_bias_j + (c_end - c_j), c the running sum of log decays, so that
// they stay small in float32; the decay from there to the query is added by each query, in float64. Sums carry their own log
// scale, as in online softmax: every exponent is <= 0.
//
// From a state. A head keeps a number of rows, which stand for keys that lie close together: where they lie, the log of their weight and
// their mean value; and the latest tokens, at most RECENT, as they came. A query attends to all of these as to keys.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

namespace {

constexpr int64_t SEGMENT = 128, BLOCK = 16, RECENT = 16;
constexpr double NOTHING = -1e300;

using Maybe = std::optional<at::Tensor>;

// A sum of weighted rows v' (D + 1 numbers), times exp(scale).
struct Sum {
  float* row;
  int64_t D;
  double scale = NOTHING;

  float rescaled(double log_weight) {  // makes room for a term of this log weight; returns the term's factor
    if (log_weight > scale) {
      const float down = std::exp(scale - log_weight);
      for (int64_t d = 0; d <= D; d++) row[d] *= down;
      scale = log_weight;
      return 1;
    }
    return std::exp(log_weight - scale);
  }
  void add(const float* v, double log_weight) {  // adds a value
    const float f = rescaled(log_weight);
    if (f == 0) return;
    for (int64_t d = 0; d < D; d++) row[d] += f * v[d];
    row[D] += f;
  }
  void add_sum(const float* other, double log_weight) {  // adds another sum
    const float f = rescaled(log_weight);
    if (f == 0) return;
    for (int64_t d = 0; d <= D; d++) row[d] += f * other[d];
  }
};

// Puts the rows of several arrays in the order of n keys.
struct Sorting {
  std::vector<int64_t> order;
  std::vector<float> moved;

  Sorting(const float* key, int64_t n, int64_t widest) : order(n), moved(n * widest) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return key[i] < key[j]; });
  }
  void operator()(float* x, int64_t width) {
    const int64_t n = order.size();
    for (int64_t i = 0; i < n; i++) std::copy_n(x + order[i] * width, width, moved.data() + i * width);
    std::copy_n(moved.data(), n * width, x);
  }
};

// The data of one head in a contiguous cache tensor (B, heads, ...).
template <typename T>
T* of(const at::Tensor& x, int64_t b, int64_t h) {
  return x.data_ptr<T>() + (b * x.size(1) + h) * x.stride(1);
}

// lambda_k (B, Hkv, N), weight (B, H, N), v (B, Hkv, N, D), sums (B, H, N / BLOCK, 2, D + 1), scales (B, H, N / BLOCK, 2) float64,
// temperature (H) float64: sorts the rows start .. stop of each head by lambda and computes their running sums.
void seal(at::Tensor lambda_k, at::Tensor weight, at::Tensor v, at::Tensor sums, at::Tensor scales, const at::Tensor& temperature,
          int64_t start, int64_t stop) {
  const int64_t B = v.size(0), Hkv = v.size(1), H = weight.size(1), D = v.size(3), n = stop - start, heads = H / Hkv;
  at::parallel_for(0, B * Hkv, 1, [&](int64_t first, int64_t last) {
    std::vector<float> row(D + 1);
    for (int64_t g = first; g < last; g++) {
      const int64_t b = g / Hkv, k = g % Hkv;
      float *lambda = of<float>(lambda_k, b, k) + start, *values = of<float>(v, b, k) + start * D;
      Sorting sorted(lambda, n, D);
      sorted(values, D);
      for (int64_t h = k * heads; h < (k + 1) * heads; h++) sorted(of<float>(weight, b, h) + start, 1);
      sorted(lambda, 1);
      for (int64_t h = k * heads; h < (k + 1) * heads; h++) {
        const double sharpness = 1 / temperature.const_data_ptr<double>()[h];
        const float* w = of<float>(weight, b, h) + start;
        for (int64_t side = 0; side < 2; side++) {  // 0: rows before a block, in the scale of the nearest one; 1: rows after it
          std::fill(row.begin(), row.end(), 0);
          Sum sum{row.data(), D};
          double position = 0;
          for (int64_t i = 0; i < n; i++) {
            const int64_t j = side ? n - 1 - i : i;
            if (i % BLOCK == 0) {
              const int64_t block = (start + j) / BLOCK;
              std::copy_n(row.data(), D + 1, of<float>(sums, b, h) + (2 * block + side) * (D + 1));
              of<double>(scales, b, h)[2 * block + side] = sum.scale;
            }
            const double x = lambda[j];
            if (i) sum.scale -= std::abs(x - position) * sharpness;
            position = x;
            sum.add(values + j * D, w[j]);
          }
        }
      }
    }
  });
}

// The next token, number `length`: lambda_q (B, H, 1), lambda_k (B, Hkv, 1), v (B, Hkv, 1, D), log_decay (B, H, 1) and bias
// (B, Hkv, 1) if there are any. It is stored in the cache, whose tensors are as above and whose rows before
// length / SEGMENT * SEGMENT are in segments. ends (B, H, 1 + N / SEGMENT) float64 is the running sum of log decays after each
// multiple of SEGMENT tokens, now (B, H) float64 the one after the last token; sink (H) float64, if any, the log weight of a value 0.
// -> out (B, H, 1, D)
at::Tensor attend(const at::Tensor& lambda_q, const at::Tensor& lambda_k, const at::Tensor& v, const Maybe& log_decay, const Maybe& bias,
                  at::Tensor lambdas, at::Tensor weight, at::Tensor values, at::Tensor sums, at::Tensor scales,
                  const at::Tensor& temperature, const at::Tensor& ends, at::Tensor now, const Maybe& sink, int64_t length) {
  const int64_t B = v.size(0), Hkv = v.size(1), H = weight.size(1), D = v.size(3), heads = H / Hkv, sealed = length / SEGMENT * SEGMENT;
  auto out = at::empty({B, H, 1, D}, v.options());
  at::parallel_for(0, B * Hkv, 1, [&](int64_t first, int64_t last) {
    std::vector<float> row(D + 1);
    for (int64_t group = first; group < last; group++) {
      const int64_t b = group / Hkv, k = group % Hkv;
      float *lambda = of<float>(lambdas, b, k), *value = of<float>(values, b, k);
      lambda[length] = lambda_k.const_data_ptr<float>()[group];
      std::copy_n(v.const_data_ptr<float>() + group * D, D, value + length * D);
      for (int64_t h = k * heads; h < (k + 1) * heads; h++) {
        const int64_t head = b * H + h;
        const double a = lambda_q.const_data_ptr<float>()[head], sharpness = 1 / temperature.const_data_ptr<double>()[h];
        const double* end = of<double>(ends, b, h);
        double& here = now.data_ptr<double>()[head];
        if (log_decay) here += log_decay->const_data_ptr<float>()[head];
        float* w = of<float>(weight, b, h);
        w[length] = end[sealed / SEGMENT] - here + (bias ? bias->const_data_ptr<float>()[group] : 0);
        std::fill(row.begin(), row.end(), 0);
        Sum sum{row.data(), D};
        auto rows = [&](int64_t begin, int64_t stop, double ahead) {
          for (int64_t j = begin; j < stop; j++) sum.add(value + j * D, ahead + w[j] - std::abs(a - lambda[j]) * sharpness);
        };
        for (int64_t start = 0; start < sealed;) {
          int64_t size = SEGMENT;  // the largest segment that fits
          while (start + 2 * size <= sealed) size *= 2;
          const int64_t stop = start + size, rank = std::upper_bound(lambda + start, lambda + stop, (float)a) - lambda;
          const int64_t begin = std::min(rank / BLOCK * BLOCK, stop - BLOCK), block = begin / BLOCK;
          const double ahead = here - end[stop / SEGMENT];
          const float* block_sums = of<float>(sums, b, h) + 2 * block * (D + 1);
          const double* block_scales = of<double>(scales, b, h) + 2 * block;
          if (begin > start) sum.add_sum(block_sums, ahead + block_scales[0] - (a - lambda[begin - 1]) * sharpness);
          if (begin + BLOCK < stop) sum.add_sum(block_sums + D + 1, ahead + block_scales[1] - (lambda[begin + BLOCK] - a) * sharpness);
          rows(begin, begin + BLOCK, ahead);
          start = stop;
        }
        rows(sealed, length + 1, here - end[sealed / SEGMENT]);
        if (sink) row[D] += sum.rescaled(sink->const_data_ptr<double>()[h]);
        float* to = out.data_ptr<float>() + head * D;
        for (int64_t d = 0; d < D; d++) to[d] = row[d] / row[D];
      }
    }
  });
  return out;
}

// The rows of a head in the state of a stream: where each lies, the log of its weight and its mean value. Those without a key come last;
// their weight is -infinity and their place NOWHERE.
struct Rows {
  static constexpr float NOWHERE = 2;
  float *place, *weight, *value;
  int64_t count, D;

  // Makes one row of each row i for which apart(i) is false and of those before it down to the last that is apart.
  template <typename F>
  void join(F apart) {
    std::vector<double> mean(D);
    int64_t to = 0;
    for (int64_t start = 0, stop; start < count; start = stop, to++) {
      for (stop = start + 1; stop < count && !apart(stop); stop++) {}
      const float most = *std::max_element(weight + start, weight + stop);
      if (most == -INFINITY) break;
      double mass = 0, moment = 0;
      std::fill(mean.begin(), mean.end(), 0);
      for (int64_t i = start; i < stop; i++) {
        const double m = std::exp((double)weight[i] - most);
        mass += m, moment += m * place[i];
        for (int64_t d = 0; d < D; d++) mean[d] += m * value[i * D + d];
      }
      place[to] = moment / mass, weight[to] = most + std::log(mass);
      for (int64_t d = 0; d < D; d++) value[to * D + d] = mean[d] / mass;
    }
    std::fill(place + to, place + count, NOWHERE);
    std::fill(weight + to, weight + count, -INFINITY);
  }

  // Joins rows until at most N are left: those of one cell, then those that will be missed least.
  void compress(int64_t N, double cells, double temperature) {
    Sorting sorted(place, count, D);
    sorted(place, 1), sorted(weight, 1), sorted(value, D);
    std::vector<double> cell(count);
    for (int64_t i = 0; i < count; i++) cell[i] = std::min(std::floor(place[i] * cells), cells - 1) + (weight[i] == -INFINITY);
    join([&](int64_t i) { return cell[i] != cell[i - 1]; });
    const int64_t left = std::find(weight, weight + count, -INFINITY) - weight;
    if (left <= N) return;
    std::vector<int64_t> order(left - 1);  // of the rows but the last
    std::vector<double> gap(left - 1), missed(left - 1);
    for (int64_t i = 0; i < left - 1; i++) {
      gap[i] = (double)place[i + 1] - place[i];
      missed[i] = std::fmax(-INFINITY, weight[i] + std::log(gap[i] / (gap[i] + temperature)));  // log of what a query there would miss
    }
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + (left - N - 1), order.end(),
                     [&](int64_t i, int64_t j) { return missed[i] != missed[j] ? missed[i] < missed[j] : i < j; });
    std::vector<char> joined(count);
    for (int64_t n = 0; n < left - N; n++) weight[order[n]] -= gap[order[n]] / temperature, joined[order[n] + 1] = 1;
    join([&](int64_t i) { return !joined[i]; });
  }
};

// stream() of stream.py, which describes the arguments; log_decay, bias, temperature, cells, passed and sink are float64, the rest float32.
at::Tensor stream(const at::Tensor& lambda_q, const at::Tensor& lambda_k, const at::Tensor& v, const at::Tensor& log_decay,
                  const at::Tensor& bias, const at::Tensor& temperature, const at::Tensor& cells, at::Tensor place, at::Tensor weight,
                  at::Tensor value, at::Tensor passed, const Maybe& sink, int64_t length) {
  const int64_t B = v.size(0), Hkv = v.size(1), T = v.size(2), D = v.size(3), H = lambda_q.size(1), N = place.size(2) - RECENT;
  auto out = at::empty({B, H, T, D}, v.options());
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> total(D + 1);
    std::vector<double> logits(N + RECENT);
    for (int64_t head = begin; head < end; head++) {
      const int64_t b = head / H, h = head % H, k = b * Hkv + h / (H / Hkv);
      const double width = temperature.const_data_ptr<double>()[h], sharpness = 1 / width;
      Rows rows{of<float>(place, b, h), of<float>(weight, b, h), of<float>(value, b, h), N + RECENT, D};
      double& since = passed.data_ptr<double>()[head];
      for (int64_t t = 0; t < T; t++) {
        const double query = lambda_q.const_data_ptr<float>()[head * T + t];
        const int64_t recent = (length + t) % RECENT, stop = N + recent + 1;
        since += log_decay.const_data_ptr<double>()[head * T + t];
        rows.place[stop - 1] = lambda_k.const_data_ptr<float>()[k * T + t];
        rows.weight[stop - 1] = bias.const_data_ptr<double>()[k * T + t] - since;
        std::copy_n(v.const_data_ptr<float>() + (k * T + t) * D, D, rows.value + (stop - 1) * D);

        for (int64_t i = 0; i < stop; i++) logits[i] = rows.weight[i] - std::abs(query - rows.place[i]) * sharpness;
        const double most = *std::max_element(logits.begin(), logits.begin() + stop);
        std::fill(total.begin(), total.end(), 0);
        Sum sum{total.data(), D, most};
        for (int64_t i = 0; i < stop; i++)
          if (logits[i] > most - 60) sum.add(rows.value + i * D, logits[i]);
        if (sink) total[D] += sum.rescaled(sink->const_data_ptr<double>()[h] - since);
        float* to = out.data_ptr<float>() + (head * T + t) * D;
        for (int64_t d = 0; d < D; d++) to[d] = total[d] / total[D];

        if (recent == RECENT - 1) {
          for (int64_t i = 0; i < stop; i++) rows.weight[i] += since;
          since = 0;
          rows.compress(N, cells.const_data_ptr<double>()[h], width);
        }
      }
    }
  });
  return out;
}

// x (B, T, H, D), laplacian (H, D, D) -> model.energy(), (B, T, H)
at::Tensor energy(const at::Tensor& x, const at::Tensor& laplacian, double eps) {
  const int64_t H = x.size(2), D = x.size(3);
  const at::Tensor rows = x.contiguous(), matrices = laplacian.contiguous();
  auto E = at::empty({x.size(0), x.size(1), H}, x.options());
  std::vector<float> Lx(D);
  for (int64_t r = 0; r < E.numel(); r++) {
    const float *row = rows.const_data_ptr<float>() + r * D, *L = matrices.const_data_ptr<float>() + r % H * D * D;
    std::fill(Lx.begin(), Lx.end(), 0);
    for (int64_t d = 0; d < D; d++)
      for (int64_t e = 0; e < D; e++) Lx[e] += row[d] * L[d * D + e];
    float above = 0, below = eps;
    for (int64_t d = 0; d < D; d++) above += Lx[d] * row[d], below += row[d] * row[d];
    E.data_ptr<float>()[r] = std::max(above, 0.0f) / below;
  }
  return E;
}

}  // namespace

TORCH_LIBRARY(tauformer_decode, library) {
  library.def("seal(Tensor(a!) lambda_k, Tensor(b!) weight, Tensor(c!) v, Tensor(d!) sums, Tensor(e!) scales, Tensor temperature, "
              "int start, int stop) -> ()", &seal);
  library.def("attend(Tensor lambda_q, Tensor lambda_k, Tensor v, Tensor? log_decay, Tensor? bias, Tensor(a!) lambdas, "
              "Tensor(b!) weight, Tensor(c!) values, Tensor sums, Tensor scales, Tensor temperature, Tensor ends, Tensor(d!) now, "
              "Tensor? sink, int length) -> Tensor", &attend);
  library.def("energy(Tensor x, Tensor laplacian, float eps) -> Tensor", &energy);
  library.def("stream(Tensor lambda_q, Tensor lambda_k, Tensor v, Tensor log_decay, Tensor bias, Tensor temperature, Tensor cells, "
              "Tensor(a!) place, Tensor(b!) weight, Tensor(c!) value, Tensor(d!) passed, Tensor? sink, int length) -> Tensor", &stream);
}
