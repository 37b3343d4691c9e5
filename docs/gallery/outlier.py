"""# A bad client

Three clients have learned the same change of six layers, each with a part of its own; a fourth
sends its update with the sign flipped. The server has 32 anchors: inputs, and what the right model
answers. The mean follows everybody. SAP looks at how much the adapters agree (the median of each
one's cosines with the others) and at their anchor losses, and leaves the fourth one out.
"""

import warnings

import torch
from matplotlib.figure import Figure
from torch import nn

import sapmerge as sm

WIDTH, DEPTH, RANK = 24, 6, 3


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


def factors(seed: int, size: float = 0.3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """B and A of a random update of every block."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            size * torch.randn(WIDTH, RANK, generator=generator),
            size * torch.randn(RANK, WIDTH, generator=generator),
        )
        for _ in range(DEPTH)
    ]


def adapter(seed: int, sign: float) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Sign times what all have learned, beside a part of its own: (config, state_dict)."""
    config = {
        "peft_type": "LORA",
        "r": 2 * RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": r"blocks\.\d",
        "base_model_name_or_path": "somebody/tower",
    }
    state = {}
    for number, ((B, A), (own_B, own_A)) in enumerate(zip(factors(1), factors(seed, 0.22))):
        name = f"base_model.model.blocks.{number}"
        state[f"{name}.lora_B.weight"] = torch.cat((sign * B, own_B), 1)
        state[f"{name}.lora_A.weight"] = torch.cat((A, own_A), 0)
    return config, state


clients = {"ann": adapter(2, 1), "ben": adapter(3, 1), "cay": adapter(4, 1), "dan": adapter(5, -1)}

right = Tower()
for block, (B, A) in zip(right.blocks, factors(1)):
    block.weight.data += B @ A


def batch(seed: int, count: int) -> dict[str, torch.Tensor]:
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return {"x": x, "y": right(x)}


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


anchors, unseen = [batch(0, 32)], batch(1, 500)

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always", sm.SapmergeWarning)
    merged = sm.merge(clients, anchors, Tower(), loss=loss)
print(*(one.message for one in said if one.category is sm.SapmergeWarning), sep="\n")

report = merged.report
print(f"\n{'':<8}{'anchor loss':>12}{'weight':>8}")
for label, weight in report.weights.items():
    print(f"{label:<8}{report.notes['anchor loss'][label]:>12.2f}{weight:>8.2f}")

merges = {
    "the mean": sm.merge(clients, method=sm.mean()),
    "energy-matched": sm.merge(clients, method=sm.MatchEnergy(sm.mean())),
    "SAP": merged,
}
scores = {"the base": loss(Tower(), unseen).item()}
for name, one in merges.items():
    one.apply_to(model := Tower())
    scores[name] = loss(model, unseen).item()
print("\nloss on inputs that nobody has seen")
for name, value in scores.items():
    print(f"{name:<16}{value:.2f}")

figure = Figure(figsize=(6.4, 2.4), layout="constrained")
axes = figure.add_subplot()
axes.barh(list(scores), list(scores.values()), color=["#b8bec6", "#9ec3e6", "#9ec3e6", "#2f73b3"])
axes.invert_yaxis()
axes.set_xlabel("loss on unseen inputs (lower is better)")
axes.spines[["top", "right"]].set_visible(False)
figure.savefig("outlier.png", dpi=130)
