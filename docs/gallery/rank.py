"""# A rank for the result

TIES makes an update dense: an adapter file keeps only a part of it. How much, by rank, and what
`rank=` chooses: the inputs' rank by default, a share of energy, or the numerical rank.
"""

import warnings

import torch

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

print(f"{'method':<12} {'rank=':>8} {'rank':>6} {'energy kept':>12}")
for name, method in (("mean()", sm.mean()), ("ties(0.2)", sm.ties(0.2))):
    for rank in (None, 4, 24, 0.9, "exact"):
        report = sm.merge(adapters, method=method, rank=rank).report
        kept = max(layer.rank for layer in report.layers)
        print(f"{name:<12} {rank!s:>8} {kept:>6} {report.energy_kept:>12.1%}")
