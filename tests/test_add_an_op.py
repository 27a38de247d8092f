"""docs/add-an-op.md is true: its files build with setup.py, pass the battery, and are noticed if they do not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "add-an-op.md"
BLOCK = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# What a family stands on. The other families stay behind: the page's is built alone, in seconds.
COPIED = (
    "setup.py", "csrc/core", "csrc/simd", "csrc/gpu", "torchlin/_library.py", "torchlin/_console.py",
    "torchlin/registry.py", "torchlin/ops/__init__.py", "torchlin/ops/_checks.py", "benchmarks/__init__.py",
    "benchmarks/harness.py", "benchmarks/machine.py", "tests/battery.py", "tests/conftest.py", "tests/simt",
)  # fmt: skip
WRITTEN = {
    "pyproject.toml": '[build-system]\nrequires = ["setuptools"]\n[tool.pytest.ini_options]\ntestpaths = ["tests"]\n',
    "torchlin/__init__.py": "",
    "torchlin/functional.py": "from torchlin.ops.softsign import softsign_scale\n",
    "torchlin/nn/__init__.py": "",
}


def blocks() -> dict[str, str]:
    found = BLOCK.findall(PAGE.read_text())
    assert len(found) == len(dict(found)), "a file is on the page twice"
    return dict(found)


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder), "TORCH_CUDA_ARCH_LIST": "9.0", **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:  # ninja looks at the time
            path.write_text(text)


def copy(names: Sequence[str], folder: Path) -> None:
    for name in names:
        files = sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]
        for path in files:
            target = folder / path.relative_to(ROOT)
            if path.is_file() and "__pycache__" not in path.parts:
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists() or target.read_bytes() != path.read_bytes():
                    shutil.copyfile(path, target)


def test_page_is_within_the_line_length() -> None:
    long = [
        f"{name}: {line}" for name, text in blocks().items() for line in text.splitlines() if len(line) > 110
    ]
    assert not long, "\n".join(long)


@pytest.fixture(scope="module")
def tree(build_folder: Path) -> Path:
    """A source tree with the page's family in it, built. Kept: the next run compiles only what changed."""
    folder = build_folder / "add_an_op"
    copy(COPIED, folder)
    write(folder, WRITTEN)
    write(folder, blocks())
    package = folder / "torchlin" / "benchmarks"
    if not package.is_symlink():
        package.symlink_to("../benchmarks")
    built = run(folder, "setup.py", "-q", "build_ext", "--inplace")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning" not in built.stderr, built.stderr
    return folder


def test_page_has_the_files_of_its_table() -> None:
    page = PAGE.read_text()
    rows = re.findall(r"^\| (\d) \| (.*?) \|", page, re.MULTILINE)
    assert [step for step, _ in rows] == list("12345")
    assert [title[0] for title in re.findall(r"^## (.*)", page, re.MULTILINE)] == list("12345")
    named = {Path(name).name for _, cell in rows for name in re.findall(r"`(\S+?)`", cell)}
    assert named - {"softsign.md"} <= {Path(name).name for name in blocks()}


def test_page_passes_the_battery(tree: Path) -> None:
    tests = run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_softsign.py")
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr
    assert "passed" in tests.stdout
    for check in ("skipped", "failed", "error"):
        assert check not in tests.stdout.splitlines()[-1], tests.stdout[-4000:]


def test_forgotten_family_is_noticed(tree: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, 'tests'); import battery, torchlin.nn.softsign as s; s.register()\n"
    )
    script += (
        "from torchlin import registry; names = [('activation', n) for n in registry.names('activation')]\n"
    )
    script += "ops = [n for n in battery.registered_ops() if 'softsign' in n]\n"
    script += "print(*battery.uncovered(battery.families() if COVERED else [], ops, names), sep='\\n')\n"
    said = run(tree, "-c", script.replace("COVERED", "False")).stdout
    for forgotten in ("torchlin::_softsign_scale_fwd", "torchlin::_softsign_scale_bwd", "'softsign_scale'"):
        assert re.search(f"{forgotten} has no samples", said), said
    said = run(tree, "-c", script.replace("COVERED", "True")).stdout
    assert "softsign" not in said, said


def test_page_fails_when_its_kernel_is_wrong(tree: Path, tmp_path: Path) -> None:
    """The battery on the page is the real one: a wrong sign in the backward kernel of one file is found."""
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken, symlinks=True, ignore=shutil.ignore_patterns("build", "*.so", "*.cu"))
    kernel = broken / "csrc" / "softsign" / "kernel_cpu.h"
    text = kernel.read_text()
    assert text.count("return g * s / (d * d);") == 1
    kernel.write_text(text.replace("return g * s / (d * d);", "return g * s / d;"))
    built = run(broken, "setup.py", "-q", "build_ext", "--inplace", TORCHLIN_CUDA="0")
    assert built.returncode == 0, built.stderr
    tests = run(
        broken,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_softsign.py",
        "-k",
        "gradient or value",
    )
    assert tests.returncode == 1, tests.stdout[-2000:]
    assert "gradient/float32/3x13" in tests.stdout
    assert not re.search(r"FAILED.*/value/", tests.stdout)


def test_page_examples_and_benchmark_run(tree: Path, tmp_path: Path) -> None:
    examples = "import doctest, torch, torchlin.ops.softsign as o, torchlin.nn.softsign as n\n"
    examples += "print(sum(doctest.testmod(m).failed for m in (o, n)), doctest.testmod(o).attempted)"
    assert run(tree, "-c", examples).stdout.split() == ["0", "1"]
    script = (
        f"from torchlin.benchmarks.bench_softsign import main; main(['--quick', '--out', {str(tmp_path)!r}])"
    )
    bench = run(tree, "-c", script)
    assert bench.returncode == 0, bench.stderr
    assert "plain torch" in bench.stdout
    assert (tmp_path / "softsign.csv").read_text().count("softsign_scale") == 2
