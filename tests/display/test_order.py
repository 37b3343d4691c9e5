"""Layers by module type and depth."""

from __future__ import annotations

import random

import pytest

from sapmerge.display.order import grouped, module_type


def titles(names: list[str]) -> list[str]:
    return [group.title for group in grouped(names)]


def test_two_comes_before_ten_and_types_stay_together() -> None:
    names = [f"model.layers.{n}.{part}_proj" for n in range(12) for part in "qv"]
    random.Random(0).shuffle(names)
    groups = grouped(names)
    assert [group.kind for group in groups] == ["model.layers.*.q_proj", "model.layers.*.v_proj"]
    for group, part in zip(groups, "qv"):
        assert group.names == tuple(f"model.layers.{n}.{part}_proj" for n in range(12))
        assert group.blocks == "0 to 11"


def test_experts_are_numbers_too() -> None:
    assert module_type("layers.3.experts.17.up") == "layers.*.experts.*.up"
    (group,) = grouped(["layers.1.experts.0.up", "layers.0.experts.10.up", "layers.0.experts.9.up"])
    assert [name.split(".")[3] for name in group.names] == ["9", "10", "0"]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["h.0.attn.c_attn", "h.1.attn.c_attn"], ["c_attn"]),
        (["l.0.self_attn.q_proj", "l.0.mlp.up_proj"], ["up_proj", "q_proj"]),
        (
            ["text.layers.0.attn.q", "text.layers.0.mlp.fc", "vision.layers.0.attn.q"],
            ["text.q", "text.fc", "vision.q"],
        ),
        (["a.b.x.d", "a.c.x.d", "a.b.y.d"], ["b.x.d", "b.y.d", "c.x.d"]),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_titles_are_short_and_tell_types_apart(names: list[str], wanted: list[str]) -> None:
    assert titles(names) == wanted


def test_nothing_has_no_groups() -> None:
    assert grouped([]) == ()
