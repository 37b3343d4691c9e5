"""# Eight methods on your own metric

`sm.compare` merges with every method, evaluates each merge on your model and says which differences
are more than noise. Here three adapters of a small classifier have learned the same change, each
with noise of its own; the metric is whether each of 400 test inputs is classified as the right
model does. Every method runs at its own length and at that of its inputs (`matched`).
"""

import torch
from torch import Tensor, nn

import sapmerge as sm

SIDE, CLASSES, RANK = 32, 10, 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE)
        self.head = nn.Linear(SIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


LAYERS = ("first", "second")


def update(seed: int, size: float) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (
            size * random(SIDE, RANK, seed=seed + k),
            size * random(RANK, SIDE, seed=seed + 10 + k),
        )
        for k, name in enumerate(LAYERS)
    }


def adapter(seed: int) -> tuple[dict[str, object], dict[str, Tensor]]:
    """What all have learned, and noise: (config, state_dict)."""
    state = {}
    for name in LAYERS:
        (B, A), (noise_B, noise_A) = update(100, 0.3)[name], update(seed, 0.2)[name]
        state[f"base_model.model.{name}.lora_B.weight"] = torch.cat((B, noise_B), 1)
        state[f"base_model.model.{name}.lora_A.weight"] = torch.cat((A, noise_A), 0)
    config = {"peft_type": "LORA", "r": 2 * RANK, "lora_alpha": 2 * RANK}
    named = {"target_modules": list(LAYERS), "base_model_name_or_path": "somebody/classifier"}
    return {**config, **named}, state


adapters = {name: adapter(200 + 50 * k) for k, name in enumerate(("one", "two", "three"))}
right = Classifier()
for name, (B, A) in update(100, 0.3).items():
    getattr(right, name).weight.data += B @ A
inputs = random(400, SIDE, seed=1)
with torch.no_grad():
    truth = right(inputs).argmax(-1)


def accuracy(model: nn.Module) -> Tensor:
    return (model(inputs).argmax(-1) == truth).float()  # one number per input: 1 is right


methods = ["mean", "task_arithmetic", "ties", "dare", "knots", "tsv", "iso_c", "geometric_median"]
table = sm.compare(adapters, methods, model=Classifier(), evaluate=accuracy)
print(table)
table.plot("leaderboard.png")
