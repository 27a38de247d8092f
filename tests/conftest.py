"""Shared by every test: one build folder for native test modules, and torch left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from torchlin import registry

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def build_folder() -> Path:
    """Where native modules that only tests need are compiled; kept, so that the next run finds them done."""
    folder = ROOT / "build" / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with all that is registered, whose additions end with the test."""
    registry.names("transform")  # loads the plug-ins first
    entries = {kind: dict(table) for kind, table in registry._entries.items()}
    monkeypatch.setattr(registry, "_entries", entries)
