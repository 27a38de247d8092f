// Between strided data of a storage type and dense blocks of its compute type, at the level being compiled.

template <class S>
void gather(const void* source, int64_t step, int64_t n, void* target) {
  using C = compute_of<S>;
  const S* from = static_cast<const S*>(source);
  C* to = static_cast<C*>(target);
  if (step == 1) {
    const int64_t whole = n - n % kLanes<C>;
    for (int64_t i = 0; i < whole; i += kLanes<C>) store(to + i, load(from + i));
    for (int64_t i = whole; i < n; ++i) to[i] = load_one(from + i);
  } else if (step == 0) {
    std::fill(to, to + n, load_one(from));
  } else if (step == 2) {
    for (int64_t i = 0; i < n; ++i) to[i] = load_one(from + 2 * i);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = load_one(from + i * step);
  }
}

template <class S>
void scatter(const void* source, int64_t step, int64_t n, void* target) {
  using C = compute_of<S>;
  const C* from = static_cast<const C*>(source);
  S* to = static_cast<S*>(target);
  if (step == 1) {
    const int64_t whole = n - n % kLanes<C>;
    for (int64_t i = 0; i < whole; i += kLanes<C>) store(to + i, load(from + i));
    if (whole < n) store_n(to + whole, load_n(from + whole, n - whole), n - whole);
  } else {
    for (int64_t i = 0; i < n; ++i) store_one(to + i * step, from[i]);
  }
}

const activation::Copies kCopies[] = {{gather<float>, scatter<float>},
                                      {gather<double>, scatter<double>},
                                      {gather<f16>, scatter<f16>},
                                      {gather<bf16>, scatter<bf16>}};
