"""What cannot work for so many adapters is refused before any work, and what works is not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from clients import passes
from held import SHAPE, adapters, matrices_per_adapter

import sapmerge as sm
from sapmerge.core.protocols import Method
from sapmerge.io import machine
from sapmerge.merging import needs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::sapmerge.errors.SapmergeWarning")
HELD = [
    "ties",
    "dare_ties",
    "consensus_ta",
    "sce",
    "knots",
    "core_space",
    "cart",
    "dc_merge",
    "iso_cts",
]
NOT_HELD = [
    "mean",
    "dare",
    "magnitude_prune",
    "breadcrumbs",
    "coordinate_median",
    "trimmed_mean",
    "iso_c",
    "clair",
]
RULES = {"MatchEnergy": "MatchEnergy(Chain(Mean()))", "ClipNorms": "ClipNorms(mean())"}
RULES |= {"WeighByAgreement": "WeighByAgreement(mean())"}


@pytest.mark.parametrize("name", [*HELD, *NOT_HELD])
def test_the_counts_are_what_a_merge_holds(name: str) -> None:
    """Measured; at most what it holds, so that nothing that works is refused."""
    method: Method = getattr(sm, name)()
    counted, measured = needs.matrices_held(method), matrices_per_adapter(method)
    assert counted <= measured + 0.05, (counted, measured)
    if name != "knots":  # the workspace of whose decomposition is larger than all that it holds
        assert measured < 1.6 * counted + 0.4, (counted, measured)


def test_a_method_of_which_one_at_a_time_runs_counts_once() -> None:
    ties = sm.ties()
    assert needs.matrices_held(ties) == 2
    assert needs.matrices_held(sm.ByModule({"q": ties, "v": sm.dare()}, ties)) == 2
    assert needs.matrices_held(sm.dare()) == 0
    assert needs.matrices_held(sm.MatchEnergy(ties)) == 2
    assert needs.matrices_held(sm.sap_original()) == 0  # factors are pruned, no entries
    assert needs.matrices_held(lambda layer: layer.updates[0]) == 0


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with 2.5 MB: 59 adapters of two matrices of 80 x 64 and their factors."""
    monkeypatch.setattr(needs, "memory_of", lambda _: 2_500_000)
    monkeypatch.setattr(needs, "ALWAYS", 0)


@pytest.mark.usefixtures("small_machine")
def test_too_many_for_the_memory_are_refused_by_name() -> None:
    each = 2 * 4 * SHAPE[0] * SHAPE[1] + 4 * 2 * sum(SHAPE)
    with pytest.raises(sm.LimitExceededError) as caught:
        sm.merge(adapters(100), method=sm.ties())
    said = str(caught.value)
    for part in ("Chain(Prune(scorer=Magnitude()", f"need {each / 1e4:.3g} MB for 100 adapters"):
        assert part in said
    for part in ("2.5 MB are there", "layer 'q' (80, 64) it holds 2 matrices", "coordinate_med"):
        assert part in said
    assert f"groups of at most {2_500_000 // each} " in said
    sm.merge(adapters(2_500_000 // each), method=sm.ties())
    with pytest.raises(sm.LimitExceededError):
        sm.merge(adapters(2_500_000 // each + 1), method=sm.ties())


def test_clair_holds_a_factor_of_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    some, need = adapters(50), 50 * 2 * (8 * SHAPE[0] + 4 * sum(SHAPE))
    monkeypatch.setattr(needs, "ALWAYS", 0)
    monkeypatch.setattr(needs, "memory_of", lambda _: need)
    sm.merge(some, method=sm.clair())
    monkeypatch.setattr(needs, "memory_of", lambda _: need - 1)
    with pytest.raises(sm.LimitExceededError, match="one factor of all layers"):
        sm.merge(some, method=sm.clair())
    sm.merge(some, method=sm.FlagContaminated(sm.mean(), tests=("norm",)))


@pytest.mark.usefixtures("small_machine")
def test_what_the_message_offers_works() -> None:
    some = adapters(150)
    for method in (sm.mean(), sm.coordinate_median(), sm.trimmed_mean()):
        merged = sm.merge(some, method=method, rank=4)
        assert dict(merged.updates())["q"].shape == SHAPE


@pytest.mark.usefixtures("small_machine")
def test_nothing_is_read_before_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    some = adapters(100)
    monkeypatch.setattr(sm.Adapter, "update", lambda *_: pytest.fail("an update was read"))
    with pytest.raises(sm.LimitExceededError):
        sm.merge(some, method=sm.knots())


def test_more_adapters_than_directions() -> None:
    some = adapters(65)
    with pytest.raises(sm.LimitExceededError, match="64 orthogonal directions, fewer than one"):
        sm.merge(some, method=sm.tsv())
    sm.merge(some[:64], method=sm.tsv())


def test_the_memory_of_this_machine() -> None:
    found = machine.memory_of(torch.device("cpu"))
    assert found is None or 1 << 28 < found < 1 << 48


def test_the_table_of_the_docs_is_what_is_counted(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \| ([\d.]+) \| (\d+) \| ([^|]+) \|$", text, re.MULTILINE)
    listed = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert {*HELD, *NOT_HELD, "tsv", "clair", "krum", "geometric_median", "fedit"} <= {*listed}
    for name, (_, reads, matrices, size) in listed.items():
        assert passes(RULES.get(name, f"{name}()"), tmp_path / name) == float(reads), name
        if name in RULES:
            assert matrices == "0"
            continue
        make = getattr(sm, name, None) or getattr(sm.federated, name)
        counted = needs.matrices_held(make())
        assert counted == int(matrices), name
        if counted:  # of 1,000 clients, in float32
            assert size.startswith(f"{counted * 4 * 768 * 3072 / 1e6:.0f} GB"), (name, size)
