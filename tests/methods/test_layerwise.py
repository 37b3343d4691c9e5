"""LiNeS: the official numbers, and where a module is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import sapmerge as sm
from sapmerge.errors import MethodError
from sapmerge.parts.scaling import block_of, magnitudes
from tests.conftest import changed, dense, error, make_layers, run
from tests.methods.test_goldens import HERE

ENTRY = next(
    e
    for e in json.loads((HERE / "lora_native.json").read_text())["entries"]
    if e["key"] == "misc/lines/toy"
)
NUMBERS = load_file(HERE / "lora_native.safetensors")


def test_official_numbers() -> None:
    """Task vectors of ones times (i + 1) in block i of four,
    ones in a projection outside of the blocks.
    """
    names = {f"visual.transformer.resblocks.{i}.mlp.w": i + 1.0 for i in range(4)} | {
        "visual.proj": 1.0
    }
    layers = [
        sm.Layer(name, (sm.Dense(torch.full((2, 2), value)),)) for name, value in names.items()
    ]
    p = ENTRY["hyperparameters"]
    for name, update in run(sm.lines(alpha=p["alpha"], beta=p["beta"]), layers).items():
        assert error(update.dense(), NUMBERS[ENTRY["outputs"][name.replace(".", "_")]]) < 1e-6


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers", 3)),
        ("layers.0.q_proj", ("layers", 0)),
        ("transformer.h.11.attn.c_attn", ("transformer.h", 11)),
        ("encoder.layer.7.attention.self.query", ("encoder.layer", 7)),
        ("visual.transformer.resblocks.2.mlp.c_fc", ("visual.transformer.resblocks", 2)),
        ("blocks.10.attn.qkv", ("blocks", 10)),
        ("model.layers.1.mlp.experts.12.up_proj", ("model.layers", 1)),
        ("encoder.block.5.layer.1.DenseReluDense.wo", ("encoder.block", 5)),
        (
            "vision_tower.vision_model.encoder.layers.4.mlp.fc1",
            ("vision_tower.vision_model.encoder.layers", 4),
        ),
        ("visual_projection", None),
        ("multi_modal_projector.linear_1", None),
        ("mm_projector.2", None),
        ("classifier.1.dense", None),
        ("xlayers.1.v", None),
        ("layers", None),
        ("layers.norm", None),
        ("layers.١.q", None),
    ],
)
def test_block_of(name: str, block: tuple[str, int] | None) -> None:
    assert block_of(name) == block


def test_every_tower_has_its_own_depth() -> None:
    shapes = {f"vision.layers.{i}.q": (4, 3) for i in range(3)} | {
        f"text.layers.{i}.q": (4, 3) for i in range(5)
    }
    layers = make_layers([2, 2], shapes | {"projection": (4, 3)})
    merged, plain = run(sm.lines(alpha=0.2, beta=0.6), layers), run(sm.task_arithmetic(), layers)
    factors = {
        "vision.layers.1.q": 0.5,
        "text.layers.1.q": 0.35,
        "text.layers.4.q": 0.8,
        "projection": 0.2,
    }
    for name, factor in factors.items():
        assert error(merged[name].dense(), plain[name].dense() * factor) < 1e-12


def test_a_gap_is_a_gap() -> None:
    """Adapters on blocks 0, 2 and 8 only: L is 9."""
    layers = make_layers([2], {f"layers.{i}.q": (4, 3) for i in (8, 0, 2)})
    merged = run(sm.lines(alpha=0.0, beta=1.0), layers)
    for i in (0, 2, 8):
        layer = next(x for x in layers if x.name == f"layers.{i}.q")
        assert error(merged[layer.name].dense(), layer.updates[0].dense() * i / 8) < 1e-12


def test_one_block_is_alpha() -> None:
    layers = make_layers([2, 3], {"layers.0.q": (4, 3)})
    assert (
        error(
            run(sm.lines(alpha=0.3), layers)["layers.0.q"].dense(),
            0.3 * sm.task_arithmetic()(layers[0]).dense(),
        )
        < 1e-12
    )
    assert (
        error(
            sm.on_one_layer(sm.lines(alpha=0.3), layers[0]).dense(),
            0.3 * sm.task_arithmetic()(layers[0]).dense(),
        )
        < 1e-12
    )


@pytest.mark.parametrize("method", [sm.task_arithmetic(), sm.mean(), sm.ties(0.3), sm.knots()])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, -0.5, 0.7)])
def test_norm_matched_alpha(method: sm.Method, weights: tuple[float, ...]) -> None:
    """alpha = |sum w D|_1 / |merged|_1 / K over the whole adapter,
    as the authors do for several tasks.
    """
    layers = make_layers([2, 3, 1], {f"layers.{i}.q": (6, 5) for i in range(3)}, weights=weights)
    plain = dense(run(method, layers))
    total = sum(float(sum(w * u.dense() for w, u in zip(weights, x)).abs().sum()) for x in layers)
    alpha = total / sum(float(m.abs().sum()) for m in plain.values()) / 3
    merged = dense(run(sm.lines(method, "norm", 0.4), layers))
    for i in range(3):
        name = f"layers.{i}.q"
        assert error(merged[name], plain[name] * (alpha + 0.4 * i / 2)) < 1e-9


def test_norm_matched_alpha_does_not_count_who_is_not_there() -> None:
    layers = make_layers([2, 3], {f"layers.{i}.q": (6, 5) for i in range(2)})
    more = [
        replace(
            x,
            updates=(*x.updates, sm.absent(x.shape, x.updates[0].A), x.updates[0]),
            adapters=("a0", "a1", "none", "silent"),
            weights=(1.0, 1.0, 1.0, 0.0),
            digests=("a0", "a1", "none", "silent"),
        )
        for x in layers
    ]
    wanted, got = (dense(run(sm.lines(alpha="norm"), x)) for x in (layers, more))
    assert all(error(got[name], wanted[name]) < 1e-12 for name in wanted)
    empty = [changed(x, updates=tuple(u.scaled(0.0) for u in x)) for x in layers]
    assert not any(matrix.any() for matrix in dense(run(sm.lines(alpha="norm"), empty)).values())


def test_magnitudes_are_summed_by_rows() -> None:
    update = make_layers([3], {"l": (1100, 3)})[0].updates[0]
    assert magnitudes(update) == pytest.approx(float(update.dense().abs().sum()), rel=1e-12)
    assert magnitudes(sm.absent((4, 3), update.A)) == 0.0


def test_other_names_of_containers_and_the_recipe() -> None:
    layers = make_layers([2])
    method = sm.ScaleByDepth(sm.mean(), 0.0, 1.0, containers=("model",))
    merged = dense(run(method, layers))
    assert not merged["model.0.q_proj"].any()
    assert merged["model.1.up_proj"].any()
    assert repr(sm.parse(repr(method))) == repr(method)
    with pytest.raises(MethodError, match="norm"):
        sm.lines(alpha="auto")


def test_the_report_has_the_factor() -> None:
    notes: dict[str, object] = {}
    layers = make_layers([2], {f"layers.{i}.q": (4, 3) for i in range(2)})
    prepared = sm.prepare(sm.lines(alpha=0.5, beta=0.25), layers)
    prepared(replace(layers[1], record=notes.__setitem__))
    assert notes["depth_factor"] == 0.75
