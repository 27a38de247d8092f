"""`torchlin quantize` from end to end on a small model, and what it measures by."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from torchlin.cli import main
from torchlin.quant import load
from torchlin.quant.evaluate import continuation, perplexity, text_windows, tokens_per_second

transformers = pytest.importorskip("transformers")
TEXT = "the quick brown fox jumps over the lazy dog " * 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer of words, as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("checkpoint")
    words = {word: i for i, word in enumerate(["<unk>", *sorted(set(TEXT.split()))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_quantizes_measures_and_saves(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "small"
    text = str(checkpoint / "text.txt")
    assert (
        main(["quantize", str(checkpoint), "--bits", "4", "--out", str(out), "--text", text, "--layers"]) == 0
    )
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in printed
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines() if line}
    before, after = (
        float(rows["float32"][-2]),
        float(next(r for k, r in rows.items() if "bits" in k and len(r) < 8)[-2]),
    )
    assert before > 1
    assert abs(after / before - 1) < 0.05, "4 bits changed a random model's perplexity"
    model = load(out)
    windows = text_windows(_encoder(out), TEXT)
    assert math.isclose(perplexity(model, windows), after, rel_tol=1e-3)
    assert len(continuation(model, windows[0, :8], 5)) == 5


def test_dynamic_keeps_the_budget_and_its_alphas(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    alphas = tmp_path / "alphas.json"
    call = ["quantize", str(checkpoint), "--bits", "3.5", "--dynamic", "--no-eval", "--alphas", str(alphas)]
    assert main(call) == 0
    first, written = capsys.readouterr().out, alphas.read_bytes()
    bits = float(first.split("quantized to ")[1].split(" bits")[0])
    assert 3.0 < bits <= 3.505
    assert main(call) == 0
    assert capsys.readouterr().out.splitlines()[0] == first.splitlines()[0], (
        "the kept alphas give the same plan"
    )
    assert alphas.read_bytes() == written


def test_what_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["quantize", str(tmp_path / "nothing"), "--no-eval"]) == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    assert main(["quantize", str(tmp_path), "--no-eval"]) == 2
    assert "no config.json, and 0 GGUF files" in capsys.readouterr().err


def test_bad_bits_are_refused_and_nothing_is_written(checkpoint: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "small"
    assert main(["quantize", str(checkpoint), "--bits", "99", "--no-eval", "--out", str(out)]) == 2
    assert "bits" in capsys.readouterr().err
    assert not out.exists()


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="text must fill a window of 512 tokens, got 3"):
        text_windows(lambda text: torch.arange(3), "a b c")
    assert text_windows(lambda text: torch.arange(1100), "many").shape == (2, 512)


def test_speed_counts_tokens(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves a quarter of a second with each forward, the prompt's own too."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    clock = [0.0]

    def tick(*_: object) -> None:
        clock[0] += 0.25

    model.register_forward_hook(tick)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert tokens_per_second(model, torch.arange(6), count=3, repeats=2) == 4.0
    assert clock[0] == 2 * (1 + 3) * 0.25


def _encoder(folder: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer(text, return_tensors="pt").input_ids[0]
