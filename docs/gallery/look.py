"""# Look before you merge

Three adapters of one tiny language model: the first two share a direction, the third is loud.
`inspect` tells how they lie to each other, without data and without the base model. The picture
draws two of its tables: which adapter would drown the others, and which ones agree.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import sapmerge as sm


def adapter(folder: Path, seed: int, common: float, size: float) -> Path:
    """A LoRA whose factors share a part with those of the other adapters."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=64))
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    for number, (name, parameter) in enumerate(peft.named_parameters()):
        if "lora_" in name:
            shared = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            own = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(seed + number)
            )
            parameter.data = size * (common * shared + (1 - common**2) ** 0.5 * own)
    peft.save_pretrained(folder)
    return folder


work = Path(tempfile.mkdtemp())
paths = [
    adapter(work / "news", 100, common=0.9, size=0.1),
    adapter(work / "blogs", 200, common=0.9, size=0.1),
    adapter(work / "loud", 300, common=0.0, size=0.4),
]

found = sm.inspect(paths)
print(found)

# As pictures: one HTML file that loads nothing, with these two and more of them.
found.plot().save(work / "look.html")
print(f"\nlook.html: {(work / 'look.html').stat().st_size > 10_000 and 'written'}")

# Whose direction does a merge follow? The mean that of the loud one; with equal energies, all.
for method in (sm.mean(), sm.CapShare(sm.mean(), 1 / 3)):
    updates = dict(sm.merge(paths, method=method).updates())
    print(f"\n{method}")
    for path in paths:
        own = sm.Adapter.load(path)
        pairs = [(updates[name].dense(), own.update(name).dense()) for name in own.modules]
        product = sum(float((x * y).sum()) for x, y in pairs)
        norms = [sum(float((pair[k] ** 2).sum()) for pair in pairs) ** 0.5 for k in (0, 1)]
        print(f"cosine with {path.name:<6} {product / norms[0] / norms[1]:.2f}")

names, rows = [path.name for path in paths], range(len(paths))
energies = [[layer.energies[name] for layer in found.layers] for name in names]
cosines = [[found.cosine[one][other] for other in names] for one in names]
figure = Figure(figsize=(7.4, 2.5), layout="constrained")
left, right = figure.subplots(1, 2)
left.imshow([[value**0.5 for value in row] for row in energies], cmap="Blues", aspect="auto")
left.set(title="energy ‖D‖² by layer", xticks=range(3), xticklabels=["h.0", "h.1", "h.2"])
right.imshow(cosines, cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
right.set(title="cosine", xticks=rows, xticklabels=names)
for axes, values, form in ((left, energies, "{:.0f}"), (right, cosines, "{:+.2f}")):
    top = max(abs(value) for row in values for value in row)
    axes.set(yticks=rows, yticklabels=names)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            ink = "white" if abs(value) > 0.6 * top else "black"
            axes.text(x, y, form.format(value), ha="center", va="center", color=ink)
figure.savefig("look.png", dpi=130)
shutil.rmtree(work)
