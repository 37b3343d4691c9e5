"""# Eight methods on one layer

A method is a function of the updates of one layer, so it can be looked at without any file. Two
updates that agree in part, and what eight methods make of them: the norm of the result beside the
mean norm of the inputs, its cosine with each input, and the energy that rank 4 can hold. They
differ more in length than in direction: that is why `sm.compare` runs each at matched length, too.
"""

import torch
from matplotlib.figure import Figure

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
rows: dict[str, list[float]] = {}
size = sum(float(matrix.norm()) for matrix in inputs) / 2
print(f"{'':<20} {'norm':>6} {'cos 1':>6} {'cos 2':>6} {'energy at rank 4':>17}")
for name, method in methods.items():
    merged = sm.on_one_layer(method, layer).dense()
    spectrum = torch.linalg.svdvals(merged) ** 2
    row = [float(merged.norm()) / size, *(cosine(merged, matrix) for matrix in inputs)]
    kept = float(spectrum[:4].sum() / spectrum.sum())
    print(f"{name:<20} " + " ".join(f"{value:6.2f}" for value in row) + f" {kept:16.0%}")
    rows[name] = [*row, kept]

figure = Figure(figsize=(7.4, 3), layout="constrained")
panels = figure.subplots(1, 3, sharey=True)
for axes, title, column in zip(panels, ("norm", "cosine with one", "energy at rank 4"), (0, 1, 3)):
    axes.barh(list(rows), [row[column] for row in rows.values()], color="#2f73b3", height=0.6)
    axes.set(title=title, xlim=(0, 2.4 if column == 0 else 1.05), xticks=(0, 0.5, 1))
    axes.axvline(1, color="#5a646e", linewidth=1)  # the inputs' own
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_xticks([0, 1, 2])
panels[0].invert_yaxis()
figure.savefig("methods.png", dpi=130)
