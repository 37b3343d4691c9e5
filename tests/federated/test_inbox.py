"""The inbox of a round: what it keeps, what it refuses, and what a merge makes of it."""

from __future__ import annotations

import io
import json
import random
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from transformers import CLIPConfig, CLIPModel

import sapmerge as sm
from sapmerge import cli
from sapmerge.federated import Inbox, MergeState
from sapmerge.federated.entries import capped
from tests.federated.helpers import ALL, SMALL, pair, uploads, zoo
from tests.models import BASE, products, save_lora


def inbox(folder: Path, **options: Any) -> Inbox:
    return Inbox(folder / "round", **{"base_model": BASE, "model": zoo(), **options})


def merged_bytes(box: Inbox, out: Path, **options: Any) -> bytes:
    box.merge(**{"method": sm.mean(), **options}).save_pretrained(out)
    return (out / "adapter_model.safetensors").read_bytes()


def test_every_form_of_an_upload_is_the_same_upload(tmp_path: Path) -> None:
    [folder] = uploads(tmp_path, 1)
    config, weights = (
        (folder / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", config)
        archive.writestr("adapter_model.safetensors", weights)
    box = inbox(tmp_path)
    forms: list[object] = [
        folder,
        str(folder),
        packed.getvalue(),
        (config, weights),
        (config.decode(), weights),
        pair(0),
    ]
    digests = set()
    for number, form in enumerate(forms):
        outcome = box.add(form, f"c{number}")
        assert outcome, outcome
        digests.add(outcome.digest)
    assert digests == {sm.Adapter.load(folder).digest}


def test_numbers_of_arrays_make_the_same_contract(tmp_path: Path) -> None:
    made = inbox(tmp_path, max_rank=np.int64(8), quorum=np.int32(2), max_share=np.float32(0.5))
    again = inbox(tmp_path, max_rank=8, quorum=2, max_share=0.5)
    assert made.contract.to_dict() == again.contract.to_dict()
    folders = uploads(tmp_path, 3)
    counted = sm.federated.neighbours(folders, 2, np.array([7, 9, 4]))
    assert counted.tolist() == sm.federated.neighbours(folders, 2, [7, 9, 4]).tolist()


def test_a_merge_is_the_mean_by_samples(tmp_path: Path) -> None:
    """Against the tensors of the files, dense, with the weights written out."""
    folders = uploads(tmp_path, 3)
    box = inbox(tmp_path)
    for folder, samples in zip(folders, np.array([100, 300, 200])):
        assert box.add(folder, folder.name, samples)
    found = dict(box.merge(method=sm.mean()).updates())
    for name, update in found.items():
        wanted = sum(
            w * products(folder, 2.0)[name] for w, folder in zip((1 / 6, 1 / 2, 1 / 3), folders)
        )
        assert torch.allclose(update.dense().double(), wanted, atol=1e-6)
    assert box.clients == {"client0": 100, "client1": 300, "client2": 200}
    assert box.missing(["client1", "client7"]) == ["client7"]
    assert [row.weight for row in box.report.clients] == pytest.approx([1 / 6, 1 / 2, 1 / 3])


@pytest.mark.parametrize(
    ("samples", "share", "wanted"),
    [
        ((1, 1), 0.5, (1, 1)),
        ((100, 1), 0.5, (1, 1)),
        ((10**9, 100, 100), 0.5, (200, 100, 100)),
        ((10**9, 10**9, 100, 100), 0.4, (400, 400, 100, 100)),
        ((10**9, 1, 1), 0.1, (1, 1, 1)),
        ((5,), 0.5, (5,)),
        ((9, 7, 5), 1.0, (9, 7, 5)),
        ((6, 3, 2, 1), 0.5, (6, 3, 2, 1)),
    ],
)
def test_samples_are_capped(
    samples: tuple[int, ...], share: float, wanted: tuple[float, ...]
) -> None:
    assert capped(samples, share) == pytest.approx(wanted)


def test_bytes_do_not_depend_on_the_order_of_arrival(tmp_path: Path) -> None:
    folders = uploads(tmp_path, 4)
    results = set()
    for number, order in enumerate(((0, 1, 2, 3), (3, 1, 0, 2))):
        box = Inbox(tmp_path / f"round{number}", model=zoo())
        for k in order:
            box.add(folders[k], f"c{k}", 10 + k)
        box.add(tmp_path / "nowhere", "late")
        config, state = pair(9)
        for _ in range(2):
            outcome = box.add(
                (config, {name: tensor * float("nan") for name, tensor in state.items()}), "bad"
            )
            assert not outcome
            assert outcome.reason.startswith("the upload, adapter_model.safetensors: tensor")
        assert len(box.report.refused) == 2
        data = merged_bytes(box, tmp_path / f"out{number}")
        results.add((data, box.report.to_json().replace(b"round1", b"round0")))
    assert len(results) == 1


def test_an_adapter_of_the_round_comes_back_as_it_was(tmp_path: Path) -> None:
    [folder] = uploads(tmp_path, 1)
    box = inbox(tmp_path)
    box.add(folder, "only", 17)
    box.merge(method=sm.mean()).save_pretrained(tmp_path / "out")
    before, after = (
        products(path, scaling) for path, scaling in ((folder, 2.0), (tmp_path / "out", 1.0))
    )
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_copies_have_one_vote(tmp_path: Path) -> None:
    one, other = uploads(tmp_path, 2)
    box = inbox(tmp_path)
    for client in ("b-sybil", "a-first", "c-sybil"):
        box.add(one, client, 50)
    box.add(other, "z", 50)
    merged = box.merge(method=sm.mean())
    assert [a.label for a in merged.adapters] == ["a-first", "z"]
    assert merged.weights == (1.0, 1.0)
    rows = {row.client: row for row in box.report.clients}
    assert "a-first" in (rows["b-sybil"].left_out or "")
    assert rows["b-sybil"].weight == 0
    box.remove("a-first")  # the others still have the content
    assert [a.label for a in box.merge(method=sm.mean()).adapters] == ["b-sybil", "z"]


def test_a_later_upload_takes_the_place_of_the_earlier(tmp_path: Path) -> None:
    one, other = uploads(tmp_path, 2)
    box = inbox(tmp_path)
    box.add(one, "a", 5)
    box.add(other, "a", 6)
    assert box.clients == {"a": 6}
    assert box.merge(method=sm.mean()).adapters[0].digest == sm.Adapter.load(other).digest
    record = json.loads((tmp_path / "round" / "clients" / "a.json").read_text())
    assert [entry["samples"] for entry in record["history"]] == [5, 6]
    assert len(list((tmp_path / "round" / "kept").iterdir())) == 1
    assert not box.add(tmp_path / "nowhere", "a")  # and a bad one changes nothing
    assert box.clients == {"a": 6}


def test_removing_takes_the_upload_off_the_disk(tmp_path: Path) -> None:
    folders = uploads(tmp_path, 2)
    box = inbox(tmp_path, quorum=2)
    for folder in folders:
        box.add(folder, folder.name)
    box.remove("client0")
    assert len(list((tmp_path / "round" / "kept").iterdir())) == 1
    with pytest.raises(sm.RoundError, match="1 clients of the quorum of 2"):
        box.merge(method=sm.mean())
    with pytest.raises(sm.RoundError, match="no client 'client0'"):
        box.remove("client0")
    with pytest.raises(sm.RoundError, match="no client"):
        box.remove("../../etc")


def test_a_long_adapter_is_left_out_of_the_merge(tmp_path: Path) -> None:
    folders = uploads(tmp_path, 3)
    long = save_lora(tmp_path / "long", seed=9, targets=SMALL, size=30.0)
    box = inbox(tmp_path, max_norm_ratio=50)
    for folder in (*folders, long):
        assert box.add(folder, folder.name)
    with pytest.warns(sm.SapmergeWarning, match="'long' is left out"):
        merged = box.merge(method=sm.mean())
    assert [a.label for a in merged.adapters] == ["client0", "client1", "client2"]
    assert "times the median" in str(box.report)


@pytest.mark.filterwarnings(
    "ignore::sapmerge.errors.SapmergeWarning"
)  # random adapters agree by chance
def test_anchors_and_a_model_merge_by_sap(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = zoo(), [torch.arange(10).reshape(2, 5), torch.arange(5, 15).reshape(2, 5)]
    box = inbox(tmp_path)
    for folder in uploads(tmp_path, 3):
        box.add(folder, folder.name, 10)

    def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    merged = box.merge(batches, model, loss=loss)
    assert merged.recipe["method"] == repr(sm.sap())
    merged.save_pretrained(tmp_path / "out")
    rows = box.report.clients
    losses = merged.report.notes["anchor loss"]
    assert [row.anchor_loss for row in rows] == [losses[row.client] for row in rows]
    assert all(row.left_out is None for row in rows)
    assert any((tmp_path / "round" / "cache").iterdir())


# The contract.


def test_a_wrong_first_upload_does_not_spoil_the_round(tmp_path: Path) -> None:
    good = uploads(tmp_path, 2)
    config, state = pair(7)
    wrong = {
        name: torch.zeros(t.shape[0] + 1, t.shape[1]) if "lora_B" in name else t
        for name, t in state.items()
    }
    box = inbox(tmp_path)
    outcome = box.add((config, wrong), "first")
    assert not outcome
    assert "the round expects linear (12, 12)" in outcome.reason
    assert all(box.add(folder, folder.name) for folder in good)
    assert len(dict(box.merge(method=sm.mean()).updates())) == 3


def test_every_kind_of_module_passes(tmp_path: Path) -> None:
    box = inbox(tmp_path)
    outcome = box.add(save_lora(tmp_path / "all", seed=1, targets=ALL), "all")
    assert outcome, outcome
    box.merge(method=sm.mean()).save_pretrained(tmp_path / "out")


def test_a_manifest_can_stand_for_the_model(tmp_path: Path) -> None:
    [folder] = uploads(tmp_path, 1)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(
        json.dumps({"q": [12, 12], "enc.q": {"shape": [12, 12]}, "layers.1.v": [12, 12]})
    )
    for number, given in enumerate(
        (manifest, folder, sm.Adapter.load(folder), json.loads(manifest.read_text()))
    ):
        box = Inbox(tmp_path / f"r{number}", manifest=given)
        assert set(box.contract.modules) == {"q", "enc.q", "layers.1.v"}
        assert box.add(folder, "a")
    assert not Inbox(tmp_path / "other", manifest={"q": [12, 12]}).add(folder, "a")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"base_model": "another/base"}, "names the base model"),
        ({"max_rank": 3}, "has rank 4; at most 3"),
        ({"modules": ["q"]}, "module 'layers.1.v' is none of the 6 modules"),
        ({"max_bytes": 2000}, "bytes; at most 2000"),
    ],
)
def test_what_the_contract_forbids_is_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    [folder] = uploads(tmp_path, 1)
    box = inbox(tmp_path, **options)
    outcome = box.add(folder, "a")
    assert not outcome
    assert reason in outcome.reason
    assert box.clients == {}
    assert box.report.refused == (("a", outcome.reason),)


def test_only_plain_lora_is_taken(tmp_path: Path) -> None:
    config, tensors = pair(1, targets=("q",))
    box = inbox(tmp_path)
    biases = {
        n.replace("lora_B.weight", "lora_B.bias"): t[:, 0]
        for n, t in tensors.items()
        if "lora_B" in n
    }
    outcome = box.add((config | {"lora_bias": True}, tensors | biases), "a")
    assert not outcome
    assert "q.bias' of the base" in outcome.reason
    magnitudes = {
        n.replace("lora_B.weight", "lora_magnitude_vector"): t[:, 0]
        for n, t in tensors.items()
        if "_B" in n
    }
    outcome = box.add((config | {"use_dora": True}, tensors | magnitudes), "b")
    assert not outcome
    assert "plain LoRA only" in outcome.reason


def test_heads_are_taken_if_the_round_says_so(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "head", seed=1, targets=("q",), modules_to_save=["head"])
    outcome = inbox(tmp_path).add(folder, "a")
    assert not outcome
    assert "saves 'head." in outcome.reason
    shutil.rmtree(tmp_path / "round")
    box = inbox(tmp_path, modules_to_save=["head"])
    assert box.add(folder, "a")
    merged = box.merge(method=sm.mean(), modules_to_save="mean")
    merged.save_pretrained(tmp_path / "out")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (folder, tmp_path / "out"))
    assert torch.equal(
        before["base_model.model.head.weight"], after["base_model.model.head.weight"]
    )


def test_a_round_is_opened_again_only_as_what_it_is(tmp_path: Path) -> None:
    inbox(tmp_path, quorum=3)
    assert Inbox(tmp_path / "round").contract.quorum == 3
    assert inbox(tmp_path, quorum=3).contract == Inbox(tmp_path / "round").contract
    with pytest.raises(sm.RoundError, match="another quorum"):
        inbox(tmp_path, quorum=2)
    with pytest.raises(sm.RoundError, match="not for 'x'"):
        Inbox(tmp_path / "round", base_model="x")
    with pytest.raises(sm.MethodError, match="give model="):
        Inbox(tmp_path / "new")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").mkdir()
    with pytest.raises(sm.RoundError, match="is no round"):
        Inbox(tmp_path / "mine", model=zoo())
    (tmp_path / "round" / "round.json").write_text("{}")
    with pytest.raises(sm.RoundError, match="no contract"):
        Inbox(tmp_path / "round")


@pytest.mark.parametrize(
    "options", [{"quorum": 0}, {"max_rank": True}, {"max_share": 0.0}, {"max_norm_ratio": 0.5}]
)
def test_a_contract_has_sane_numbers(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(sm.MethodError):
        inbox(tmp_path, **options)


def test_a_damaged_upload_is_named(tmp_path: Path) -> None:
    [folder] = uploads(tmp_path, 1)
    box = inbox(tmp_path)
    box.add(folder, "a")
    [kept] = (tmp_path / "round" / "kept").iterdir()
    data = bytearray((kept / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (kept / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(sm.RoundError, match="the upload of 'a'"):
        box.merge(method=sm.mean())
    assert box.add(folder, "a")  # the same upload again mends it
    box.merge(method=sm.mean())


# Hostile uploads.


def _hostile(
    chance: random.Random, config: dict[str, Any], state: dict[str, torch.Tensor]
) -> tuple[object, str, Any]:
    """(upload, client, samples), each with something wrong."""
    config, state = dict(config), dict(state)
    name = chance.choice(sorted(state))
    kind = chance.randrange(14)
    if kind == 0:
        state[name] = torch.full_like(state[name], float("nan"))
    elif kind == 1:
        state[name] = state[name] * float("inf")
    elif kind == 2:
        state[name] = state[name][: chance.randrange(state[name].shape[0])]
    elif kind == 3:
        state[f"{name}.extra{chance.random()}"] = torch.ones(2)
    elif kind == 4:
        state = {key.replace("enc.q", "enc.x"): value for key, value in state.items()}
    elif kind == 5:
        config["r"] = chance.choice([0, -1, 3, 10**9, "8", None, [4]])
    elif kind == 6:
        config["use_dora"] = True
    elif kind == 7:
        config["peft_type"] = chance.choice(["IA3", "PROMPT_TUNING", 7, None])
    elif kind == 8:
        return (
            (config, state),
            chance.choice(["", "..", "../x", "a/b", "x" * 65, ".hidden", "a\0b", "a\nb"]),
            1,
        )
    elif kind == 9:
        return (
            (config, state),
            "c",
            chance.choice([0, -5, 10**13, 1.5, True, "7", None, float("nan")]),
        )
    elif kind == 10:
        data = bytearray(save(state))
        for _ in range(chance.randrange(1, 20)):
            data[chance.randrange(200)] ^= 1 << chance.randrange(8)
        return (
            (json.dumps(config, default=sorted), bytes(data[: chance.randrange(len(data))])),
            "c",
            1,
        )
    elif kind == 11:
        return (
            chance.choice(
                [
                    None,
                    7,
                    b"",
                    b"PK\x03\x04" + bytes(40),
                    (),
                    (1, 2, 3),
                    ("{", b""),
                    "\0",
                    {},
                    object(),
                ]
            ),
            "c",
            1,
        )
    elif kind == 12:
        config["base_model_name_or_path"] = "elsewhere/model"
    else:
        state[name] = (
            state[name].to(torch.complex64) if chance.random() < 0.5 else state[name].to_sparse()
        )
    return (config, state), "c", 1


def test_200_hostile_uploads_and_none_gets_in(tmp_path: Path) -> None:
    """And no good one is lost among them, nor replaced by what claims its name."""
    chance, box = random.Random(0), inbox(tmp_path)
    config, state = pair(3)
    good = uploads(tmp_path, 4)
    for number in range(200):
        if number % 50 == 25:
            assert box.add(good[number // 50], good[number // 50].name)
        upload, client, samples = _hostile(chance, config, state)
        client = good[number % 4].name if client == "c" and number % 3 == 0 else client
        outcome = box.add(upload, client, samples)
        assert not outcome, (number, outcome)
        assert outcome.reason
        assert str(tmp_path / "round") not in outcome.reason
    assert [*box.clients] == ["client0", "client1", "client2", "client3"]
    assert len(list((tmp_path / "round" / "kept").iterdir())) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"client{k}" for k in range(4)),
        "round",
    ]
    assert len(dict(box.merge(method=sm.mean()).updates())) == 3
    assert box.report.refused
    (tmp_path / "clean").mkdir()
    clean = inbox(tmp_path / "clean")
    for folder in good:
        assert clean.add(folder, folder.name)
    assert merged_bytes(box, tmp_path / "out") == merged_bytes(clean, tmp_path / "clean" / "out")


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", "{}")
        archive.writestr("adapter_model.safetensors", bytes(1 << 28))
    outcome = inbox(tmp_path).add(packed.getvalue(), "c")
    assert not outcome
    assert "at most" in outcome.reason


# The running state.


def test_late_and_leaving_clients_move_the_running_state(tmp_path: Path) -> None:
    folders = uploads(tmp_path, 5)
    box = inbox(tmp_path)
    steps = [
        ("add", 0),
        ("add", 1),
        ("add", 2),
        ("remove", 1),
        ("add", 3),
        ("add", 4),
        ("remove", 0),
        ("add", 1),
    ]
    for step, k in steps:
        if step == "add":
            box.add(folders[k], f"c{k}", 10 + k)
        else:
            box.remove(f"c{k}")
        fresh = dict(box.merge(method=sm.mean()).updates())
        for name, update in box.state().mean().items():
            wanted = fresh[name].dense()
            assert torch.linalg.norm(update.dense() - wanted) <= 1e-6 * torch.linalg.norm(wanted)
    reads: list[str] = []
    monitored = sm.Adapter.update
    try:
        sm.Adapter.update = lambda self, name: reads.append(self.label) or monitored(self, name)  # type: ignore[method-assign]
        box.state()
    finally:
        sm.Adapter.update = monitored  # type: ignore[method-assign]
    assert not reads  # nothing came or left


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_two_half_states_are_the_whole(
    tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    adapters = [sm.Adapter.load(folder) for folder in uploads(tmp_path, 6, targets=ALL)]
    whole, halves = MergeState(dtype), [MergeState(dtype), MergeState(dtype)]
    for k, adapter in enumerate(adapters):
        whole = whole.plus(adapter, k + 1)
        halves[k % 2] = halves[k % 2].plus(adapter, k + 1)
    both = halves[0].combined(halves[1])
    assert both.members == whole.members
    for name, update in whole.mean().items():
        dense = sum(
            (k + 1) / 21 * a.update(name).to(dtype=torch.float64).dense()
            for k, a in enumerate(adapters)
        )
        for found in (
            update,
            both.mean()[name],
            whole.plus(*_other(tmp_path)).without(_other(tmp_path)[0]).mean()[name],
        ):
            assert torch.linalg.norm(
                found.dense().double() - dense
            ) <= tolerance * torch.linalg.norm(dense)
    with pytest.raises(sm.MethodError, match="in both"):
        whole.combined(halves[0])
    with pytest.raises(sm.MethodError, match="already"):
        whole.plus(adapters[0])
    saved = sm.merge([whole.adapter(rank="exact")], method=sm.mean())
    for name, update in saved.updates():
        assert torch.allclose(update.dense(), whole.mean()[name].dense().float(), atol=1e-5)


def test_what_a_rank_costs_the_mean_of_a_state_is_said(tmp_path: Path) -> None:
    state = sm.federated.MergeState(torch.float64)
    for k in range(4):
        path = save_lora(tmp_path / f"{k}", seed=k, r=2, targets=["q", "enc.q"])
        state = state.plus(sm.Adapter.load(path))
    lost = whole = 0.0
    for update in state.mean().values():
        sigma = torch.linalg.svdvals(update.dense())
        lost, whole = lost + float(sigma[2:].square().sum()), whole + float(sigma.square().sum())
    assert lost > 0.1 * whole
    with pytest.warns(sm.SapmergeWarning, match=f"keeps {1 - lost / whole:.0%} of"):
        state.adapter(rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", sm.SapmergeWarning)
        state.adapter()  # 8 directions are all there are


def _other(folder: Path) -> tuple[sm.Adapter, float]:
    path = folder / "other"
    return sm.Adapter.load(path if path.exists() else save_lora(path, seed=99, targets=ALL)), 3.0


# On the command line.


def test_a_round_from_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {**small, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    config = CLIPConfig(
        text_config=text,
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    config.architectures = ["CLIPModel"]
    config.save_pretrained("base")
    for k in range(2):
        save_lora(
            Path(f"c{k}"),
            k,
            CLIPModel(config),
            targets=["q_proj"],
            base_model_name_or_path="some/clip",
        )
    commands = [
        "round new r --model base --base-model some/clip --modules q_proj --quorum 2 --max-share "
        "0.9",
        "round add r c0 --client art --samples 10",
        "round add r c1 --client sketch --samples 30",
        "round list r --expected art photo",
        "round merge r -o out",
        "round report r",
    ]
    for command in commands:
        assert cli.main(command.split()) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "photo\tmissing" in said
    assert "25.0%" in said
    assert json.loads(Path("r/report.json").read_text())["method"] == "Chain(Mean())"
    assert cli.main(["round", "remove", "r", "art"]) == 0
    assert cli.main(["round", "merge", "r", "-o", "out2"]) == 2
    assert "1 clients of the quorum of 2" in capsys.readouterr().err
    assert cli.main(["round", "add", "r", "nowhere", "--client", "art"]) == 2
    assert "refused" in capsys.readouterr().err
    assert cli.main(["round", "new", "r", "--model", "base"]) == 2  # another contract
    assert cli.main(commands[0].split()) == 0
    assert "it is there already, with 1 uploads" in capsys.readouterr().out
    assert cli.main(["round", "list", "nothing"]) == 2
    assert cli.main(["round", "report", "r", "--json"]) == 0
    assert [c["client"] for c in json.loads(capsys.readouterr().out)["clients"]] == ["sketch"]


def test_the_shell_as_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("art", "sketch")):
        save_lora(Path(name), seed)

    def data(command: str) -> tuple[int, Any]:
        try:
            code = cli.main([*command.split(), "--json"])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, json.loads(capsys.readouterr().out)

    code, made = data("round new r --manifest art --max-rank 8 --quorum 2 --max-share 1")
    contract = Inbox("r").contract
    assert (code, made["modules"]) == (0, len(contract.modules))
    assert (made["max_rank"], made["quorum"], made["max_share"]) == (8, 2, 1)
    assert (made["max_bytes"], made["base_model"]) == (contract.max_bytes, contract.base_model)
    assert Path(made["round"]) == Path("r").absolute()
    code, kept = data("round add r art --client one --samples 7")
    assert (code, kept["kept"], kept["samples"]) == (0, True, 7)
    assert kept["digest"] == sm.Adapter.load("art").digest
    assert data("round add r sketch --client two --samples 3")[0] == 0
    code, refused = data("round add r nowhere --client three")
    assert (code, refused["kept"], refused["client"]) == (2, False, "three")
    assert "nowhere" in refused["reason"]
    assert data("round merge r -o half --save-dtype float16")[0] == 0
    tensors = load_file("half/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert data("round remove r two") == (0, {"removed": "two", "clients": {"one": 7}})
