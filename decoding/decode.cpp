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
// From a state. [0, 1) is cut into bins with centres x. A bin keeps, of the keys that fell into it,
//     U = sum_j exp((lambda_j - x) / temperature + w_j) v'_j     and     W = sum_j exp((x - lambda_j) / temperature + w_j) v'_j.
// A query takes all bins below its own from U and all above from W, exactly. In its own bin neither form is right for all keys;
// it takes the sum of both times the factor that is right on average for keys spread evenly over the bin.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <vector>

namespace {

constexpr int64_t SEGMENT = 128, BLOCK = 16;
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
    std::vector<int64_t> order(n);
    std::vector<float> moved(n * D), row(D + 1);
    for (int64_t g = first; g < last; g++) {
      const int64_t b = g / Hkv, k = g % Hkv;
      float *lambda = of<float>(lambda_k, b, k) + start, *values = of<float>(v, b, k) + start * D;
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return lambda[i] < lambda[j]; });
      auto sorted = [&](float* x, int64_t width) {
        for (int64_t i = 0; i < n; i++) std::copy_n(x + order[i] * width, width, moved.data() + i * width);
        std::copy_n(moved.data(), n * width, x);
      };
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

// The next T tokens of each head, one after the other: lambda_q (B, H, T), lambda_k (B, Hkv, T), v (B, Hkv, T, D), log_decay
// (B, H, T) and bias (B, Hkv, T) float64, temperature (H) float64, first (H + 1) int64: head h has the bins first[h] .. first[h + 1]
// of state (B, bins, 2, D + 1), whose rows are in units of exp(scale), (B, H) float64; sink as above. Stores each key and then attends:
// -> out (B, H, T, D)
at::Tensor stream(const at::Tensor& lambda_q, const at::Tensor& lambda_k, const at::Tensor& v, const at::Tensor& log_decay,
                  const at::Tensor& bias, const at::Tensor& temperature, const at::Tensor& first, at::Tensor state, at::Tensor scale,
                  const Maybe& sink) {
  constexpr double MOST = 30;  // the greatest log weight, relative to scale: beyond it the state is rescaled
  constexpr float LEAST = 1e-30;  // the least weight of a bin that counts
  const int64_t B = v.size(0), Hkv = v.size(1), T = v.size(2), D = v.size(3), H = lambda_q.size(1);
  auto out = at::empty({B, H, T, D}, v.options());
  at::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> total(D + 1);
    for (int64_t head = begin; head < end; head++) {
      const int64_t b = head / H, h = head % H, k = b * Hkv + h / (H / Hkv);
      const int64_t offset = first.const_data_ptr<int64_t>()[h], bins = first.const_data_ptr<int64_t>()[h + 1] - offset;
      const double sharpness = 1 / temperature.const_data_ptr<double>()[h], width = 1.0 / bins;
      float* rows = state.data_ptr<float>() + (b * state.size(1) + offset) * 2 * (D + 1);
      double& log_scale = scale.data_ptr<double>()[head];
      auto bin_of = [&](double x) { return std::clamp<int64_t>(x * bins, 0, bins - 1); };
      auto center = [&](int64_t bin) { return (bin + 0.5) * width; };
      auto row_of = [&](int64_t bin, int64_t side) { return rows + (2 * bin + side) * (D + 1); };

      for (int64_t t = 0; t < T; t++) {
        const double key = lambda_k.const_data_ptr<float>()[k * T + t], query = lambda_q.const_data_ptr<float>()[head * T + t];
        const double log_weight = bias.const_data_ptr<double>()[k * T + t];
        log_scale += log_decay.const_data_ptr<double>()[head * T + t];
        if (log_weight - log_scale > MOST) {
          const float down = std::exp(log_scale - log_weight);
          for (int64_t i = 0; i < bins * 2 * (D + 1); i++) rows[i] *= down;
          log_scale = log_weight;
        }
        const int64_t into = bin_of(key);
        const double x = (key - center(into)) * sharpness;
        const float* value = v.const_data_ptr<float>() + (k * T + t) * D;
        for (int64_t side = 0; side < 2; side++) {
          const float weight = std::exp((side ? -x : x) + log_weight - log_scale);
          float* row = row_of(into, side);
          for (int64_t d = 0; d < D; d++) row[d] += weight * value[d];
          row[D] += weight;
        }

        const int64_t own = bin_of(query);
        auto distance = [&](int64_t bin) { return bin == own ? 0 : std::abs(query - center(bin)) * sharpness; };
        double most = -INFINITY;  // about the log of the heaviest bin's weight: all are relative to it, so that not all underflow
        for (int64_t bin = 0; bin < bins; bin++)
          if (const float held = row_of(bin, 0)[D]; held > LEAST) most = std::max(most, std::ilogb(held) * M_LN2 - distance(bin));
        std::fill(total.begin(), total.end(), 0);
        auto take = [&](int64_t bin, int64_t side, double log_weight) {
          const float weight = std::exp(log_weight - most), *row = row_of(bin, side);
          for (int64_t d = 0; d <= D; d++) total[d] += weight * row[d];
        };
        for (int64_t bin = 0; bin < bins; bin++)
          if (bin != own && row_of(bin, 0)[D] > LEAST && -distance(bin) > most - 80) take(bin, bin > own, -distance(bin));
        if (row_of(own, 0)[D] > LEAST) {
          const double below = (query - own * width) * sharpness, above = width * sharpness - below;  // parts of the bin
          const double factor = std::log((2 - std::exp(-below) - std::exp(-above)) / (2 * std::sinh(below) + 2 * std::sinh(above)));
          take(own, 0, factor + (center(own) - query) * sharpness);
          take(own, 1, factor + (query - center(own)) * sharpness);
        }
        if (sink) total[D] += std::exp(sink->const_data_ptr<double>()[h] - most - log_scale);
        float* to = out.data_ptr<float>() + (head * T + t) * D;
        for (int64_t d = 0; d < D; d++) to[d] = total[d] / total[D];
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
  library.def("stream(Tensor lambda_q, Tensor lambda_k, Tensor v, Tensor log_decay, Tensor bias, Tensor temperature, Tensor first, "
              "Tensor(a!) state, Tensor(b!) scale, Tensor? sink) -> Tensor", &stream);
}
