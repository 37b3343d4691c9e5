"""PEFT as the oracle: what it saves, we read as the update that it computes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
from transformers.pytorch_utils import Conv1D  # noqa: E402

from sapmerge.errors import AdapterConfigError, AdapterFormatError, MethodError  # noqa: E402
from sapmerge.io.adapter import Adapter  # noqa: E402
from tests.io.helpers import accepted  # noqa: E402
from tests.versions import needs_peft_21  # noqa: E402


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 10)
        self.v_proj = nn.Linear(12, 7, bias=False)
        self.c_attn = Conv1D(18, 12)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.conv1 = nn.Conv1d(6, 8, 3)
        self.conv2 = nn.Conv2d(6, 8, (2, 3))
        self.point = nn.Conv2d(6, 8, 1)
        self.conv3 = nn.Conv3d(3, 8, 2)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.score = nn.Linear(12, 3)
        # The layer numbers of PEFT are found one level down, and the first number counts.
        self.deep = nn.ModuleDict(
            {"h": nn.ModuleList([nn.ModuleDict({"lin": nn.Linear(5, 6)}) for _ in range(3)])}
        )


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net(), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def expected(model: Any) -> dict[str, Tensor]:
    """The update of each adapted module as an (out, in * kernel) matrix."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "default" in module.scaling:
            delta = module.get_delta_weight("default").detach()
            base = module.get_base_layer()
            found[name] = delta.T if isinstance(base, Conv1D | nn.Embedding) else delta.flatten(1)
    return found


CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r"layers\.[02]\.(q|v)_proj"},
    "conv1d of transformers": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "convolutions": {"target_modules": ["conv1", "conv2", "conv3", "point"], "r": 3},
    "embedding": {"target_modules": ["embed", "q_proj"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 5},
    "rank_pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.v_proj": 5},
    },
    "patterns and rslora": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"^layers.*q_proj": 2},
        "alpha_pattern": {r"layers\.\d\.q_proj": 3},
        "use_rslora": True,
    },
    "layers_to_transform": {"target_modules": ["lin"], "layers_to_transform": [0, 2]},
    "one layer of a list": {
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "exclude_modules": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.1.v_proj"],
    },
    "exclude by pattern": {
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r".*\.2\.q_proj",
    },
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["score"], "r": 2},
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=needs_peft_21 if case == "one layer of a list" else ())
        for case in CASES
    ],
)
def test_the_update_is_pefts(case: str, tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 6} | CASES[case]
    model = make(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    adapter = accepted(tmp_path)
    live = Adapter.from_peft_model(model, "default")
    wanted = expected(model)
    assert list(adapter.modules) == sorted(wanted)
    assert live.digest == adapter.digest
    for name, delta in wanted.items():
        update = adapter.update(name)
        module = adapter.modules[name]
        assert update.shape == module.shape == tuple(delta.shape)
        assert update.rank == module.rank
        assert update.dtype == torch.float32
        assert torch.allclose(
            update.dense(), delta, rtol=1e-6, atol=1e-6 * float(delta.abs().max())
        )
    if "modules_to_save" in options:
        assert torch.equal(
            adapter.saved_tensor("score.weight"), model.base_model.model.score.weight
        )
        assert list(adapter.saved) == ["score.bias", "score.weight"]


def test_kinds_and_stored_shapes(tmp_path: Path) -> None:
    model = make(r=3, target_modules=["conv2", "embed", "v_proj"])
    model.save_pretrained(tmp_path)
    modules = accepted(tmp_path).modules
    assert (modules["conv2"].kind, modules["conv2"].a_shape, modules["conv2"].b_shape) == (
        "conv",
        (3, 6, 2, 3),
        (8, 3, 1, 1),
    )
    assert modules["conv2"].shape == (8, 36)
    assert (modules["embed"].kind, modules["embed"].shape) == ("embedding", (12, 20))
    assert (modules["layers.0.v_proj"].kind, modules["layers.0.v_proj"].shape) == (
        "linear",
        (7, 12),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(r=4, target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path)
    adapter = accepted(tmp_path)
    layer = model.base_model.model.layers[1].q_proj
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    wanted = b @ a * 2.0
    assert adapter.modules["layers.1.q_proj"].dtype == dtype
    assert torch.allclose(
        adapter.update("layers.1.q_proj").dense().double(), wanted, rtol=1e-5, atol=1e-5
    )


def test_overlapping_patterns_follow_pefts_rule(tmp_path: Path) -> None:
    model = make(r=4, target_modules=["q_proj"], alpha_pattern={"layers.0.q_proj": 2, "q_proj": 3})
    model.save_pretrained(tmp_path)
    with pytest.warns(Warning, match="alpha_pattern"):
        adapter = Adapter.load(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    for name, delta in expected(loaded).items():
        assert torch.allclose(adapter.update(name).dense(), delta, atol=1e-6)


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(r=4, target_modules=["grouped"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match="grouped convolution"):
        Adapter.load(tmp_path)


def test_a_live_model() -> None:
    model = make(r=4, target_modules=["q_proj"])
    model.add_adapter("other name!", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["v_proj"]))
    other = Adapter.from_peft_model(model, "other name!")
    assert other.label == "other_name_"
    assert {module.rank for module in other.modules.values()} == {2}
    assert other.files == {}
    adapter = Adapter.from_peft_model(model, "default", label="mine")
    assert (adapter.label, adapter.source) == ("mine", "PeftModel['default']")
    before = adapter.update("layers.0.q_proj").dense()
    with torch.no_grad():
        model.base_model.model.layers[0].q_proj.lora_A["default"].weight.zero_()
    assert torch.equal(adapter.update("layers.0.q_proj").dense(), before)
    with pytest.raises(MethodError, match=r"default.*other"):
        Adapter.from_peft_model(model, "third")
    with pytest.raises(MethodError, match="no adapter"):
        Adapter.from_peft_model(Net(), "default")
    model.base_model.model.layers[0].q_proj.set_scale("default", 3.0)
    with pytest.raises(AdapterConfigError, match="set_scale"):
        Adapter.from_peft_model(model, "default")


def test_a_config_and_a_state_dict() -> None:
    model = make(r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.0.v_proj"])
    config = model.peft_config["default"]
    state = peft.get_peft_model_state_dict(model)
    adapter = Adapter.from_state_dict(config, state)
    assert (adapter.label, adapter.source) == ("adapter", "(config, state_dict)")
    assert adapter.digest == Adapter.from_peft_model(model, "default").digest
    for name, delta in expected(model).items():
        assert torch.allclose(adapter.update(name).dense(), delta, atol=1e-6)
    stray = {**state, "base_model.model.score.weight": torch.ones(3, 12)}
    with pytest.raises(Exception, match=r"score\.weight"):
        Adapter.from_state_dict(config, stray)
    with pytest.raises(AdapterFormatError, match="expected a tensor"):
        Adapter.from_state_dict(config, {**state, "x": 3})  # type: ignore[dict-item]
    with pytest.raises(AdapterConfigError, match="no config"):
        Adapter.from_state_dict(3, state)
