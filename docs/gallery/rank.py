"""# A rank for the result

TIES makes an update dense: an adapter file keeps only a part of it. How much, by rank, and what
`rank=` chooses: the inputs' rank by default, a share of energy, or the numerical rank. The mean of
three adapters of rank 8 has rank 24 and no more; the energy of TIES is spread over all 64.
"""

import warnings

import torch
from matplotlib.figure import Figure

import sapmerge as sm

warnings.simplefilter("ignore", sm.SapmergeWarning)  # of the energy kept, which is the subject here


def adapter(seed: int) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """An adapter in memory: (config, state_dict)."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"base_model.model.layers.{n}.q_proj.lora_{part}.weight": torch.randn(
            shape, generator=generator
        )
        for n in range(2)
        for part, shape in (("A", (8, 64)), ("B", (64, 8)))
    }
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return config, state


adapters = {"one": adapter(1), "two": adapter(2), "three": adapter(3)}

methods = {"mean()": sm.mean(), "ties(0.2)": sm.ties(0.2)}

print(f"{'method':<12} {'rank=':>8} {'rank':>6} {'energy kept':>12}")
for name, method in methods.items():
    for rank in (None, 4, 24, 0.9, "exact"):
        report = sm.merge(adapters, method=method, rank=rank).report
        kept = max(layer.rank for layer in report.layers)
        print(f"{name:<12} {rank!s:>8} {kept:>6} {report.energy_kept:>12.1%}")

figure = Figure(figsize=(6.4, 3.2), layout="constrained")
axes = figure.add_subplot()
ranks = list(range(1, 65))
looks = (("#2f73b3", 12, (-48, 4)), ("#c05a10", 30, (6, -14)))
for (name, method), (colour, at, shift) in zip(methods.items(), looks):
    reports = [sm.merge(adapters, method=method, rank=rank).report for rank in ranks]
    kept = [report.energy_kept for report in reports]
    axes.plot(ranks, kept, color=colour, linewidth=2)
    axes.annotate(name, (at, kept[at - 1]), shift, textcoords="offset points", color=colour)
for rank in (8, 24):
    axes.axvline(rank, color="#b8bec6", linewidth=1, zorder=0)
axes.set(xlabel="rank", ylabel="energy kept", xlim=(1, 64), ylim=(0, 1.02))
axes.set_xticks([1, 8, 24, 64], ["1", "8\nof an input", "24\nof all inputs", "64\nof the layer"])
axes.spines[["top", "right"]].set_visible(False)
figure.savefig("rank.png", dpi=130)
