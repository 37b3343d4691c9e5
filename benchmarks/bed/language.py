"""The family that is no image: a small language model,
and kinds of text that a machine has at hand.

SmolLM2-135M-Instruct (Apache-2.0), its weights dequantised from 4 bits, as a transformers folder;
adapters of rank 8 on the upper half of its blocks. What counts is the share of next tokens that are
predicted rightly.
"""

from __future__ import annotations

import copy
import gettext
import gzip
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from dg.data import Domain, Task
from torch import Tensor, nn

import sapmerge as sm
from bed.families import LANGUAGE
from bed.training import ALPHA, RANK, generator
from bed.trial import Server

__all__ = ["Language", "LanguageServer"]

LENGTH, TEST, STEPS, BATCH, ANCHORS = 64, 40, 30, 8, 32
RATES = {"A": (120, 3e-4), "M": (60, 1e-3), "B": (30, 2e-3)}
"""Passages and learning rate of the three regimes."""


def texts() -> dict[str, Iterator[str]]:
    """Kind -> texts of it on this machine, in the order of their paths."""

    def read(root: str, pattern: str) -> Iterator[str]:
        for path in sorted(Path(root).rglob(pattern)):
            if path.is_file():
                with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                    yield file.read(20_000).decode("utf-8", "ignore")

    def manuals() -> Iterator[str]:
        for text in read("/usr/share/man/man1", "*.gz"):
            lines = [
                re.sub(r"\\f.|\\", "", line)
                for line in text.splitlines()
                if not line.startswith((".", "'"))
            ]
            yield "\n".join(lines)[1000:4000]

    def french() -> Iterator[str]:
        for path in sorted(Path("/usr/share/locale/fr/LC_MESSAGES").glob("*.mo")):
            with path.open("rb") as file:
                # the only way to all of them
                messages = gettext.GNUTranslations(file)._catalog.values()
            yield "\n".join(text for text in islice(messages, 1, 80) if isinstance(text, str))

    return {
        "python": read(sysconfig.get_paths()["stdlib"], "*.py"),
        "licences": read("/usr/share/common-licenses", "*"),
        "manuals": manuals(),
        "french": french(),
        "shell": read("/usr", "*.sh"),
        "anchors": read("/usr/share/doc", "README*"),
    }


@dataclass(frozen=True, eq=False)
class Language:
    """The model, the kinds of text, and adapters that are trained when first asked for.

    Args:
        folder: of the transformers model.
        cache: of passages and checkpoints.
    """

    folder: Path
    cache: Path

    @cached_property
    def whole(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def upper(self) -> nn.Module:
        """The same model without the lower half of its blocks; takes `inputs_embeds`."""
        model = copy.deepcopy(self.whole)
        model.model.layers = model.model.layers[len(model.model.layers) // 2 :]
        model.config.use_cache = False
        return model.requires_grad_(False)

    @cached_property
    def task(self) -> Task:
        """Hidden states of the middle as "images", token ids as labels."""
        path = self.cache / "tokens" / f"{LANGUAGE}.pt"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({name: self._passages(some) for name, some in texts().items()}, path)
        kept = torch.load(path)
        anchors = Domain(*kept.pop("anchors"))
        domains = {name: Domain(*both) for name, both in sorted(kept.items())}
        return Task(LANGUAGE, domains, torch.zeros(0), anchors.images, anchors.labels)

    @torch.no_grad()
    def _passages(self, some: Iterator[str], count: int = 220) -> tuple[Tensor, Tensor]:
        from transformers import AutoTokenizer

        tokenizer, rows = AutoTokenizer.from_pretrained(self.folder), list[Tensor]()
        for text in some:
            ids = tokenizer(text, return_tensors="pt").input_ids[0]
            # few from each text
            rows += list(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[:12])
            if len(rows) >= count:
                break
        ids = torch.stack(rows[:count])
        middle = len(self.whole.model.layers) // 2
        with torch.autocast("cpu", torch.bfloat16):
            hidden = [
                self.whole(part, output_hidden_states=True).hidden_states[middle]
                for part in ids.split(10)
            ]
        return torch.cat(hidden).bfloat16(), ids

    def split(self, domain: str, seed: int, train: int) -> tuple[Domain, Domain]:
        """Training and test passages; which are tested does not depend on the seed."""
        found = self.task.domains[domain]
        order = torch.randperm(len(found.labels), generator=generator(f"{LANGUAGE} {domain}"))
        rest = order[TEST:]
        mixed = rest[torch.randperm(len(rest), generator=generator(f"{LANGUAGE} {domain} {seed}"))]
        return found.take(mixed[:train]), found.take(order[:TEST])

    def server(self, target: str, regime: str, init: str, seed: int) -> tuple[LanguageServer, Path]:
        """The server, and the adapter of the target itself."""
        fitted = {name: self._fit(name, regime, init, seed) for name in self.task.domains}
        own = fitted.pop(target)
        test = self.split(target, seed, 0)[1]
        return LanguageServer(self.upper, self.task, fitted, frozenset(), test, seed), own

    def _fit(self, domain: str, regime: str, init: str, seed: int) -> Path:
        from peft import LoraConfig, get_peft_model

        path = self.cache / "adapters" / LANGUAGE / f"{regime}-{init}-{seed}" / domain
        if (path / "adapter_config.json").exists():
            return path
        passages, rate = RATES[regime]
        data, _ = self.split(domain, seed, passages)
        start = f"{LANGUAGE} {seed}" if init == "shared" else f"{LANGUAGE} {seed} {domain}"
        torch.manual_seed(int(generator(start).initial_seed() % 2**31))
        targets = [
            name
            for name, module in self.upper.named_modules()
            if isinstance(module, nn.Linear) and "layers" in name
        ]
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
        model = get_peft_model(copy.deepcopy(self.upper), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        shuffle = generator(f"{LANGUAGE} {seed} {domain}")
        passes = -(-STEPS * BATCH // passages)
        order = torch.cat([torch.randperm(passages, generator=shuffle) for _ in range(passes)])
        for rows in order[: STEPS * BATCH].view(STEPS, BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(inputs_embeds=data.images[rows].float(), labels=data.labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(path)
        return path


class LanguageServer(Server):
    """A server whose images are passages."""

    @torch.no_grad()
    def right(self, updates: dict[str, sm.Update], factor: float = 1.0) -> Tensor:
        """Which next tokens are named rightly: (passages * (LENGTH - 1),) bool."""
        model = copy.deepcopy(self.half)
        for name, update in updates.items():
            model.get_submodule(name).weight.add_(update.dense(), alpha=factor)
        model = model.bfloat16()
        guessed = torch.cat(
            [model(inputs_embeds=part).logits.argmax(-1) for part in self.test.images.split(8)]
        )
        return (guessed[:, :-1] == self.test.labels[:, 1:]).flatten()

    def _loader(self, count: int, batch: int = 8) -> list[dict[str, Tensor]]:
        hidden, ids = self.task.anchors(self.seed, count)
        parts = zip(hidden.split(batch), ids.split(batch), strict=True)
        return [{"inputs_embeds": some.float(), "labels": labels} for some, labels in parts]

    def _embedded(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    losses = (sm.losses.language_modeling,)
