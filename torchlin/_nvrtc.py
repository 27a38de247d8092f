"""Compiles CUDA C++ at run time with NVRTC, which every CUDA build of torch brings along: no toolkit is needed, and no GPU."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from torchlin._compile import CompileError

# NVRTC comes without a standard library and without GCC's builtins. This is what torchlin's kernels use of them.
_STANDARD = {
    "cstddef": """\
#pragma once
namespace std { using size_t = decltype(sizeof 0); }
#define __builtin_huge_valf() __builtin_bit_cast(float, 0x7f800000)
#define __builtin_nanf(text) __builtin_bit_cast(float, 0x7fc00000)
""",
    "cstdint": """\
#pragma once
using int16_t = short; using uint16_t = unsigned short;
using int32_t = int; using uint32_t = unsigned;
using int64_t = long long; using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
""",
    "type_traits": """\
#pragma once
namespace std {
template <class T, T v> struct integral_constant {
  static constexpr T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <bool, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool c, class T, class F> using conditional_t = typename conditional<c, T, F>::type;
template <bool, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool c, class T = void> using enable_if_t = typename enable_if<c, T>::type;
template <class T, class U> struct is_same : false_type {};
template <class T> struct is_same<T, T> : true_type {};
template <class T, class U> inline constexpr bool is_same_v = is_same<T, U>::value;
}
""",
    "utility": """\
#pragma once
namespace std {
template <class T, T... i> struct integer_sequence {};
template <int n, int... i> struct make_sequence : make_sequence<n - 1, n - 1, i...> {};
template <int... i> struct make_sequence<0, i...> { using type = integer_sequence<int, i...>; };
template <class T, T n> using make_integer_sequence = typename make_sequence<n>::type;
}
""",
}


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC itself.

    Raises:
        CompileError: this torch is built without CUDA, or NVRTC is not where torch looks for it.
    """
    if torch.version.cuda is None:
        raise CompileError("this torch is built without CUDA")
    return load(f"libnvrtc.so.{torch.version.cuda.split('.')[0]}")


def load(name: str) -> ctypes.CDLL:
    """A library that torch has loaded, that the system finds, or that a package has beside torch."""
    packages = Path(torch.__file__).parents[1]
    for builtins in packages.glob("nvidia/*/lib/libnvrtc-builtins.so.*"):  # NVRTC asks for it by name only
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(builtins))
    problem: OSError | None = None
    for place in (name, *map(str, packages.glob(f"nvidia/*/lib/{name}"))):
        try:
            found = ctypes.CDLL(place)
        except OSError as error:
            problem = error
            continue
        found.nvrtcGetErrorString.restype = ctypes.c_char_p
        return found
    raise CompileError(f"NVRTC is missing: {problem}") from problem


def version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"NVRTC {major.value}.{minor.value}"


def compile(files: Mapping[str, str], options: Sequence[str], architecture: str) -> bytes:
    """The machine code of a source, the first of the files, which can include the others.

    Args:
        architecture: "sm_90" for the code of such a GPU, "compute_90" for PTX, which the driver translates.

    Raises:
        CompileError: with what NVRTC says.
    """
    nvrtc = library()
    name, source = next(iter(files.items()))
    headers = {**_STANDARD, **files}
    count = len(headers)
    program = ctypes.c_void_p()
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            count,
            (ctypes.c_char_p * count)(*(text.encode() for text in headers.values())),
            (ctypes.c_char_p * count)(*(name.encode() for name in headers)),
        )
    )
    try:
        given = [f"--gpu-architecture={architecture}", "--std=c++17", "-default-device", *options]
        array = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
        if nvrtc.nvrtcCompileProgram(program, len(given), array) != 0:
            raise CompileError(
                f"NVRTC fails: {_output(program, 'ProgramLog').decode(errors='replace').strip()}"
            )
        return _output(program, "CUBIN" if architecture.startswith("sm_") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _output(program: ctypes.c_void_p, what: str) -> bytes:
    nvrtc, size = library(), ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return text.raw.rstrip(b"\0") if what == "ProgramLog" else text.raw


def _check(status: int) -> None:
    if status != 0:
        raise CompileError(f"NVRTC fails: {library().nvrtcGetErrorString(status).decode()}")
