"""The adapters that the server receives, in every setting: equal clients, and unequal ones."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dg.data import Domain, Task
from dg.encoders import Encoder
from dg.training import REGIMES, Regime, train

__all__ = ["SETTINGS", "Clients", "scaled_copy"]

SETTINGS = {
    "equal": "one client per source domain",
    "label noise": "one more client, trained on shuffled labels",
    "other task": "one more client, trained on another task's classes",
    "tiny": "one more client, with two images per class, and as many steps",
    "flipped": "one more client, which sends the negative of a good update",
    "scaled": "one more client, which sends ten times a good update",
    "12 clients": "every source's images dealt out to 12 clients, who make half of the usual steps",
    "48 clients": "every source's images dealt out to 48 clients, who make half of the usual steps",
}


@dataclass(frozen=True, eq=False)
class Clients:
    """Adapters of one task, regime and seed, trained when first asked for.

    Args:
        other: another task, for the client who solves that one.
        cache: folder of the checkpoints.
        init: "shared": all clients start from one random A; "own": each from its own.
    """

    encoder: Encoder
    task: Task
    other: Task | None
    regime: str
    seed: int
    cache: Path
    init: str = "shared"

    def received(self, target: str, setting: str) -> dict[str, Path]:
        """Label -> checkpoint, with `target` left out."""
        sources = [name for name in self.task.domains if name != target]
        if setting in ("12 clients", "48 clients"):
            return self._many(sources, int(setting.split()[0]))
        good = {name: self.own(name) for name in sources}
        return (
            good
            if setting == "equal"
            else good | self._odd(setting, sources[self.seed % len(sources)])
        )

    def own(self, domain: str) -> Path:
        """The adapter of one domain."""
        return self._fit(self._train(domain), domain)

    def together(self, target: str) -> Path:
        """One adapter on the data of all sources at once, with as many steps as one client:
        the upper reference.
        """
        sources = [name for name in self.task.domains if name != target]
        parts = [self._train(name) for name in sources]
        union = Domain(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
        regime = replace(self._regime, epochs=self._regime.epochs / len(sources))
        return self._fit(union, "together-without-" + target, regime)

    @property
    def _regime(self) -> Regime:
        return REGIMES[self.regime]

    @property
    def _folder(self) -> Path:
        seed = f"seed{self.seed}" + ("" if self.init == "shared" else f"-{self.init}")
        return self.cache / self.encoder.name / self.task.name / self.regime / seed

    def _train(self, domain: str) -> Domain:
        return self.task.split(domain, self.seed, self._regime.images)[0]

    def _fit(self, data: Domain, name: str, regime: Regime | None = None) -> Path:
        text, regime = self.task.text, regime or self._regime
        return train(self.encoder, data, text, regime, self.seed, self._folder / name, self.init)

    def _odd(self, setting: str, source: str) -> Mapping[str, Path]:
        data, regime = self._train(source), self._regime
        if setting == "label noise":
            order = torch.randperm(
                len(data.labels), generator=torch.Generator().manual_seed(self.seed)
            )
            return {
                "label-noise": self._fit(
                    Domain(data.images, data.labels[order]), f"label-noise-{source}"
                )
            }
        if setting == "tiny":
            index = torch.cat(
                [(data.labels == k).nonzero().flatten()[:2] for k in range(len(self.task.text))]
            )
            few = replace(regime, epochs=regime.epochs * len(data.labels) / len(index))
            return {"tiny": self._fit(data.take(index), f"tiny-{source}", few)}
        if setting == "flipped":
            return {
                "flipped": scaled_copy(-1.0, self.own(source), self._folder / f"flipped-{source}")
            }
        if setting == "scaled":
            return {
                "scaled": scaled_copy(10.0, self.own(source), self._folder / f"scaled-{source}")
            }
        if setting == "other task" and self.other is not None:
            domain = next(iter(self.other.domains))
            data = self.other.split(domain, self.seed, regime.images)[0]
            path = self._folder / f"other-{self.other.name}"
            return {
                "other-task": train(
                    self.encoder, data, self.other.text, regime, self.seed, path, self.init
                )
            }
        raise ValueError(
            f"setting {setting!r} is not one of {sorted(SETTINGS)}, or this task has no other task"
        )

    def _many(self, sources: list[str], count: int) -> dict[str, Path]:
        each, clients = count // len(sources), {}
        for name in sources:
            data = self._train(name)
            order = torch.randperm(
                len(data.labels), generator=torch.Generator().manual_seed(self.seed)
            )
            regime = replace(self._regime, epochs=self._regime.epochs * each / 2)
            for part in range(each):
                mine = data.take(order[part::each])
                clients[f"{name}-{part}"] = self._fit(mine, f"{name}-{part}-of-{each}", regime)
        return clients


def scaled_copy(factor: float, source: Path, path: Path) -> Path:
    """A copy of an adapter with its update times `factor`."""
    if not (path / "adapter_config.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        tensors = load_file(source / "adapter_model.safetensors")
        altered = {
            name: value * factor if "lora_B" in name else value for name, value in tensors.items()
        }
        save_file(altered, path / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(source / "adapter_config.json", path / "adapter_config.json")
    return path
