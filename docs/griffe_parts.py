"""What the reference has to be told about the sources: `@part` makes a dataclass, `Example:` in a
docstring is a section with a session, and the package has its `__all__` when it runs.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

DATACLASS = griffe.ExprName("dataclass", parent=griffe.ExprName("dataclasses"))


class Parts(griffe.Extension):
    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        for decorator in cls.decorators:
            if str(decorator.value) == "part":
                decorator.value = DATACLASS

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        if mod.path == "sapmerge":
            mod.exports = []  # without any, Griffe looks at none of the modules below

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
