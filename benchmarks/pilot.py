"""Pilot in small: does a client gain from the others by its two stages and its two aggregations?

    python benchmarks/pilot.py            # minutes on two CPU cores
    python benchmarks/pilot.py --quick    # a minute: it runs; the numbers mean nothing

Four clients, two tasks, four visual styles of handwritten digits. A tiny LLaVA is trained to name
digits in a generic style. Two clients then answer "which digit?" in ink and in chalk, two "how
large, and even?" in colour and in outline. Local and FedAvg train a LoRA of the language model and
the projector; Pilot trains two connector adapters (stage 1), then the mixture over tasks and the
LoRA (stage 2), in as many steps. Losses are measured on held-out digits of the client's own task,
in the styles of both of its clients.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tables import provenance, table, write
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import sapmerge as sm
from sapmerge.demo.data import Digits, generator, load_digits, split
from sapmerge.demo.domains import DOMAINS, SIZE, Style, generic, render
from sapmerge.federated import (
    MixtureOfAdapters,
    TwoAdapters,
    balance_loss,
    difference_loss,
    z_loss,
)

WIDTH, PATCHES, BATCH = 64, 16, 32
IMAGE, START, QUESTIONS, ANSWERS = 1, 0, 2, 8
"""Ids of tokens: the image's, the first, and where those of questions and answers begin."""
CLIENTS = {"ink": "name", "chalk": "name", "colour": "kind", "outline": "kind"}
"""Style -> task."""
TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "read": lambda digit: digit,
    "name": lambda digit: 9 - digit,  # another word for every digit than the base has learnt
    "kind": lambda digit: 10 + 2 * (digit > 4) + digit % 2,
}
"""Task -> number of the answer, from the digit. The first is what the base is trained on."""
DIFFERENCE, BALANCE, Z = 1e-4, 0.1, 0.1
T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365, 10: 2.262}
"""Of Student's distribution, by the number of seeds."""


@dataclass(frozen=True)
class Plan:
    """How long to train, and at what rate."""

    seeds: int = 3
    vision: int = 400
    base: int = 120
    first: int = 40
    second: int = 80
    rate: float = 2e-3


class Connector(nn.Module):
    """One of Pilot's modules as LLaVA's projector, which keeps what the losses need."""

    def __init__(self, inner: TwoAdapters | MixtureOfAdapters) -> None:
        super().__init__()
        self.inner = inner
        self.penalty = torch.zeros(())

    def forward(self, h: Tensor) -> Tensor:
        if isinstance(self.inner, TwoAdapters):
            x_t, x_s = self.inner.both(h)
            self.penalty = DIFFERENCE * difference_loss(x_t, x_s)
            return x_t + x_s
        mixed = self.inner.mixed(h)
        self.penalty = BALANCE * balance_loss(mixed.probabilities) + Z * z_loss(mixed.logits)
        return mixed.x


def tiny_llava(seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    tower: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, num_hidden_layers=3, image_size=SIZE, patch_size=8),
        text_config=LlamaConfig(**tower, num_hidden_layers=2, vocab_size=32, initializer_range=0.1),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
    )
    return LlavaForConditionalGeneration(config).eval()


def batch_of(digits: Digits, style: Style, task: str, rng: torch.Generator) -> dict[str, Tensor]:
    """Start, image, question; the answer is the next token."""
    question = QUESTIONS + list(TASKS).index(task)
    ids = torch.tensor([START] + [IMAGE] * PATCHES + [question]).expand(len(digits), -1)
    images = render(digits.images, style, rng)
    return {
        "pixel_values": images,
        "input_ids": ids,
        "answer": ANSWERS + TASKS[task](digits.labels),
    }


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "answer"}
    logits = model(**inputs, use_cache=False).logits[:, -1]
    return F.cross_entropy(logits, batch["answer"])


def fit(
    model: Any,
    batches: Callable[[], dict[str, Tensor]],
    steps: int,
    rate: float,
    penalty: Any = None,
) -> None:
    """Adam with one cycle of rates; `penalty()` is added to the loss."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        loss = loss_of(model, batches())
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()
        schedule.step()


def fit_vision(
    tower: Any, batches: Callable[[], dict[str, Tensor]], steps: int, rate: float
) -> None:
    """Digits from the mean patch of the layer that LLaVA reads; then the tower is frozen."""
    head = nn.Linear(WIDTH, 10)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        batch = batches()
        states = tower(pixel_values=batch["pixel_values"], output_hidden_states=True).hidden_states
        loss = F.cross_entropy(head(states[-2][:, 1:].mean(1)), batch["answer"] - ANSWERS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tower.requires_grad_(False)


def sampler(digits: Digits, style: Style, task: str, rng: torch.Generator) -> Callable[[], Any]:
    """Batches with replacement."""
    return lambda: batch_of(
        digits.take(torch.randint(len(digits), (BATCH,), generator=rng)), style, task, rng
    )


def projector_of(model: Any) -> Any:
    return model.model.multi_modal_projector


def as_two(projector: Any) -> TwoAdapters:
    """Begins as the base's projector: psi_s is that, psi_t adds nothing yet."""
    made = TwoAdapters(WIDTH, WIDTH)
    for psi in (made.psi_t, made.psi_s):
        psi[0].load_state_dict(projector.linear_1.state_dict())
        psi[2].load_state_dict(projector.linear_2.state_dict())
    for parameter in made.psi_t[2].parameters():
        nn.init.zeros_(parameter)
    return made


def with_lora(model: Any) -> Any:
    """The model with a LoRA of its language model, and its connector saved whole."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = "tiny-llava"
    return adapted


def connector_in(adapted: Any) -> Any:
    return adapted.base_model.model.model.multi_modal_projector.modules_to_save["default"]


class Federation:
    """One seed: a base, four clients, and what the server makes of their uploads."""

    def __init__(self, seed: int, plan: Plan, folder: Path) -> None:
        self.seed, self.plan, self.folder = seed, plan, folder
        digits = load_digits()
        parts = split(digits.labels, 16, seed)
        self.test = digits.take(parts.test[:200])
        self.own = {style: digits.take(parts.sources[style]) for style in CLIENTS}
        self.base = tiny_llava(seed)
        rng = generator(seed, "pilot base")
        batches = sampler(digits.take(parts.train), generic, "read", rng)
        fit_vision(self.base.model.vision_tower, batches, plan.vision, plan.rate)
        fit(self.base, batches, plan.base, plan.rate)
        self.base.requires_grad_(False)

    def batches(self, client: str, stage: str) -> Callable[[], Any]:
        rng = generator(self.seed, "pilot", client, stage)
        return sampler(self.own[client], DOMAINS[client], CLIENTS[client], rng)

    def plain(self, client: str) -> Path:
        """LoRA and projector, all steps."""
        torch.manual_seed(self.seed)
        adapted = with_lora(copy.deepcopy(self.base))
        steps = self.plan.first + self.plan.second
        fit(adapted, self.batches(client, "plain"), steps, self.plan.rate)
        return self.saved(adapted, f"plain-{client}")

    def stage_one(self, client: str) -> TwoAdapters:
        torch.manual_seed(self.seed)
        model = copy.deepcopy(self.base)
        connector = Connector(as_two(projector_of(model)))
        model.model.multi_modal_projector = connector
        batches, plan = self.batches(client, "one"), self.plan
        fit(model, batches, plan.first, plan.rate, lambda: connector.penalty)
        inner = connector.inner
        assert isinstance(inner, TwoAdapters)
        return inner

    def stage_two(self, client: str, mixture: MixtureOfAdapters) -> Path:
        torch.manual_seed(self.seed)
        model = copy.deepcopy(self.base)
        model.model.multi_modal_projector = Connector(mixture)
        adapted = with_lora(model)
        connector = connector_in(adapted)
        for frozen in (connector.inner.psi_s, connector.inner.others):  # PEFT has thawed them
            frozen.requires_grad_(False)
        batches, plan = self.batches(client, "two"), self.plan
        fit(adapted, batches, plan.second, plan.rate, lambda: connector.penalty)
        return self.saved(adapted, f"pilot-{client}")

    def saved(self, adapted: Any, name: str) -> Path:
        adapted.save_pretrained(self.folder / name, save_embedding_layers=False)
        return self.folder / name

    def loss(self, client: str, adapter: Path | None, mixture: MixtureOfAdapters | None) -> float:
        """On the held-out digits in both styles of the client's task."""
        model = copy.deepcopy(self.base)
        if mixture is not None:
            model.model.multi_modal_projector = Connector(mixture)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        styles = [style for style, task in CLIENTS.items() if task == CLIENTS[client]]
        rng = generator(self.seed, "pilot test")
        with torch.no_grad():
            found = [
                float(loss_of(model, batch_of(self.test, DOMAINS[style], CLIENTS[client], rng)))
                for style in styles
            ]
        return sum(found) / len(found)


def mean_of(modules: Sequence[nn.Sequential]) -> nn.Sequential:
    """The mean of the parameters: what the server does to psi_t of one task."""
    made = copy.deepcopy(modules[0])
    states = [module.state_dict() for module in modules]
    made.load_state_dict({k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]})
    return made


def one_seed(seed: int, plan: Plan, folder: Path) -> dict[str, dict[str, float]]:
    """Method -> client -> own-task loss."""
    fed = Federation(seed, plan, folder)
    plain = {client: fed.plain(client) for client in CLIENTS}
    sm.merge(plain, method=sm.mean(), modules_to_save="mean", progress=False).save_pretrained(
        folder / "fedavg"
    )
    two = {client: fed.stage_one(client) for client in CLIENTS}
    tasks = sorted(set(CLIENTS.values()))
    of_task = {
        task: mean_of([two[client].psi_t for client in CLIENTS if CLIENTS[client] == task])
        for task in tasks
    }
    mixtures: dict[str, MixtureOfAdapters] = {}
    for client, task in CLIENTS.items():
        own = copy.deepcopy(two[client])
        own.psi_t = copy.deepcopy(of_task[task])
        mixtures[client] = MixtureOfAdapters(own, [of_task[t] for t in tasks if t != task])
    uploads = {client: fed.stage_two(client, mixtures[client]) for client in CLIENTS}
    found = {
        "base": {client: fed.loss(client, None, None) for client in CLIENTS},
        "local": {client: fed.loss(client, plain[client], None) for client in CLIENTS},
        "FedAvg": {client: fed.loss(client, folder / "fedavg", None) for client in CLIENTS},
        "Pilot, before the server": {
            client: fed.loss(client, uploads[client], mixtures[client]) for client in CLIENTS
        },
    }
    for distance in ("euclidean", "cosine"):
        W = sm.federated.neighbours(uploads, count=2, distance=distance)
        parent = folder / distance
        sm.federated.pilot(uploads, CLIENTS, W).save_pretrained(parent)
        found[f"Pilot, {distance}"] = {
            client: fed.loss(client, parent / client, mixtures[client]) for client in CLIENTS
        }
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and half of its 95 % interval over seeds."""
    if len(values) not in T_95:
        return f"{statistics.mean(values):.3f}"
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, few steps")
    quick = parser.parse_args().quick
    plan = Plan(seeds=2, vision=20, base=20, first=5, second=10) if quick else Plan()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    started, seeds = time.process_time(), list[dict[str, dict[str, float]]]()
    for seed in range(plan.seeds):
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seeds.append(one_seed(seed, plan, Path(scratch)))
        print(f"seed {seed}: {time.process_time() - started:.0f} s", flush=True)

    def average(found: dict[str, dict[str, float]], method: str) -> float:
        return sum(found[method].values()) / len(CLIENTS)

    rows = [
        [
            method,
            *(f"{statistics.mean(found[method][c] for found in seeds):.3f}" for c in CLIENTS),
            f"{statistics.mean(average(found, method) for found in seeds):.3f}",
            ""
            if method == "FedAvg"
            else interval([average(f, method) - average(f, "FedAvg") for f in seeds]),
            ""
            if method == "local"
            else interval([average(f, method) - average(f, "local") for f in seeds]),
        ]
        for method in seeds[0]
    ]
    columns = [f"{client} ({task})" for client, task in CLIENTS.items()]
    head = ["own-task loss", *columns, "mean", "minus FedAvg", "minus local"]
    setting = (
        f"{plan.seeds} seeds; vision tower {plan.vision} steps, base {plan.base}, stage 1 "
        f"{plan.first}, stage 2 {plan.second} "
        "(local and FedAvg: their "
        f"sum), batch {BATCH}; two neighbours; {time.process_time() - started:.0f} CPU seconds. "
        "Differences are of the mean "
        "over clients, with 95 % intervals over seeds (Student). One toy setting: it says that the "
        "pieces work together, "
        "not how Pilot does on LLaVA."
    )
    if quick:
        print(table(head, rows))
    else:
        write(
            "pilot",
            "Pilot in small",
            provenance("peft", "transformers"),
            setting,
            table(head, rows),
        )


if __name__ == "__main__":
    main()
