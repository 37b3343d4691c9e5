"""# Eight methods on one layer

A method is a function of the updates of one layer, so it can be looked at without any file. Two
updates that agree in part, and what eight methods make of them: the norm of the result beside the
mean norm of the inputs, its cosine with each input, and the energy that rank 4 can hold.
"""

import torch

import sapmerge as sm

generator = torch.Generator().manual_seed(0)


def factors(m: int, n: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.randn(m, rank, generator=generator),
        torch.randn(rank, n, generator=generator),
    )


(B, A), (B1, A1), (B2, A2) = factors(48, 40), factors(48, 40), factors(48, 40)
one, two = sm.LowRank(B + 0.5 * B1, A + 0.5 * A1), sm.LowRank(B + 0.5 * B2, A + 0.5 * A2)
layer = sm.Layer("layer", (one, two))

methods = {
    "mean": sm.mean(),
    "energy-matched mean": sm.MatchEnergy(sm.mean()),
    "task arithmetic": sm.task_arithmetic(),
    "ties(0.2)": sm.ties(0.2),
    "dare(0.5)": sm.dare(0.5),
    "knots, ties": sm.knots(),
    "tsv": sm.tsv(),
    "iso_c": sm.iso_c(),
}


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / x.norm() / y.norm())


inputs = [update.dense() for update in layer]
size = sum(float(matrix.norm()) for matrix in inputs) / 2
print(f"{'':<20} {'norm':>6} {'cos 1':>6} {'cos 2':>6} {'energy at rank 4':>17}")
for name, method in methods.items():
    merged = sm.on_one_layer(method, layer).dense()
    spectrum = torch.linalg.svdvals(merged) ** 2
    row = [float(merged.norm()) / size, *(cosine(merged, matrix) for matrix in inputs)]
    kept = float(spectrum[:4].sum() / spectrum.sum())
    print(f"{name:<20} " + " ".join(f"{value:6.2f}" for value in row) + f" {kept:16.0%}")
