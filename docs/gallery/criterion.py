"""# A criterion of your own

What should be kept of an adapter, if only a part may stay? A scorer is a plain function of values
and statistics. Three of ours and two of your own, one line each, prune one adapter to three tenths
of its entries, with 64 anchors; the loss is measured on 1000 inputs that nobody has seen.
"""

import warnings
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import sapmerge as sm

warnings.simplefilter("ignore", sm.SapmergeWarning)  # of the energy that a file would keep
SIDE, RANK = 40, 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


# What was learned, and as much again that was not asked for: in outputs that the head cannot see.
state, right = {}, Net()
for number, name in enumerate(("first", "second")):
    B, A = 0.3 * random(SIDE, RANK, seed=number), 0.3 * random(RANK, SIDE, seed=9 + number)
    stray_B, stray_A = 0.3 * random(SIDE, RANK, seed=20), 0.3 * random(RANK, SIDE, seed=30 + number)
    getattr(right, name).weight.data += B @ A
    state[f"base_model.model.{name}.lora_B.weight"] = torch.cat((B, 0.5 * stray_B), 1)
    state[f"base_model.model.{name}.lora_A.weight"] = torch.cat((A, stray_A), 0)
config = {
    "peft_type": "LORA",
    "r": 2 * RANK,
    "lora_alpha": 2 * RANK,
    "target_modules": ["first", "second"],
}
config["base_model_name_or_path"] = "somebody/net"


def batch(seed: int, count: int) -> dict[str, Tensor]:
    x = random(count, SIDE, seed=seed) * torch.linspace(0.2, 2, SIDE)  # some inputs are louder
    with torch.no_grad():
        return {"x": x, "y": right(x)}


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def by_row(values: Tensor, stats: sm.Stats) -> Tensor:
    return values.abs() / values.abs().mean(-1, keepdim=True)


def size_and_slope(values: Tensor, stats: sm.Stats) -> Tensor:
    return (values * stats.gradient).abs().sqrt() * values.abs()


scorers: dict[str, Callable[..., Tensor]] = {
    "random": sm.Random(0),
    "magnitude": sm.Magnitude(),
    "Taylor, of SAP": sm.Taylor(),
    "by_row (own)": by_row,
    "size_and_slope (own)": size_and_slope,
}
anchors, unseen = [batch(100, 64)], batch(200, 1000)
scores = {"the base": loss(Net(), unseen).item()}
for name, scorer in scorers.items():
    method = sm.Chain(sm.Prune(scorer, sm.TopFraction(0.3)), sm.Mean())
    merged = sm.merge({"one": (config, state)}, anchors, Net(), loss=loss, method=method)
    merged.apply_to(model := Net())
    scores[name] = loss(model, unseen).item()
sm.merge({"one": (config, state)}, method=sm.mean()).apply_to(model := Net())
scores["all of it"] = loss(model, unseen).item()

print("loss on unseen inputs, with three tenths of the entries")
for name, value in scores.items():
    print(f"{name:<22}{value:.2f}")

figure = Figure(figsize=(6.4, 3), layout="constrained")
axes = figure.add_subplot()
colours = ["#2f73b3" if "own" in name else "#9ec3e6" for name in scores]
colours[0] = colours[-1] = "#b8bec6"
axes.barh(list(scores), list(scores.values()), color=colours)
axes.invert_yaxis()
axes.set_xlabel("loss on unseen inputs (lower is better)")
axes.spines[["top", "right"]].set_visible(False)
figure.savefig("criterion.png", dpi=130)
