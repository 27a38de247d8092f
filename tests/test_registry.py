"""Names, aliases, keys, errors, and plug-ins: good, broken, concurrent, and one that pip installs."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

import torchlin
from torchlin import registry
from torchlin.compat import timm
from torchlin.registry import UnknownNameError

HERE = Path(__file__).resolve().parent


pytestmark = pytest.mark.usefixtures("own_registry")


class Cube(nn.Module):
    """Cubes.

    A second paragraph.
    """

    def __init__(self, inplace: bool = False, gain: float = 1.0) -> None:
        super().__init__()
        self.inplace, self.gain = inplace, gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.inplace:
            return x.pow_(3).mul_(self.gain)
        return x**3 * self.gain


def python(code: str, **environment: str) -> str:
    """Runs code in a fresh interpreter and returns what it printed."""
    environment = os.environ | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -------------------------------------------------------------------------------------------------- register


def test_decorator_call_and_aliases_give_one_entry() -> None:
    assert registry.register("activation", "Test-Cube", aliases=("test_x3", "Test-Cube"))(Cube) is Cube
    assert registry.register("activation", "test_partial", functools.partial(Cube, gain=2.0)).func is Cube
    for spelling in ("test_cube", "TEST-CUBE", " Test_Cube ", "Test-X3"):
        assert type(registry.create("activation", spelling)) is Cube
    entry = registry.describe("activation", "test-x3")
    assert (entry.kind, entry.name, entry.aliases, entry.target) == (
        "activation",
        "test_cube",
        ("test_x3",),
        Cube,
    )
    assert entry.signature == "(inplace: bool = False, gain: float = 1.0)"
    assert entry.summary == "Cubes."
    assert entry.source == f"{__name__}.Cube"
    assert entry.plugin is None
    partial = registry.describe("activation", "test_partial")
    assert partial.source == f"{__name__}.Cube"
    assert partial.signature == "(inplace: bool = False, *, gain: float = 2.0)"
    assert registry.create("activation", "test_partial")(torch.tensor(2.0)) == 16


def test_the_same_object_again_is_harmless_and_another_is_refused() -> None:
    registry.register("activation", "test_cube", Cube, aliases=("test_x3",))
    registry.register("activation", "test_cube", Cube, aliases=("test_x3",))
    with pytest.raises(ValueError, match=r"name: activation 'test_cube' is taken by .*Cube.*override=True"):
        registry.register("activation", "test-cube", nn.ReLU)
    with pytest.raises(ValueError, match="name: 'test_x3' already means the activation 'test_cube'"):
        registry.register("activation", "test_x3", nn.ReLU, override=True)
    with pytest.raises(ValueError, match="aliases: 'test_x3' already means the activation 'test_cube'"):
        registry.register("activation", "test_other", nn.ReLU, aliases=("test_new", "test_x3"))
    assert registry.names("activation", "test_*") == ["test_cube"]  # a refusal leaves nothing behind
    assert registry.describe("activation", "test_cube").target is Cube


def test_override_replaces_the_entry_and_its_aliases() -> None:
    registry.register("activation", "test_cube", Cube, aliases=("test_x3",))
    registry.register("activation", "test_cube", nn.ReLU, aliases=("test_x4",), override=True)
    assert registry.describe("activation", "test_x4").target is nn.ReLU
    with pytest.raises(UnknownNameError):
        registry.describe("activation", "test_x3")


def test_one_name_can_be_in_two_kinds() -> None:
    registry.register("activation", "test_both", Cube)
    registry.register("norm", "test_both", nn.LayerNorm)
    assert [entry.kind for entry in registry.find("test-both")] == ["activation", "norm"]


def test_a_name_of_ours_is_refused_before_any_look_up() -> None:
    code = """
import torchlin, torch
from torchlin import registry
assert not registry._own_plugins._loaded and not registry._other_plugins._loaded  # import scans nothing
try:
    torchlin.register("transform", "hadamard", torch.nn.Identity)
except ValueError as error:
    print(error)
assert not registry._other_plugins._loaded
"""
    assert "'hadamard' is taken by torchlin.nn.hadamard.HadamardTransform" in python(code)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("activation", "a b", Cube), ValueError, "name: 'a b' is no name"),
        (("activation", "", Cube), ValueError, "name: '' is no name"),
        (("activation", "gelu*", Cube), ValueError, "is no name"),
        (("activation", 3, Cube), TypeError, "name: a name must be a str, got 3"),
        (("activation", "test_x", 3), TypeError, "target must be a class or a function .* got 3"),
        (
            ("activations", "test_x", Cube),
            UnknownNameError,
            "kind: 'activations' is none of activation, attention",
        ),
        ((None, "test_x", Cube), TypeError, "kind must be a str, got None"),
    ],
)
def test_register_refuses(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        registry.register(*arguments)


def test_register_refuses_a_str_of_aliases() -> None:
    with pytest.raises(TypeError, match="aliases must be a sequence of names, got the str 'swish'"):
        registry.register("activation", "test_x", Cube, aliases="swish")


# ---------------------------------------------------------------------------------------------------- create


def test_create_takes_every_sort_of_key() -> None:
    registry.register("activation", "test_cube", Cube)
    assert registry.create("activation", None) is None
    assert registry.create("activation", "test_cube", gain=3.0).gain == 3.0
    config = {"type": "Test-Cube", "gain": 4.0}
    made = registry.create("activation", config, inplace=True)
    assert (made.gain, made.inplace) == (4.0, True)
    assert config == {"type": "Test-Cube", "gain": 4.0}
    assert registry.create("activation", {"type": Cube, "gain": 5.0}).gain == 5.0
    assert registry.create("activation", Cube, gain=6.0).gain == 6.0
    assert registry.create("activation", functools.partial(Cube, gain=7.0)).gain == 7.0
    assert registry.create("activation", made) is made
    assert isinstance(registry.create("transform", "hadamard", n=8), torchlin.nn.HadamardTransform)


@pytest.mark.parametrize(
    ("key", "arguments", "error", "message"),
    [
        (
            {"gain": 2.0},
            {},
            ValueError,
            r"""a dict needs "type", the name of the activation; got \['gain'\]""",
        ),
        ({"type": "test_cube", "gain": 2.0}, {"gain": 1.0}, TypeError, "key: gain given twice"),
        (
            nn.ReLU(),
            {"inplace": True},
            TypeError,
            "a ReLU that exists already takes no arguments, got inplace",
        ),
        (3, {}, TypeError, "key must be a name, a dict, a class, a callable, a Module or None, got 3"),
        ({"type": None}, {}, TypeError, "got None"),
        ("test_cube", {"gian": 2.0}, TypeError, "gian"),
        ("", {}, UnknownNameError, "name: '' is no registered activation"),
    ],
)
def test_create_refuses(key: object, arguments: dict, error: type[Exception], message: str) -> None:
    registry.register("activation", "test_cube", Cube)
    with pytest.raises(error, match=message):
        registry.create("activation", key, **arguments)


def test_an_unknown_name_gives_the_closest() -> None:
    registry.register("activation", "test_hard_swish", Cube, aliases=("test_hswish",))
    with pytest.raises(UnknownNameError) as caught:
        registry.create("activation", "test_hardswish")
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, KeyError)
    message = str(caught.value)
    assert message.startswith(
        "name: 'test_hardswish' is no registered activation; the closest: 'test_hard_swish'"
    )
    assert "torchlin.names('activation') lists all" in message
    with pytest.raises(UnknownNameError, match="it is a registered transform"):
        registry.create("norm", "hadamard")
    with pytest.raises(UnknownNameError, match="registered in no kind; the closest: 'hadamard'"):
        registry.find("hadamrd")
    with pytest.raises(UnknownNameError, match=r"closest: .*'hadamard'"):  # too long for difflib
        registry.create("transform", "the_randomized_hadamard_transform")


def test_names_match_patterns_in_natural_order() -> None:
    for name in ("test_x10", "test_x9", "test_x9a", "test_y"):
        registry.register("loss", name, Cube, aliases=(f"{name}_alias",))
    assert registry.names("loss", "test_*") == ["test_x9", "test_x9a", "test_x10", "test_y"]
    assert registry.names("loss", "TEST-X?") == ["test_x9"]
    assert registry.names("loss", "test_[a-x]9*") == ["test_x9", "test_x9a"]
    assert registry.names("loss", "*_alias") == registry.names("loss", "test_*")
    assert registry.names("loss", "no_such_*") == []
    with pytest.raises(UnknownNameError, match="kind: 'los' is none of"):
        registry.names("los")


# -------------------------------------------------------------------------------------------------- plug-ins


def install(folder: Path, name: str, code: str) -> None:
    """What pip leaves behind of a package with one plug-in, `register` in a module of the package's name."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {name}:register\n")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[registry._Plugins]:
    """The door for other packages' plug-ins, not yet opened; tmp_path is a folder of installed packages."""
    monkeypatch.syspath_prepend(str(tmp_path))
    fresh = registry._Plugins(registry._find_others)
    monkeypatch.setattr(registry, "_other_plugins", fresh)
    yield fresh
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def registering(name: str, before: str = "") -> str:
    return f"""
import torch, torchlin
{before}
def register():
    torchlin.register("transform", {name!r}, torch.nn.Identity)
"""


def test_own_families_come_through_the_same_door() -> None:
    entry = registry.describe("transform", "hadamard")
    assert entry.target is torchlin.nn.HadamardTransform
    assert entry.plugin == f"torchlin {torchlin.__version__}"
    assert "hadamard" in [point.name for point in registry._find_own()]
    assert "hadamard" not in [point.name for point in registry._find_others()]


def test_a_source_tree_without_metadata_finds_the_same_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {(point.name, point.value) for point in registry._find_own()}

    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    points = list(registry._find_own())
    assert {(point.name, point.value) for point in points} == installed
    monkeypatch.setattr(registry, "_entries", {kind: {} for kind in registry.KINDS})
    registry._Plugins(lambda: points).load()
    assert registry.describe("transform", "hadamard").plugin == "torchlin"


def test_a_broken_plugin_warns_with_its_package_and_breaks_nothing(
    tmp_path: Path, plugins: registry._Plugins
) -> None:
    install(tmp_path, "broken_import", "import no_such_module_at_all")
    install(tmp_path, "broken_entry", "registre = None")
    install(tmp_path, "broken_name", registering("hadamard"))  # ours
    install(tmp_path, "working", registering("test_working"))
    with pytest.warns(RuntimeWarning) as caught:
        assert "test_working" in registry.names("transform")
    told = sorted(str(warning.message) for warning in caught if "plug-in" in str(warning.message))
    assert len(told) == 3
    assert "'broken_entry' (broken_entry:register) of broken_entry 2.0 does not load" in told[0]
    assert "of broken_import 2.0" in told[1]
    assert "ModuleNotFoundError: No module named 'no_such_module_at_all'" in told[1]
    assert "of broken_name 2.0" in told[2]
    assert "'hadamard' is taken by torchlin.nn.hadamard.HadamardTransform" in told[2]
    assert registry.describe("transform", "hadamard").target is torchlin.nn.HadamardTransform
    assert registry.describe("transform", "test_working").plugin == "working 2.0"


def test_a_plugin_may_look_names_up_while_it_registers(tmp_path: Path, plugins: registry._Plugins) -> None:
    install(
        tmp_path, "curious", registering("test_curious", 'assert torchlin.names("transform", "hadamard")')
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "test_curious" in registry.names("transform")


def test_many_threads_load_a_plugin_once(tmp_path: Path, plugins: registry._Plugins) -> None:
    code = """
import time, torch, torchlin
calls = []
def register():
    calls.append(1)
    time.sleep(0.2)
    torchlin.register("transform", "test_slow", lambda: torch.nn.Identity())
"""
    install(tmp_path, "slow", code)
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append("test_slow" in registry.names("transform")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert seen == [True] * 8
    assert sys.modules["slow"].calls == [1]


def test_a_thread_that_imports_a_plugin_and_one_that_loads_it_do_not_lock_each_other(
    tmp_path: Path, plugins: registry._Plugins
) -> None:
    # The module sleeps in its own import, then registers; meanwhile another thread loads it as a plug-in.
    at_import = (
        'import time; time.sleep(0.3); torchlin.register("transform", "test_at_import", torch.nn.Identity)'
    )
    install(tmp_path, "sleepy", registering("test_at_call", at_import))
    importing = threading.Thread(target=__import__, args=("sleepy",), daemon=True)
    looking = threading.Thread(target=registry.names, args=("transform",), daemon=True)
    importing.start()
    looking.start()
    importing.join(30)
    looking.join(30)
    assert not importing.is_alive()
    assert not looking.is_alive()
    assert {"test_at_import", "test_at_call"} <= set(registry.names("transform"))


def test_an_installed_package_is_found_by_name(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(
        HERE / "plugin_example", source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, timeout=300, capture_output=True)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    code = """
import torch, torchlin
print(torchlin.create("transform", {"type": "Flip", "scale": 2.0})(torch.tensor([1.0, 2.0])).tolist())
print(torchlin.describe("transform", "reverse").plugin)
from torchlin.cli import main
main(["list", "transform"])
main(["show", "reverse"])
"""
    printed = python(code, PYTHONPATH=path)
    assert printed.startswith("[4.0, 2.0]\ntorchlin-plugin-example 1.2\n")
    listed = [line.split() for line in printed.splitlines()]
    assert ["transform", "reverse", "flip", "Reverses", "the", "last", "dimension."] in listed
    assert "reverse(scale: float = 1.0)  [transform]" in printed
    assert "from: torchlin_plugin_example.Reverse (torchlin-plugin-example 1.2)" in printed


# ---------------------------------------------------------------------------------------------- timm's words


def test_timm_words_follow_timm() -> None:
    registry.register("activation", "test_cube", Cube, aliases=("test_x3",))
    assert timm.get_act_layer("Test_Cube") is Cube
    assert timm.get_act_layer(nn.GELU) is nn.GELU
    assert timm.get_act_layer(None) is timm.get_act_layer("") is None
    assert timm.create_act_layer("") is None
    assert timm.get_act_fn("") is None
    assert timm.get_act_fn(torch.tanh) is torch.tanh
    assert timm.create_act_layer("test_x3", inplace=True, gain=2.0).inplace is True
    assert timm.create_act_layer("test_x3").inplace is False
    assert isinstance(timm.create_act_layer(nn.Tanh, inplace=True), nn.Tanh)  # Tanh has no inplace
    assert timm.list_activations("*_x3") == ["test_cube"]
    with pytest.raises(TypeError, match="no_such"):  # an argument that is wrong is not taken for "no inplace"
        timm.create_act_layer("test_cube", inplace=True, no_such=1)
    with pytest.raises(KeyError, match="closest: 'test_cube'"):
        timm.get_act_layer("test_cubes")


def test_timm_function_form() -> None:
    registry.register("activation", "test_cube", Cube)
    registry.register("activation", "test_prelu", nn.PReLU)
    act = timm.get_act_fn("test_cube")
    x = torch.tensor([2.0, -1.0])
    assert act(x).tolist() == [8.0, -1.0]
    assert x.tolist() == [2.0, -1.0]
    assert act(x, inplace=True) is x
    assert x.tolist() == [8.0, -1.0]
    assert act.__name__ == "test_cube"
    with pytest.raises(ValueError, match="'test_prelu' has parameters to learn"):
        timm.get_act_fn("test_prelu")


def test_timm_words_agree_with_timm() -> None:
    real = pytest.importorskip("timm.layers", exc_type=ImportError)
    for name in (None, "", nn.GELU, torch.tanh):
        for word in ("get_act_layer", "get_act_fn"):
            assert getattr(timm, word)(name) is getattr(real, word)(name)
    for word in ("get_act_layer", "get_act_fn"):
        with pytest.raises(KeyError):
            getattr(real, word)("no such thing")
        with pytest.raises(KeyError):
            getattr(timm, word)("no such thing")
    assert repr(timm.create_act_layer(nn.ReLU, inplace=True)) == repr(
        real.create_act_layer(nn.ReLU, inplace=True)
    )
