"""What flags may be given, so that `--help` need not import what it is about."""

from __future__ import annotations

__all__ = ["DTYPES", "ENGINES", "FORMATS", "LOSSES", "MODEL_DTYPES", "SPELLINGS"]

LOSSES = ("alignment", "centered_alignment", "contrastive", "entropy", "language_modeling")

# The keys of tables of the library; a test holds them equal.
DTYPES = ("float32", "bfloat16", "float16")
ENGINES = ("vllm", "sglang", "llama.cpp", "tgi", "diffusers")
FORMATS = ("peft", "kohya", "diffusers", "mlx", "torchtune")
SPELLINGS = ("input", "transformers 5", "transformers 4", "llava")

MODEL_DTYPES = ("auto", *DTYPES)
