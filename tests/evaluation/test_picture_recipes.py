"""The paper's larger experiments: each phase runs, from tiny folders in the usual layouts."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.errors import UsageError
from know_cli.evaluation.release import fine_tuning
from know_cli.evaluation.release.plan import RELEASE_TASKS, chosen, find_release_tasks
from know_cli.evaluation.release.recipes import captions, networks
from know_cli.evaluation.release.recipes.networks import PvtCaptioner, pvt_classifier
from know_cli.evaluation.release.task import ReleaseTask
from know_cli.evaluation.release.trial import ReleaseTrial
from know_cli.lab.pictures.decoding import IGNORED
from tests.support.command import Command, one_line
from tests.support.picture_sets import WRITERS

NAMES = [name for name in RELEASE_TASKS if name.endswith(("-pvt", "-deeplab"))]
#: Sessions on 32 of the source, then on 4 examples, of 8 that there are.
SOURCE, TARGET = 16, 16


def is_usable(name: str) -> bool:
    if not name.endswith("deeplab"):
        return True
    try:
        importlib.import_module("segmentation_models_pytorch")
    except (ImportError, RuntimeError):  # the latter from a torchvision of another torch
        return False
    return True


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rate, and a PVTv2 of the same form with few channels."""
    monkeypatch.setattr(fine_tuning, "GRID", (1.0,))
    monkeypatch.setattr(fine_tuning, "HIGHEST", 1.0)
    monkeypatch.setattr(fine_tuning, "LOWEST", 1.0)
    sizes = {
        "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2],
    }  # fmt: skip
    for key, value in sizes.items():
        monkeypatch.setitem(networks.PVT_V2_B1, key, value)


def tiny(name: str) -> ReleaseTask:
    task = RELEASE_TASKS[name]
    base = replace(
        task.base,
        recipe=replace(task.base.recipe, batch_size=4),
        downstream=tuple(
            replace(one, size=size)
            for one, size in zip(task.base.downstream, (2, 4, 8), strict=True)
        ),
        side=32,
        validation=2,
    )  # type: ignore[call-arg]
    recipe = replace(task.fine_tuning, epochs=1, head_epochs=1, batch_size=2)
    return replace(task, base=base, fine_tuning=recipe, rate=0.5, validation=2)


def write(task: ReleaseTask, folder: Path) -> None:
    for name in task.base.data_sets:
        if name in WRITERS:
            count = SOURCE if name == "imagenet-100" else TARGET
            WRITERS[name](folder / name, 32 if name == "VOC2012" else count)
        else:
            write_cifar100(folder / name)


def write_cifar100(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    for name, count in (("train", 20), ("test", 4)):
        pixels = torch.randint(0, 256, (count, 3072), generator=generator, dtype=torch.uint8)
        fine = torch.arange(count, dtype=torch.uint8).view(-1, 1)
        records = torch.cat([torch.zeros_like(fine), fine, pixels], 1)
        (folder / f"{name}.bin").write_bytes(records.numpy().tobytes())


@pytest.mark.parametrize("name", NAMES)
def test_every_phase_runs(name: str, tmp_path: Path) -> None:
    if not is_usable(name):
        pytest.skip("segmentation-models-pytorch cannot be imported here")
    task = tiny(name)
    write(task, tmp_path / "data")
    trial = ReleaseTrial(task, 0, tmp_path / "work", tmp_path / "data")
    arms = chosen(task.arms({}), ["shrink-0.5"])
    trial.run(arms, [25])
    found = trial.found(arms, [25])
    trained = found["pretraining"]["trained"]
    assert [trained[f"ckpt{k}"]["samples"] for k in range(5)] == [32, 16, 8, 4, 2]
    # The last has no batch of its own size, and takes what there is.
    assert [trained[f"ckpt{k}"]["steps"] for k in range(5)] == [8, 12, 14, 15, 16]
    assert "more-data" not in trained
    (cell,) = found["cells"].values()
    assert list(cell) == ["naive", "shrink-0.5"]
    assert all(0 <= one["rates"]["1"]["value"] <= 1 for one in cell.values())
    assert trial.problem.pool.inputs.dtype == torch.uint8
    assert found["pretraining"]["facts"]["validated"] == 2


def test_the_conditions_are_shares_of_what_there_is() -> None:
    for name in NAMES:
        task = RELEASE_TASKS[name]
        sizes = [one.size for one in task.base.downstream]
        assert sizes == [sizes[-1] * share // 100 for share in (25, 50, 100)]
        assert task.validation == task.base.validation  # type: ignore[attr-defined]
        assert (task.rate, task.steps, task.uses_all) == (1 / 3, (1, 2), True)
        labels = [arm.label for arm in task.arms({})]
        assert {"retrodiction-x3", "retrodiction-x9", "longer", "shrink-0.5"} <= set(labels)
        assert task not in find_release_tasks([])


def test_one_domain_is_left_out(tmp_path: Path) -> None:
    task = tiny("release-imagenet100-pacs-photo-pvt")
    write(task, tmp_path)
    (cell, *_) = task.base.prepare(0, tmp_path).cells
    photos = {int(image[0, 0, 0]) for image in cell.test.inputs}
    others = {int(image[0, 0, 0]) for image in cell.pool.inputs}
    assert len(cell.test) == TARGET
    assert len(cell.pool) == 3 * TARGET
    assert photos - others  # its shades are its own


def test_a_public_checkpoint_starts_a_forgetting(tmp_path: Path, know: Command) -> None:
    name = "release-imagenet100-cub-pvt"
    task = tiny(name)
    write(task, tmp_path / "data")
    public = pvt_classifier(1000, 7).state_dict()
    save_file(public, tmp_path / "model.safetensors")
    trial = ReleaseTrial(
        task, 0, tmp_path / "work", tmp_path / "data", first=tmp_path / "model.safetensors"
    )
    arms = chosen(task.arms({}), ["nothing-else"])
    trial.run(arms, [25])
    found = trial.found(arms, [25])["pretraining"]
    assert [found["trained"][f"ckpt{k}"]["steps"] for k in range(3)] == [0, 4, 6]
    from safetensors.torch import load_file

    kept = load_file(trial.folder / "ckpt0.safetensors")
    body = [key for key in public if not key.startswith("classifier.")]
    assert all(torch.equal(kept[key], public[key]) for key in body)
    assert kept["classifier.weight"].shape == (2, 32)  # that of 1,000 classes does not fit
    own = ReleaseTrial(task, 0, tmp_path / "work", tmp_path / "data")
    assert own.folder != trial.folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("more", "has a tensor 'extra', which the network lacks"),
        ("less", "lacks the tensor 'pvt_v2.encoder.layers.0.patch_embedding.proj.bias'"),
        (
            "shape",
            r"tensor 'pvt_v2.encoder.layers.0.patch_embedding.proj.bias' has the shape \[3\]",
        ),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(
    change: str, words: str, tmp_path: Path
) -> None:
    task = tiny("release-imagenet100-cub-pvt")
    write(task, tmp_path / "data")
    state = pvt_classifier(2, 7).state_dict()
    bias = "pvt_v2.encoder.layers.0.patch_embedding.proj.bias"
    if change == "more":
        state["extra"] = torch.ones(1)
    elif change == "less":
        del state[bias]
    else:
        state[bias] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=words):
        ReleaseTrial(
            task, 0, tmp_path / "work", tmp_path / "data", first=tmp_path / "model.safetensors"
        )


def test_libraries_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UsageError, match=r"PVTv2 needs transformers: pip install 'know-predict\[pa"
    ):
        pvt_classifier(2, 0)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(
        UsageError, match=r"DeepLabV3\+ needs segmentation-models-pytorch, which can"
    ):
        networks.deep_lab(2, 0)


def test_too_few_pictures_are_told(tmp_path: Path) -> None:
    task = replace(tiny("release-imagenet100-cub-pvt"))
    task = replace(task, base=replace(task.base, validation=200))  # type: ignore[call-arg]
    write(task, tmp_path)
    with pytest.raises(
        UsageError, match=r"needs 208 training pictures, data set 'CUB_200_2011' ha"
    ):
        task.base.prepare(0, tmp_path)


def test_captions_are_words_asked_for_one_by_one() -> None:
    texts = [["A dog runs .", "a Dog"], ["A dog", "A dog's toy", "a dog", "a", "six", "seven"]]
    words = captions.vocabulary(texts)
    assert words == {"a": 2, "dog": 3} or words == {"a": 2}
    found = captions.numbered(texts, {"a": 2, "dog": 3})
    assert found.shape == (2, captions.CAPTIONS, captions.LENGTH)
    assert found[0, 0, :5].tolist() == [2, 3, 1, 0, IGNORED]  # rare, end
    assert found[0, 1, :4].tolist() == [2, 3, 0, IGNORED]
    assert (found[0, 2:] == IGNORED).all()
    assert found[1, 4, :3].tolist() == [1, 0, IGNORED]  # the sixth is cut off
    long = captions.numbered([["a " * 40]], {"a": 2})
    assert long[0, 0].tolist() == [2] * (captions.LENGTH - 1) + [0]


def test_a_word_depends_on_those_before_it_alone() -> None:
    model = PvtCaptioner(9, 4, (3, 32, 32)).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3 * 32 * 32), generator=generator).short()
    words = torch.randint(0, 9, (2, 8), generator=generator).short()  # two captions of four
    with torch.inference_mode():
        first = model(torch.cat([pixels, words], 1))
        changed = words.clone()
        changed[:, 2] = (changed[:, 2] + 1) % 9
        second = model(torch.cat([pixels, changed], 1))
        other = model(torch.cat([255 - pixels, words], 1))
    assert first.shape == (2, 9, 8)
    same = [0, 1, 4, 5, 6, 7]
    torch.testing.assert_close(first[..., same], second[..., same])
    assert not torch.allclose(first[..., 2:4], second[..., 2:4])
    assert not torch.allclose(first, other)


def test_pictures_are_standardised_whatever_their_type() -> None:
    images = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    found = networks.standardised(images)
    torch.testing.assert_close(found, networks.standardised(images.float() / 255))
    expected = (float(images[0, 1, 2, 3]) / 255 - 0.456) / 0.224
    assert found[0, 1, 2, 3].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_the_network_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = pvt_classifier(1000, 0)
    # As many as the same network has in other libraries, with a head of 1,000 classes.
    assert sum(p.numel() for p in model.parameters()) == 14_009_000
    assert model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 1000)


def test_the_command_names_what_is_missing(tmp_path: Path, know: Command) -> None:
    (tmp_path / "data").mkdir()
    release = ("eval", "--regime", "release", "-o", "out", "--data-folder", "data")
    done = know(*release, "--task", "*-deeplab", cwd=tmp_path)
    assert done.returncode == 2
    assert "not run here, not found here: VOC2012, cityscapes" in done.stderr
    write(tiny("release-imagenet100-cub-pvt"), tmp_path / "data")
    for more in ((), ("--dry-run",)):  # before a picture is read
        done = know(*release, "--task", "*-cub-pvt", "--from", "no", *more, cwd=tmp_path)
        assert done.returncode == 3
        assert "no.safetensors: no such file" in done.stderr or "no: no such" in done.stderr
    done = know("eval", "-o", "out", "--from", "a", cwd=tmp_path)
    assert done.returncode == 2
    assert "--from is for --regime release" in one_line(done.stderr)
    for name in ("run", "branches"):
        done = know("eval", "-o", "out", "--trajectory", name, "--from", "a", cwd=tmp_path)
        assert done.returncode == 2
        assert "--from is for --trajectory forgetting" in one_line(done.stderr)
