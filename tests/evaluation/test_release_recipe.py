"""The release's own task: its data in the usual format, its network, its augmentation; devices."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from know_cli.evaluation.place import Place, placed
from know_cli.evaluation.release import fine_tuning
from know_cli.evaluation.release.network import ReleaseResNet18
from know_cli.evaluation.release.plan import RELEASE_TASKS, chosen, find_release_tasks
from know_cli.evaluation.release.task import ReleaseTask
from know_cli.evaluation.release.trial import ReleaseTrial
from know_cli.evaluation.tasks import Downstream, Examples
from know_cli.evaluation.tasks.measures import ACCURACY
from know_cli.evaluation.tasks.task import Cell, Problem
from know_cli.known.shipped import weights_folder
from know_cli.lab.data import augmentations
from know_cli.lab.data.augmentations import affine

NAME = "release-cifar100-cifar10-resnet18"
FORMATS = {
    "cifar100": ("cifar-100-binary", {"train.bin": 64, "test.bin": 16}, (20, 100)),
    "cifar10": (
        "cifar-10-batches-bin",
        {**{f"data_batch_{k}.bin": 16 for k in range(1, 6)}, "test_batch.bin": 16},
        (10,),
    ),
}


def write_cifar(folder: Path) -> None:
    """Noise in the binary versions' files and folders."""
    chance = np.random.default_rng(0)
    for name, (inner, files, labels) in FORMATS.items():
        place = folder / name / inner
        place.mkdir(parents=True)
        for file, count in files.items():
            columns = [chance.integers(0, most, (count, 1)) for most in labels]
            records = np.hstack([*columns, chance.integers(0, 256, (count, 3072))])
            (place / file).write_bytes(records.astype(np.uint8).tobytes())


def tiny() -> ReleaseTask:
    """The task as it is, but with next to no data, training and width."""
    task = RELEASE_TASKS[NAME]
    base = replace(
        task.base,
        samples=32,
        recipe=replace(task.base.recipe, batch_size=8),
        downstream=tuple(Downstream(size, 1, 4e-4, 1) for size in (16, 32, 64)),
        tested=16,
        network=ReleaseResNet18(width=2),  # type: ignore[call-arg]
    )
    recipe = replace(task.fine_tuning, epochs=1, head_epochs=1, batch_size=8)
    return replace(task, base=base, fine_tuning=recipe)


def test_it_runs_from_folders_in_the_usual_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_tuning, "GRID", (1.0,))
    monkeypatch.setattr(fine_tuning, "HIGHEST", 1.0)
    monkeypatch.setattr(fine_tuning, "LOWEST", 1.0)
    write_cifar(tmp_path / "data")
    seen: list[int] = []

    def noted(images: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(len(images))
        return affine(images, generator)

    monkeypatch.setitem(fine_tuning.FINE_TUNING_AUGMENTATIONS, "affine", noted)  # type: ignore[arg-type]
    task = tiny()
    trial = ReleaseTrial(task, 0, tmp_path / "work", tmp_path / "data")
    arms = chosen(task.arms({}), ["longer", "shrink-0.5", "retrodiction-x8"])
    trial.run(arms, [25, 50])
    found = trial.found(arms, [25, 50])
    trained = found["pretraining"]["trained"]
    # Θ0, its sessions and twice what they took, then two epochs of every start on 16 and on 32.
    assert len(seen) == 16 + 2 * 8 + 4 * 2 * (2 + 4)
    assert [trained[f"ckpt{k}"]["samples"] for k in range(5)] == [64, 32, 16, 8, 4]
    assert [trained[f"ckpt{k}"]["steps"] for k in range(5)] == [8, 12, 14, 15, 16]
    assert list(found["cells"]) == ["16 images", "32 images"]
    for cell in found["cells"].values():
        assert list(cell) == ["naive", "longer", "shrink-0.5", "retrodiction-x8"]
        assert all(0 <= one["rates"]["1"]["value"] <= 1 for one in cell.values())


def test_it_is_the_release_s_protocol() -> None:
    task = RELEASE_TASKS[NAME]
    assert "more-data" not in [arm.label for arm in task.arms({})]  # D0 is all there is
    assert task.base.largest == 50_000
    assert task.base.recipe.batch_size == task.fine_tuning.batch_size == 128
    steps = [int(50_000 * 0.5**k) // 128 for k in range(5)]
    assert steps == [390, 195, 97, 48, 24]
    assert (task.fine_tuning.head_epochs, task.fine_tuning.epochs) == (10, 100)
    assert task not in find_release_tasks([])
    assert task in find_release_tasks(["*resnet18"])


def test_no_shipped_hyper_model_was_taught_on_its_images() -> None:
    """Else all of them must not be used."""
    used = [path.read_text() for path in weights_folder().rglob("*.json")]
    assert used
    assert not any("cifar" in text for text in used)


def test_what_was_trained_before_keeps_its_key() -> None:
    """What tasks define as ever is not in their definitions."""
    found = RELEASE_TASKS["release-cifar10-resnet"].definition()
    assert not {"uses_all", "augmentation"} & found.keys()
    assert RELEASE_TASKS[NAME].definition()["augmentation"] == "affine"


def test_its_network_has_a_wide_stem_without_stride_and_biases() -> None:
    model = ReleaseResNet18().build((3, 32, 32), 100, 0)  # type: ignore[call-arg]
    shapes: dict[str, torch.Size] = {}
    for name, module in model.named_children():
        module.register_forward_hook(
            lambda _, __, out, name=name: shapes.__setitem__(name, out.shape[1:])
        )
    model.eval()(torch.zeros(2, 3, 32, 32))
    assert model.get_submodule("conv1").weight.shape == (64, 3, 7, 7)
    assert [tuple(shapes[f"layer{k}"]) for k in range(1, 5)] == [
        (64, 32, 32), (128, 32, 32), (256, 16, 16), (512, 8, 8),
    ]  # fmt: skip
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 4 * 4 + 3
    assert all(layer.bias is not None for layer in convolutions)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(layer.eps, layer.momentum) for layer in norms} == {(1e-3, 0.01)}


# --- its augmentation --------------------------------------------------------------------------


def changed(images: Tensor, monkeypatch: pytest.MonkeyPatch, *drawn: float) -> Tensor:
    """Images with angle, shifts and zooms at given shares of their largest."""
    shares = (torch.tensor(drawn)[:, None] + 1) / 2
    with monkeypatch.context() as patch:
        patch.setattr(augmentations, "_uniform", lambda size, like, generator: shares.expand(size))
        return affine(images, torch.Generator())


def test_images_stay_as_they_are_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(3, 2, 7, 9)
    torch.testing.assert_close(changed(images, monkeypatch, 0, 0, 0, 0, 0), images)


def test_images_are_shifted_by_up_to_a_share_of_their_sides(monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    images = torch.randn(1, 1, 20, 40)
    across = changed(images, monkeypatch, 0, 1, 0, 0, 0)
    torch.testing.assert_close(across[..., :-6], images[..., 6:])
    torch.testing.assert_close(across[..., -6:], images[..., -1:].expand(1, 1, 20, 6))  # its border
    down = changed(images, monkeypatch, 0, 0, -1, 0, 0)
    torch.testing.assert_close(down[..., 3:, :], images[..., :-3, :])


@pytest.mark.parametrize("drawn", [(1, 0, 0, 0, 0), (-1, 0, 0, 0, 0), (0, 0, 0, 1, -1), (1, 0.3, -0.2, -1, 0.5)])  # fmt: skip
def test_images_are_turned_and_scaled(
    drawn: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On images whose values are positions, which interpolation reproduces away from the border."""
    side = 40
    line = (2 * torch.arange(side) + 1) / side - 1
    x, y = line.expand(side, side), line[:, None].expand(side, side)
    found = changed(torch.stack([x, y])[None], monkeypatch, *drawn)[0]
    angle, wide, high = math.radians(10) * drawn[0], 1 + 0.3 * drawn[3], 1 + 0.3 * drawn[4]
    inner = slice(side // 3, -side // 3)
    torch.testing.assert_close(
        found[0, inner, inner],
        (wide * math.cos(angle) * x - high * math.sin(angle) * y + 0.3 * drawn[1])[inner, inner],
    )
    torch.testing.assert_close(
        found[1, inner, inner],
        (wide * math.sin(angle) * x + high * math.cos(angle) * y + 0.3 * drawn[2])[inner, inner],
    )


# --- devices -----------------------------------------------------------------------------------


def test_a_problem_moves_to_a_device_whole() -> None:
    def examples() -> Examples:
        return Examples(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))

    pool, test = examples(), examples()
    cells = tuple(Cell(str(n), Downstream(n, 1), pool, test) for n in (1, 2))
    problem = Problem(
        examples(), examples(), lambda seed: nn.Linear(3, 2), lambda seed: nn.Linear(3, 4), ("head",),
        cells, ACCURACY, ACCURACY,
    )  # fmt: skip
    meta = torch.device("meta")
    moved = placed(problem, Place(meta))
    every = [moved.pool, moved.test, *(part for c in moved.cells for part in (c.pool, c.test))]
    assert all(tensor.device == meta for one in every for tensor in (one.inputs, one.targets))
    assert moved.cells[0].pool is moved.cells[1].pool  # not twice in the device's memory
    for build in (moved.build, moved.build_downstream):
        assert all(parameter.device == meta for parameter in build(0).parameters())
    assert problem.pool.inputs.device == torch.device("cpu")
