"""What a language model is worth before and after: perplexity on text, decoding speed, a sentence."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from torchlin._console import progress

_DATA_SETS = ("iris", "wine", "breast_cancer", "digits", "diabetes")


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, what: str = "perplexity") -> float:
    """exp of the mean over windows of their mean next-token loss.

    Args:
        model: a causal language model of transformers.
        windows: token ids (windows, tokens).
        what: said beside the progress bar.
    """
    losses = [
        float(model(input_ids=window[None], labels=window[None], use_cache=False).loss)
        for window in progress(list(windows), what)
    ]
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def tokens_per_second(model: Any, prompt: Tensor, *, count: int = 24, repeats: int = 3) -> float:
    """Greedy decoding of one sequence with a cache, by the clock; the prompt's own time left out.

    Args:
        model: a causal language model of transformers.
        prompt: token ids (tokens,).
        count: tokens to decode in each of `repeats` runs, whose median counts.
    """
    speeds = []
    for _ in range(repeats):
        out = model(input_ids=prompt[None], use_cache=True)
        begun = time.perf_counter()
        for _ in range(count):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        speeds.append(count / (time.perf_counter() - begun))
    return median(speeds)


@torch.no_grad()
def continuation(model: Any, prompt: Tensor, count: int = 24) -> Tensor:
    """The `count` tokens that greedy decoding puts after a prompt (tokens,)."""
    mask = torch.ones_like(prompt)[None]
    ids = model.generate(
        prompt[None], attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return ids[0, len(prompt) :]


def text_windows(
    encode: Callable[[str], Tensor], text: str | None = None, windows: int = 8, window: int = 512
) -> Tensor:
    """Token ids (windows, tokens) of a text, its start; as many windows as it fills.

    Args:
        encode: text to token ids (tokens,).
        text: by default scikit-learn's descriptions of its data sets: prose, tables and references.

    Raises:
        ValueError: the text does not fill one window.
        ModuleNotFoundError: no text was given, and scikit-learn is not installed.
    """
    if text is None:
        from sklearn import datasets

        text = "\n".join(getattr(datasets, f"load_{name}")().DESCR for name in _DATA_SETS)
    ids = encode(text)
    windows = min(windows, len(ids) // window)
    if windows == 0:
        raise ValueError(f"text must fill a window of {window} tokens, got {len(ids)} tokens")
    return ids[: windows * window].view(windows, window)


def load_language_model(path: Path, dtype: torch.dtype | str = "auto") -> tuple[nn.Module, Any]:
    """Model (eval) and tokenizer out of a checkpoint folder, or out of a GGUF file or a folder that holds one.

    Raises:
        ValueError: there is no such folder or file, or no model in it.
        ModuleNotFoundError: transformers, or what it needs for GGUF, is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    if not (path / "config.json").is_file() and len(files) != 1:
        raise ValueError(f"{path}: no config.json, and {len(files)} GGUF files instead of one")
    gguf: dict[str, Any] = {}
    if not (path / "config.json").is_file():
        path, gguf = files[0].parent, {"gguf_file": files[0].name}
        dtype = torch.float32 if dtype == "auto" else dtype  # what the file holds are integers
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **gguf)
    return model.eval(), AutoTokenizer.from_pretrained(path, **gguf)
