"""The public names are imported when they are used, and are what they would be otherwise."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import sapmerge
from sapmerge import contrib, methods, public
from sapmerge.core.part import parts

ROOT = Path(__file__).parents[1]


def for_type_checkers() -> dict[str, str]:
    """Name -> module, of the imports that type checkers see."""
    tree = ast.parse((ROOT / "sapmerge" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom)
        for alias in line.names:
            assert alias.name == "*" or alias.asname == alias.name, f"{alias.name} is not public"
            found[alias.name if alias.name != "*" else f"* {line.module}"] = str(line.module)
    return found


def test_type_checkers_see_the_same_names() -> None:
    found = for_type_checkers()
    for package in public.METHODS:
        assert found.pop(f"* {package}") == package
    modules = {name for name, home in found.items() if home == "sapmerge"}
    assert modules <= public.MODULES
    assert {name: home for name, home in found.items() if home != "sapmerge"} == public.HOMES


def test_every_name_is_that_of_its_module() -> None:
    for name, home in public.HOMES.items():
        assert getattr(sapmerge, name) is getattr(importlib.import_module(home), name)
    for package in (methods, contrib):
        for name in package.__all__:
            assert getattr(sapmerge, name) is getattr(package, name)
    assert set(sapmerge.__all__) == {*public.HOMES, *methods.__all__, *contrib.__all__}


def test_no_name_is_a_module_too() -> None:
    """Importing the module would put it in the name's place."""
    here = {path.stem for path in (ROOT / "sapmerge").iterdir()}
    assert not here & set(sapmerge.__all__)


def test_names_that_differ_by_case_mean_one_thing() -> None:
    """A class, and the function whose method is made of it."""
    alike = {name.lower(): name for name in sapmerge.__all__ if name != name.lower()}
    pairs = {name: alike[name] for name in sapmerge.__all__ if name in alike}
    assert {"mean", "krum", "tune", "slerp", "regmean", "cart", "wudi"} <= pairs.keys()
    for lower, upper in pairs.items():
        function, kind = getattr(sapmerge, lower), getattr(sapmerge, upper)
        if lower == "routed":
            assert inspect.signature(function).return_annotation == upper
        else:
            assert any(isinstance(step, kind) for step in parts(function())), upper


def in_a_new_process(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_ways_to_import() -> None:
    code = """if True:
        import sys
        import sapmerge as sm
        before = "torch" in sys.modules
        assert {"merge", "ties", "anchors", "clair", "__version__"} <= set(dir(sm))
        assert sm.anchors.from_folder.__module__ == "sapmerge.anchors.folders"
        import sapmerge.anchors.loading
        assert sapmerge.anchors.loading.from_pairs is sm.from_pairs
        everything = {}
        exec("from sapmerge import *", everything)
        assert all(everything[name] is getattr(sm, name) for name in sm.__all__)
        from sapmerge import merge, io, ties, errors
        assert errors.MethodError is sm.MethodError
        print(before, merge.__module__, ties.__module__)
    """
    assert in_a_new_process(code) == "False sapmerge.merging.merge sapmerge.methods.pruning\n"


def test_errors_do_not_need_torch() -> None:
    code = "import sys, sapmerge; print(sapmerge.MethodError.__name__, 'torch' in sys.modules)"
    assert in_a_new_process(code) == "MethodError False\n"


def test_pickles_open_where_nothing_was_imported() -> None:
    text = pickle.dumps(sapmerge.ties(0.3)).hex()
    code = f"import pickle; print(repr(pickle.loads(bytes.fromhex('{text}'))))"
    assert in_a_new_process(code) == repr(sapmerge.ties(0.3)) + "\n"


@pytest.mark.parametrize("name", ["mrege", "_private", "__path_of_nothing__"])
def test_what_is_not_there(name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        getattr(sapmerge, name)
    with pytest.raises(ImportError):
        exec(f"from sapmerge import {name}")
