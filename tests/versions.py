"""Tests that need more of a package than its lowest supported version gives."""

from __future__ import annotations

import peft
import pytest
import torch
from packaging.version import Version

OLD_TORCH = Version(torch.__version__) < Version("2.10")

needs_peft_21 = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"),
    reason="PEFT before 0.21 is no oracle here: it saves no biases, takes no single number of a "
    "layer, and its combination_type='svd' is another one",
)
needs_pickles = pytest.mark.skipif(
    OLD_TORCH, reason="torch before 2.10 has holes in weights_only loading: pickles are refused"
)
