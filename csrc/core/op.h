// Registration and checks for every op. The stable ABI hands a kernel 64-bit slots: a `float` or `int` parameter compiles
// and silently reads garbage, so TORCHLIN_IMPL refuses every parameter type that the ABI does not really carry.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

namespace torchlin {

using torch::stable::Tensor;

namespace detail {

template <class T>
using bare_t = std::remove_cv_t<std::remove_reference_t<T>>;

template <class T>
struct is_optional : std::false_type {};
template <class T>
struct is_optional<std::optional<T>> : std::true_type {};

template <class T>
constexpr bool is_plain_abi_type = std::is_same_v<T, Tensor> || std::is_same_v<T, double> || std::is_same_v<T, int64_t> ||
                                   std::is_same_v<T, bool> || std::is_same_v<T, std::string> ||
                                   std::is_same_v<T, std::string_view> || std::is_same_v<T, std::vector<int64_t>> ||
                                   std::is_same_v<T, std::vector<double>> || std::is_same_v<T, std::vector<Tensor>>;

template <class T>
constexpr bool is_abi_type() {
  if constexpr (is_optional<T>::value) {
    return is_plain_abi_type<typename T::value_type>;
  } else {
    return is_plain_abi_type<T>;
  }
}

template <class T>
struct kernel_signature;
template <class R, class... A>
struct kernel_signature<R (*)(A...)> {
  static constexpr bool supported = (is_abi_type<bare_t<A>>() && ...);
};

}  // namespace detail
}  // namespace torchlin

// m.impl(name, boxed fn), for parameter types that survive boxing: Tensor, double, int64_t, bool, strings, lists, optionals.
#define TORCHLIN_IMPL(m, name, fn)                                                                                   \
  static_assert(::torchlin::detail::kernel_signature<decltype(&fn)>::supported,                                      \
                "an op kernel may take Tensor, double, int64_t, bool, std::string(_view), std::vector<int64_t|double|" \
                "Tensor> and std::optional of these; float and int are read wrongly by the stable ABI");             \
  (m).impl(name, TORCH_BOX(&fn))

// The second line of defence: Python has already refused bad input with an error that names the argument.
#define TORCHLIN_CHECK(cond, ...) STD_TORCH_CHECK(cond, "torchlin: ", __VA_ARGS__)
