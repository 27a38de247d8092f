"""Compiles a C++ source at run time, once: the shared library stays in a folder that only its owner can write to.

A library's file name is a hash of everything that went into it. Its last bytes are a digest of the rest, so that a file
that was cut short or altered is compiled again, not loaded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# Those of setup.py: a formula that is compiled here gets the bits that it would get there.
_FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
    "-ffp-contract=fast", "-w",
)  # fmt: skip
_MAGIC = b"torchlin"
_TIMEOUT = 60.0  # seconds


class CompileError(RuntimeError):
    """A source that was not compiled; the message has the reason, or what the compiler said."""


def headers() -> Path:
    """The folder of the C++ headers: in the package where torchlin was installed from a wheel, else that of the source tree."""
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "simd" / "simd.h").is_file():
            return folder
    raise CompileError("torchlin's C++ headers were not installed with it")


def cache_folder() -> Path:
    """`TORCHLIN_CACHE`, or the user's folder for such files."""
    if chosen := os.environ.get("TORCHLIN_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path is to be ignored
        base = str(Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache").expanduser())
    return Path(base) / "torchlin"


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler as the first words of a command: `CXX`, or what is called c++, g++ or clang++.

    Raises:
        CompileError: there is none.
    """
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise CompileError(f"CXX={os.environ['CXX']}: there is no program {chosen[0]!r}")
        return tuple(chosen)
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise CompileError("no C++ compiler: none of c++, g++ and clang++ is on PATH, and CXX is not set")
    return (found,)


def shared_library(stem: str, files: Mapping[str, str]) -> Path:
    """The compiled form of source files, the first of which includes the others and torchlin's headers; from the cache
    where that has it.

    Raises:
        CompileError: no compiler, one that fails or takes too long, or a cache folder that is not safe to load code from.
    """
    compiler = find_compiler()
    command = (*compiler, *_FLAGS)

    def make(work: Path) -> bytes:
        library = work / "library.so"
        for name, text in files.items():
            Path(work, name).write_text(text, encoding="utf-8")
        first = str(Path(work, next(iter(files))))
        done = _run((*command, f"-I{headers()}", f"-I{work}", first, "-o", str(library)))
        if done.returncode != 0 or not library.is_file():
            raise CompileError(f"{command[0]} fails: {_said(done)}")
        return library.read_bytes()

    machine = platform.machine()  # a home can be shared by machines of several kinds
    parts = (machine, *files, *files.values(), headers_text(), _version(compiler), *command)
    return cached(stem, ".so", parts, make)


def cached(stem: str, suffix: str, parts: Iterable[str], make: Callable[[Path], bytes]) -> Path:
    """The file of the cache for these parts; made, in a folder to work in, if it is not there or not as it was written."""
    folder = _private_folder()
    path = folder / f"{stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}{suffix}"
    if content(path) is None:
        with _lock(path.with_suffix(".lock")):
            if content(path) is None:  # by another process, while this one waited
                _write(path, make)
    return path


def content(path: Path) -> bytes | None:
    """What was written to a file of the cache; None if it is not there, or was cut short, altered or written by others."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
                return None
            whole = file.read()
    except OSError:
        return None
    tail = len(_MAGIC) + hashlib.sha256().digest_size
    return whole[:-tail] if whole[-tail:] == _sealed(whole[:-tail]) else None


def _sealed(content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(content).digest()


def _write(path: Path, make: Callable[[Path], bytes]) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as work:
            made = make(Path(work))
            file = Path(work) / path.name
            file.touch(mode=0o700)
            file.write_bytes(made + _sealed(made))
            file.replace(path)  # in one step: another process sees the whole file or none
    except OSError as error:
        raise CompileError(f"cannot write to the cache folder {path.parent}: {error}") from error


@functools.cache
def headers_text() -> str:
    """All that a source may include."""
    folders = (headers() / name for name in ("activation", "gpu", "simd"))
    files = sorted(path for folder in folders for path in folder.glob("*.*h"))
    return "\0".join(f"{path.name}\0{path.read_text(encoding='utf-8')}" for path in files)


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    done = _run((*compiler, "--version"))
    if done.returncode != 0:
        raise CompileError(f"{shlex.join(compiler)} --version fails: {_said(done)}")
    return done.stdout


def _run(command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CompileError(f"{command[0]} took longer than {_TIMEOUT:g} s") from None
    except OSError as error:
        raise CompileError(f"{command[0]} does not start: {error}") from error


def _said(done: subprocess.CompletedProcess[str]) -> str:
    text = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
    return "\n".join([*text[:20], "..."] if len(text) > 20 else text)


def _private_folder() -> Path:
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve()
        if not os.access(folder, os.W_OK):
            raise CompileError(
                f"the cache folder {folder} cannot be written to: set TORCHLIN_CACHE to one that can"
            )
        for place in (folder, *folder.parents):
            info = place.stat()
            # Others may write beside, where the sticky bit keeps them from what is not theirs (/tmp), but not into it.
            others = 0o022 if place == folder else 0 if info.st_mode & stat.S_ISVTX else 0o002
            if info.st_mode & others or (place == folder and info.st_uid != os.geteuid()):
                raise CompileError(
                    f"the cache folder {folder} is not safe to load code from: others can write to {place}; "
                    "take that right away (chmod go-w), or set TORCHLIN_CACHE to a folder of your own"
                )
    except OSError as error:
        raise CompileError(
            f"no cache folder: {error}; set TORCHLIN_CACHE to one that can be written to"
        ) from error
    return folder


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keeps two processes from compiling the same at once. Where files cannot be locked, both do; neither harms the other."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except (ImportError, OSError):
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)
