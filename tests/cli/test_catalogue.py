"""What is read from source as text is what Python says of the functions."""

from __future__ import annotations

import ast
import inspect

from sapmerge import losses
from sapmerge.cli import choices
from sapmerge.cli.catalogue import catalogue
from sapmerge.io.engines import ENGINES
from sapmerge.io.formats.convert import FORMATS
from sapmerge.io.writing import OUTPUT_DTYPES
from sapmerge.merging.spelling import CHOICES
from sapmerge.method_names import factory_of, names
from sapmerge.methods import anchored
from sapmerge.parsing import parse


def test_the_catalogue_is_of_the_functions() -> None:
    found = catalogue()
    assert list(found) == names()
    for name, one in found.items():
        function = factory_of(name)
        taken = inspect.signature(function).parameters.values()
        assert list(one.arguments) == [p.name for p in taken]
        assert one.text == inspect.getdoc(function)
        assert one.anchors == (name in anchored.__all__)


def test_defaults_are_those_of_the_functions() -> None:
    """`Taylor()` for `Taylor(at='adapter')`: equal, not spelled alike."""
    compared = 0
    for name, one in catalogue().items():
        for argument, parameter in inspect.signature(factory_of(name)).parameters.items():
            text, default = one.arguments[argument], parameter.default
            if text is None:
                assert default is parameter.empty, (name, argument)
            elif (part := text.partition("(")[0]) in PUBLIC:
                assert parse(text) == default, (name, argument)
            elif part.isidentifier() and "(" in text:  # a part that recipes do not name
                assert type(default).__name__ == part, (name, argument)
            else:
                assert ast.literal_eval(text) == default, (name, argument)
            compared += 1
    assert compared > 100


PUBLIC = ("Factors", "Taylor", "MatchNorm", "Mean", "Sum", "Keep")


def test_choices_are_those_of_the_library() -> None:
    assert set(choices.ENGINES) == set(ENGINES)
    assert choices.SPELLINGS == CHOICES
    assert tuple(OUTPUT_DTYPES) == choices.DTYPES
    assert choices.FORMATS == FORMATS
    assert set(choices.LOSSES) == set(losses.NAMED)
