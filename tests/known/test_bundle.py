"""Bundles on disk and the importer for Keras files."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from know_cli.errors import CheckpointError, OutputError, UsageError
from know_cli.kinds import Kind
from know_cli.known.bundle import load_bundle, save_bundle
from know_cli.known.module import Preparation
from know_cli.known.shipped import find_bundle, shipped, weights_folder
from tests.support.bundles import random_bundle
from tests.support.keras import KERAS_LAYERS, same, write_keras


@pytest.mark.parametrize("checkpoints", [2, 5])
@pytest.mark.parametrize("preparation", list(Preparation))
def test_bundle_survives_a_round_trip(
    tmp_path: Path, checkpoints: int, preparation: Preparation
) -> None:
    bundle = random_bundle(checkpoints, preparation=preparation)
    save_bundle(bundle, tmp_path / "b", {"seed": 4})
    loaded = load_bundle(tmp_path / "b")
    assert same(bundle, loaded)
    assert loaded.checkpoints == checkpoints
    assert loaded.preparation is preparation
    assert loaded.manifest["seed"] == 4
    assert loaded.manifest["parameters"] == 128 * checkpoints + 8785
    assert loaded.digest == bundle.digest


@pytest.mark.parametrize("root", ["", "model_weights/"])
def test_keras_files_are_read_transposed_and_in_place(tmp_path: Path, root: str) -> None:
    bundle = random_bundle()
    loaded = load_bundle(write_keras(bundle, tmp_path / "keras", root))
    assert same(bundle, loaded)
    assert (loaded.checkpoints, loaded.preparation) == (5, Preparation.RAW)


def test_a_converted_bundle_has_the_digest_of_its_keras_files(tmp_path: Path) -> None:
    keras = load_bundle(write_keras(random_bundle(), tmp_path / "keras"))
    save_bundle(keras, tmp_path / "ours")
    assert load_bundle(tmp_path / "ours").digest == keras.digest


def test_digest_tells_weights_and_preparation_apart() -> None:
    digests = {
        random_bundle().digest, random_bundle(seed=1).digest, random_bundle(4).digest,
        random_bundle(preparation=Preparation.SPREAD).digest,
    }  # fmt: skip
    assert len(digests) == 4


@pytest.mark.parametrize("layer", KERAS_LAYERS)
def test_a_missing_keras_layer_is_an_error(tmp_path: Path, layer: str) -> None:
    folder = write_keras(random_bundle(), tmp_path / "keras")
    with h5py.File(folder / "KNOWN_FC.h5", "a") as file:
        del file[layer]
    with pytest.raises(
        CheckpointError, match=f"KNOWN_FC.h5.*'{layer}/{layer}/kernel:0' is missing"
    ):
        load_bundle(folder)


@pytest.mark.parametrize("layer", KERAS_LAYERS)
@pytest.mark.parametrize("part", ["kernel:0", "bias:0"])
def test_a_mis_shaped_keras_layer_is_an_error(tmp_path: Path, layer: str, part: str) -> None:
    folder = write_keras(random_bundle(), tmp_path / "keras")
    with h5py.File(folder / "KNOWN_Bias.h5", "a") as file:
        group = file[f"{layer}/{layer}"]
        shape = tuple(size + 1 for size in group[part].shape)
        del group[part]
        group[part] = np.zeros(shape, np.float32)
    with pytest.raises(CheckpointError, match=r"KNOWN_Bias.h5.*has shapes"):
        load_bundle(folder)


def test_further_faults_of_keras_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_keras(random_bundle(), tmp_path / "keras")
    with h5py.File(folder / "KNOWN_Conv.h5", "a") as file:
        file["dense_3/dense_3/bias:0"][0] = np.nan
    with pytest.raises(CheckpointError, match="'dense_3'.*not finite"):
        load_bundle(folder)
    (folder / "KNOWN_Conv.h5").write_bytes(b"no HDF5")
    with pytest.raises(CheckpointError, match="not a readable HDF5"):
        load_bundle(folder)
    (folder / "KNOWN_Conv.h5").unlink()
    with pytest.raises(CheckpointError, match="KNOWN_Conv.h5: no such file"):
        load_bundle(folder)
    write_keras(random_bundle(), folder)
    write_keras(random_bundle(4), tmp_path / "four")
    (folder / "KNOWN_FC.h5").write_bytes((tmp_path / "four" / "KNOWN_FC.h5").read_bytes())
    with pytest.raises(CheckpointError, match="different numbers of checkpoints"):
        load_bundle(folder)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UsageError, match=r"pip install 'know-predict\[keras\]'"):
        load_bundle(folder)


def test_faults_of_bundles(tmp_path: Path) -> None:
    path = tmp_path / "b"
    save_bundle(random_bundle(), path)
    state = load_file(path / "fc.safetensors")

    def broken(**changes: torch.Tensor) -> None:
        save_file({**state, **changes}, path / "fc.safetensors")

    broken(extra=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"fc.safetensors: tensor 'extra'"):
        load_bundle(path)
    broken(**{"head.bias": torch.tensor([torch.nan])})
    with pytest.raises(CheckpointError, match=r"'head.bias' is not finite"):
        load_bundle(path)
    broken(**{"head.bias": torch.ones(1).half()})
    with pytest.raises(CheckpointError, match=r"'head.bias' is F16"):
        load_bundle(path)
    broken(**{"head.bias": state["head.bias"] + 1})
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_bundle(path)
    (path / "fc.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"fc.safetensors: no such file"):
        load_bundle(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"preparation": "x"},
        {"checkpoints": "5"},
        {"checkpoints": 1},
        {"checkpoints": 10**9},
        {"digest": None},
    ],
)
def test_faults_of_manifests(tmp_path: Path, change: dict[str, object]) -> None:
    save_bundle(random_bundle(), tmp_path / "b")
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
    with pytest.raises(CheckpointError, match="not a manifest of format 1"):
        load_bundle(tmp_path / "b")
    manifest.write_text("{")
    with pytest.raises(CheckpointError, match="not a bundle's manifest"):
        load_bundle(tmp_path / "b")


def test_find_bundle(tmp_path: Path) -> None:
    for checkpoints in (2, 5):
        save_bundle(random_bundle(checkpoints), tmp_path / "family" / f"checkpoints-{checkpoints}")
    family = str(tmp_path / "family")
    assert find_bundle(family, 2).name == "checkpoints-2"
    assert find_bundle(f"{family}/checkpoints-5", 3).name == "checkpoints-5"
    with pytest.raises(CheckpointError, match="no KNOWN for 3 checkpoints, only for 2, 5"):
        find_bundle(family, 3)
    with pytest.raises(UsageError, match="neither a folder with a hyper-model"):
        find_bundle(str(tmp_path / "nothing"), 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="neither a folder with a hyper-model"):
        find_bundle(str(tmp_path / "empty"), 5)


def test_an_unwritable_place_for_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be made"):
        save_bundle(random_bundle(), tmp_path / "file" / "b")


def test_every_shipped_bundle_is_whole_and_documented() -> None:
    families = shipped()
    assert "continuation" in families
    card = (weights_folder() / "README.md").read_text(encoding="utf-8")
    for family, sizes in families.items():
        assert 5 in sizes
        for checkpoints, path in sizes.items():
            bundle = load_bundle(path)
            assert bundle.checkpoints == checkpoints
            assert bundle.target == family
            assert family in card
            assert bundle.digest in card
            window = torch.randn(1000, checkpoints) * 0.05
            for kind in (Kind.CONV, Kind.FC, Kind.BIAS):
                with torch.no_grad():
                    change = bundle.module(kind)(window) - window[:, -1]
                assert torch.isfinite(change).all()
                assert change.abs().max() > 0
