"""The pure kernels that a mean, cut to a lower rank, cannot do without;
and, apart, what sapmerge does besides.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from safetensors import safe_open

from speed.child import Clock, write_factors

__all__ = ["BESIDES", "NEEDED", "run"]

NEEDED = ("reading", "QR", "small SVD", "writing")
BESIDES = ("three SHA-256 of the inputs", "inner products and norms for the report")


def run(job: dict[str, Any], clock: Clock) -> None:
    files = [safe_open(f"{folder}/adapter_model.safetensors", "pt") for folder in job["adapters"]]
    merged: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    keys = files[0].keys()
    names = [key.removesuffix(".lora_A.weight") for key in keys if key.endswith("lora_A.weight")]
    for name in names:
        with clock.part("reading"):
            A = torch.cat([file.get_tensor(f"{name}.lora_A.weight") for file in files]).double()
            B = torch.cat([file.get_tensor(f"{name}.lora_B.weight") for file in files], 1).double()
        with clock.part("QR"):
            Qb, Rb = torch.linalg.qr(B)
            Qa, Ra = torch.linalg.qr(A.T)
        with clock.part("small SVD"):
            U, s, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
        keep = job["rank"]
        left, right = Qb @ (U[:, :keep] * s[:keep]), Vh[:keep] @ Qa.T
        merged[name.removeprefix("base_model.model.")] = (
            left.to(torch.float32),
            right.to(torch.float32),
        )
        with clock.part(BESIDES[1]):
            ((A @ A.T) * (B.T @ B)).sum()
            ((A @ A.T) * (B.T @ B)).sum()
    with clock.part("writing"):
        write_factors(job["out"], merged)
    for folder in job["adapters"]:
        with open(f"{folder}/adapter_model.safetensors", "rb") as file:
            data = file.read()
        with clock.part(BESIDES[0], 3):
            hashlib.sha256(data).hexdigest()
