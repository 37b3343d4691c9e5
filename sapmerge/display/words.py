"""What the parts of a method record, in words for a heading and a sentence."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["form_of", "sentence_of", "title_of"]

_WORDS = {
    "density": ("Density", "the share of units that pruning kept"),
    "saliency": ("Saliency", "the sum of all scores: how much the anchors' loss depends on it"),
    "score_kept": ("Saliency kept", "the share of the scores that the kept units have"),
    "anchor_stability": (
        "Mask stability",
        "how far the masks of two halves of the anchors overlap; chance is the density",
    ),
    "anchor_weights": ("Weight by anchors", "from the anchors' loss at base + adapter"),
    "agreement": ("Weight by agreement", "from the cosines with the other adapters"),
    "losses_by_length": (
        "Loss over length",
        "the anchors' loss at base + s times the merged update",
    ),
    "coefficients": ("Coefficient", "of the adapter in the merge"),
    "energy_factor": ("Factor of energy", "by which the merged update was lengthened"),
    "length": ("Length by anchors", "the factor that the anchors chose"),
    "depth_factor": ("Factor of depth", "by which the block was scaled"),
    "consensus_density": ("Consensus", "the share of entries that enough adapters agree on"),
    "clipped": ("Clipped to", "the factor by which a loud adapter was shortened"),
    "capped": ("Capped to", "the factor by which a loud adapter was shortened"),
    "excluded": ("Left out", "adapters that the anchors and the others speak against"),
    "contaminated": ("Contaminated", "adapters outside of what the others share"),
    "digests": ("sha256", ""),
    "anchors": ("Anchors", "how many"),
    "loss": ("Loss", "of the anchors"),
}
_SHARES = {
    "density",
    "score_kept",
    "anchor_stability",
    "agreement",
    "anchor_weights",
    "consensus_density",
    "trimmed",
    "emr_mask",
}


def title_of(key: str) -> str:
    """A heading."""
    return _WORDS[key][0] if key in _WORDS else key.replace("_", " ").capitalize()


def sentence_of(key: str) -> str:
    """What it is; nothing for what is not known here."""
    return _WORDS[key][1] if key in _WORDS else ""


def form_of(key: str) -> Callable[[float], str]:
    """How its values are written."""
    return (lambda value: f"{value:.1%}") if key in _SHARES else (lambda value: f"{value:.3g}")
