"""`torchlin show`: what it says of an activation, its curves, the terminal's plots, PNG files and the gallery."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

from torchlin import _curves, _plot, cli, registry, show
from torchlin.catalogue import catalogue, find

DOCS = Path(__file__).resolve().parents[1] / "docs"
EVERY = pytest.mark.parametrize("name", list(catalogue()))


def text_of(*argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["show", *argv]) == 0
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- curves


def ends(pieces: list[_curves.Points]) -> list[tuple[float, ...]]:
    return [(*piece[0], *piece[-1]) for piece in pieces]


@EVERY
def test_every_name_has_a_picture(name: str) -> None:
    picture = _curves.picture(find(name))
    assert picture.pieces("f"), "nothing of f is in its window"
    for line in picture.lines:
        for piece in line.pieces:
            assert all(picture.bottom - 1e-9 <= y <= picture.top + 1e-9 for _, y in piece)
            assert all(x0 <= x1 for (x0, _), (x1, _) in pairwise(piece))
    shown = sum(piece[-1][0] - piece[0][0] for piece in picture.pieces("f"))
    assert shown >= 0.1 * (picture.high - picture.low)


@pytest.mark.parametrize("name", ["mish", "gelu", "sin", "pau", "hardswish"])
def test_curves_are_the_function_and_its_derivative(name: str) -> None:
    picture = _curves.picture(find(name))
    torch_f = {"mish": torch.nn.functional.mish, "gelu": torch.nn.functional.gelu, "sin": torch.sin}
    for role in ("f", "derivative"):
        x, y = torch.tensor(
            [p for piece in picture.pieces(role) for p in piece[1:-1]], dtype=torch.float64
        ).unbind(1)
        value, slope = _curves.value_and_slope(_curves.evaluated(find(name), find(name).defaults()), x)
        torch.testing.assert_close(y, value if role == "f" else slope, rtol=0, atol=1e-9)
        if role == "f" and name in torch_f:
            torch.testing.assert_close(y, torch_f[name](x), rtol=0, atol=1e-9)


def test_a_step_is_cut_and_a_kink_is_sharp() -> None:
    step = _curves.picture(find("step"))
    left, right = ends(step.pieces("f"))
    assert left == pytest.approx((-4, 0, 0, 0), abs=1e-6)
    assert right == pytest.approx((0, 1, 4, 1), abs=1e-6)
    relu = _curves.picture(find("relu"))
    (curve,) = relu.pieces("f")
    assert min(abs(x) for x, _ in curve) < 1e-5
    assert len(relu.pieces("derivative")) == 2


def test_what_is_steep_but_continuous_is_not_cut() -> None:
    assert len(_curves.picture(find("bipolar_plus")).pieces("f")) == 1


def test_poles_leave_the_window_and_come_back() -> None:
    picture = _curves.picture(find("softsign_rrelu"))
    left, right = picture.pieces("f")
    assert left[-1][1] == right[0][1] == picture.top
    assert left[-1][0] < -1 < right[0][0]


def test_the_window_fits_the_function() -> None:
    assert _curves.picture(find("relu6")).high == 8  # the kink at 6
    assert _curves.picture(find("siren")).high == 1  # sin(30 x)
    assert _curves.picture(find("siren"), window=(-4, 4)).high == 4
    small = _curves.picture(find("sigmoid"))
    assert (small.bottom, small.top) == (-0.25, 1.25)


@pytest.mark.parametrize("window", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_a_window_that_is_none(window: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="range: must go up"):
        _curves.picture(find("relu"), window=window)


def test_a_gated_unit_is_drawn_over_its_gate() -> None:
    glu = _curves.picture(find("glu"))
    assert glu.axis == "b"
    assert glu.caption == "over b, with a = 1; lighter: a = -1 and 2"
    (curve,) = glu.pieces("f")
    assert all(y == pytest.approx(1 / (1 + math.exp(-x))) for x, y in curve[::20])
    assert _curves.picture(find("swiglu")).axis == "a"


def test_noise_is_drawn_at_its_quantiles() -> None:
    picture = _curves.picture(find("rrelu"))
    slopes = [piece[0][1] / piece[0][0] for piece in picture.pieces("other")]
    low, high = 1 / 8 + 0.1 * (1 / 3 - 1 / 8), 1 / 8 + 0.9 * (1 / 3 - 1 / 8)
    assert slopes == pytest.approx([low, high])


def test_a_function_of_a_vector_is_drawn_by_its_first_element() -> None:
    (curve,) = _curves.picture(find("softmax")).pieces("f")
    for x, y in curve[::40]:
        assert y == pytest.approx(torch.softmax(torch.tensor([x, 1, -0.5, 0.5]), 0)[0].item(), abs=1e-6)


def test_ticks_are_round() -> None:
    assert _curves.ticks(-4, 4) == [-4, -2, 0, 2, 4]
    assert _curves.ticks(-0.25, 1.25) == [0, 0.5, 1]
    assert _curves.ticks(0, 1e-3) == pytest.approx([0, 5e-4, 1e-3])


# -------------------------------------------------------------------------------------------------------- plots


def test_a_plot_of_a_diagonal() -> None:
    plot = _plot.Plot(9, 5, (-1, 1, -1, 1), unicode=False)
    plot.draw([[(-1, -1), (1, 1)]])
    lines = plot.lines()
    assert len(lines) == 6
    assert [line.find("|") for line in lines[:5]].count(-1) < 5
    marks = [(row, line) for row, line in enumerate(lines[:5]) if re.search(r"[.:'|]", line)]
    assert len(marks) == 5
    assert lines[0].rstrip()[-1] in ".:'|"


def test_a_braille_plot_has_one_line_where_the_curve_is_level() -> None:
    plot = _plot.Plot(10, 4, (0, 1, -1, 1))
    plot.draw([[(0, 0.5), (1, 0.5)]])
    rows = [line for line in plot.lines() if any(0x2800 < ord(c) <= 0x28FF for c in line)]
    assert len(rows) == 1
    assert sum(0x2800 < ord(c) <= 0x28FF for c in rows[0]) == 10


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_show_keeps_to_the_terminal(columns: int, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("mish", "glu", "softmax", "rrelu"):
        out = text_of("activation", name, capsys=capsys)
        plot = [line for line in out.splitlines() if any(0x2800 < ord(c) <= 0x28FF for c in line)]
        assert plot
        assert max(map(len, plot)) <= columns


def test_ascii_where_there_is_no_unicode() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for name in catalogue():
        show.show(registry.describe("activation", name), out=out)
    out.flush()
    text = out.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "f'(x)" in text
    assert "Kunc & Klema" in text or "Kunc & Kle?ma" in text


# --------------------------------------------------------------------------------------------------------- text


def test_show_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    out = text_of("Swish", capsys=capsys)
    assert out.startswith("silu: SiLU  [activation, elementwise]\nalso: swish")
    assert "\n    x*sigmoid(x)\n" in out
    assert "\n    def silu(x):\n        return x * torch.sigmoid(x)\n" in out
    assert re.search(r"^source: .*2017", out, re.MULTILINE)
    assert "\nverified: equal to torch.nn.functional.silu" in out
    assert "swish_beta" in out[out.index("equal at the default parameters") :]
    assert out.endswith("make: torchlin.create('activation', 'silu')\n")
    pelu = text_of("pelu", capsys=capsys)
    assert re.search(r"^a = 1, learnable.*in \(0, inf\), kept there by", pelu, re.MULTILINE)


def test_names_of_one_function(capsys: pytest.CaptureFixture[str]) -> None:
    names = [a.name for a in show.relatives(find("quick_gelu"))]
    assert "swish_beta" in names
    assert show.as_another(find("quick_gelu")) == "quick_gelu = swish_beta(b=1.702)"
    assert "gelu_10" not in show.equal_by_default("gelu")  # equal up to 10 only
    assert "relu" in show.equal_by_default("apl")
    out = text_of("felu", capsys=capsys)
    assert "\n    elu\n    = where(x > 0, x, a*expm1(x))\n" in out


def test_parameters_change_the_plot(capsys: pytest.CaptureFixture[str]) -> None:
    plain = text_of("prelu", capsys=capsys)
    changed = text_of("prelu", "--param", "a=-1", "--range", "-2", "2", capsys=capsys)
    assert "a = -1 (not the default)" in changed
    assert changed.splitlines()[8:14] != plain.splitlines()[8:14]
    assert "torchlin.create('activation', 'prelu', a=-1.0)" in changed
    assert "a = [0, 1, 1, 0, 0, 0] (not the default)" in text_of(
        "slaf", "--param", "a=0,1,1,0,0,0", capsys=capsys
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("prelu", "--param", "q=1"), "q: prelu has no such parameter; it has a"),
        (("pelu", "--param", "a=-1"), "a must be in (0, inf), got -1"),
        (("prelu", "--param", "a=1,2"), "a: prelu takes one number here, got 2"),
        (("prelu", "--param", "a"), "--param: must be of the form name=number"),
        (("prelu", "--param", "a=b"), "--param: must be of the form name=number"),
        (("prelu", "--range", "2", "1"), "range: must go up from one finite number to another, got 2 1"),
        (("mihs",), "name: 'mihs' is registered in no kind; the closest: 'mish'"),
        (("hadamard", "--png", "x.png"), "hadamard is no activation of the catalogue"),
    ],
)
def test_what_is_refused(argv, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_name_that_another_package_took(own_registry: None, capsys: pytest.CaptureFixture[str]) -> None:
    registry.register("activation", "mish", torch.nn.Mish, override=True)
    out = text_of("mish", capsys=capsys)
    assert "from: torch.nn.modules.activation.Mish" in out
    assert "tanh(softplus(x))" not in out.splitlines()[0]


def test_list_of_activations(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "activation", "*gelu*"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "kind", "formula", "aliases"]
    by_name = {row.split()[0]: row for row in rows}
    assert "0.5*x*(1 + erf(x/sqrt(2)))" in by_name["gelu"]
    assert by_name["geglu"].split()[1] == "gated"
    assert "gelu_new" in by_name["gelu_tanh"]


# ---------------------------------------------------------------------------------------------------------- PNG


def test_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / f"{name}.png" for name in ("mish", "swiglu", "softmax")]
    for file in files:
        assert cli.main(["show", file.stem, "--png", str(file)]) == 0
        assert file.read_bytes().startswith(b"\x89PNG")
    assert len({file.read_bytes() for file in files}) == 3
    assert cli.main(["show", "mish", "--png", str(tmp_path / "no" / "folder.png")]) == 2


def test_png_without_matplotlib(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["show", "mish", "--png", "mish.png"]) == 2
    assert "plots needs matplotlib" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ gallery


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery", DOCS / "activations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(gallery: ModuleType) -> dict[str, str]:
    threads = torch.get_num_threads()
    try:
        return gallery.gallery()
    finally:
        torch.set_num_threads(threads)


def test_the_committed_gallery_is_up_to_date(files: dict[str, str]) -> None:
    kept = {path.relative_to(DOCS).as_posix() for path in (DOCS / "activations").glob("*.svg")}
    stale = kept ^ {name for name in files if name.endswith(".svg")}
    stale |= {name for name, text in files.items() if name not in stale and not _same(DOCS / name, text)}
    assert not stale, "run: make docs"


def _same(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


def test_every_name_is_in_the_gallery_with_a_picture(files: dict[str, str]) -> None:
    titles: list[str] = []
    for name, text in files.items():
        if not name.endswith(".svg"):
            continue
        root = ElementTree.fromstring(text)
        svg = "{http://www.w3.org/2000/svg}"
        for panel in root.findall(f"{svg}g"):
            title = panel.find(f"{svg}text")
            assert title is not None
            titles.append(title.text or "")
            classes = [path.get("class") for path in panel.iter(f"{svg}path")]
            assert "f" in classes
            assert len(panel.findall(f"{svg}rect")) == 1
    assert sorted(titles) == sorted(catalogue())
    page = files["activations.md"]
    for activation in catalogue().values():
        assert page.count(f'<a id="{activation.name}"></a>') == 1
        assert all(alias in page for alias in activation.aliases)
    assert sum(map(len, files.values())) < 1.5e6
    links = set(re.findall(r"\]\(#([\w-]+)\)", page))
    anchors = set(re.findall(r'<a id="(\w+)"', page)) | {
        title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", page, re.MULTILINE)
    }
    assert links <= anchors


def test_the_tables_of_the_gallery_have_five_columns(files: dict[str, str]) -> None:
    rows = [line for line in files["activations.md"].splitlines() if line.startswith("|")]
    assert len(rows) > len(catalogue())
    assert {line.count("|") for line in rows} == {6}
    assert all(
        (DOCS / file).is_file()
        for file in re.findall(r"\]\((activations/[\w-]+\.svg)\)", files["activations.md"])
    )


def test_a_thinned_curve_stays_close(gallery: ModuleType) -> None:
    points = [(i, round(1000 * math.sin(i / 100))) for i in range(1000)]
    thin = gallery._thin(points)
    assert thin[0] == points[0]
    assert thin[-1] == points[-1]
    assert len(thin) < 60
    for x, y in points:
        (x0, y0), (x1, y1) = next(pair for pair in pairwise(thin) if pair[0][0] <= x <= pair[1][0])
        assert (
            abs(y0 + (y1 - y0) * (x - x0) / (x1 - x0) - y)
            <= 2.5 * math.hypot(x1 - x0, y1 - y0) / (x1 - x0) + 1
        )
