// y = x W'^T + b: every row of the weight is made in a buffer that stays in cache and multiplied with all rows of x.

TORCHLIN_INLINE int64_t padded(const grid::Linear& job) {
  constexpr int64_t W = 4 * kLanes<float>;
  return (job.weight.count * job.weight.p + W - 1) / W * W;
}

inline int64_t linear_prepared(const grid::Linear& job) { return job.batch * padded(job); }

// x as floats, rows padded with zeros to whole steps of the dot product.
template <class T>
void linear_prepare(const grid::Linear& job, float* ready) {
  const int64_t k = job.weight.in, width = padded(job);
  for (int64_t b = 0; b < job.batch; ++b) {
    const T* x = static_cast<const T*>(job.x) + b * k;
    float* to = ready + b * width;
    for (int64_t i = 0; i < k; ++i) to[i] = load_one(x + i);
    for (int64_t i = k; i < width; ++i) to[i] = 0;
  }
}

TORCHLIN_INLINE float sum_lanes(V<float> v) {
  float sum = 0;
  for (int i = 0; i < kLanes<float>; ++i) sum += v[i];
  return sum;
}

TORCHLIN_INLINE float dot(const float* a, const float* b, int64_t width) {
  constexpr int W = kLanes<float>;
  V<float> sums[4] = {};
  for (int64_t i = 0; i < width; i += 4 * W) {
    unroll<4>([&](int j) __attribute__((always_inline)) { sums[j] += load(a + i + j * W) * load(b + i + j * W); });
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
void linear_rows(const grid::Linear& job, int64_t begin, int64_t end) {
  const grid::Weight& w = job.weight;
  const int64_t width = padded(job);
  uint16_t* codes = grid::Scratch::get<uint16_t>(grid::Purpose::kCodes, w.count);
  float* row = grid::Scratch::get<float>(grid::Purpose::kRow, width);
  for (int64_t i = w.count * w.p; i < width; ++i) row[i] = 0;
  for (int64_t r = begin; r < end; ++r) {
    dequantize_row(w, r, codes, row);
    const float bias = job.bias == nullptr ? 0 : load_one(static_cast<const T*>(job.bias) + r);
    for (int64_t b = 0; b < job.batch; ++b) {
      store_one(static_cast<T*>(job.y) + b * w.out + r, dot(row, job.ready + b * width, width) + bias);
    }
  }
}

template <class T>
constexpr grid::LinearKernel linear_kernel_of() {
  return {&linear_prepared, &linear_prepare<T>, &linear_rows<T>};
}
