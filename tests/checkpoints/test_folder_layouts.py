"""Folders as libraries write them: which file is the weights, and what is said where none is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.checkpoints import open_checkpoint
from know_cli.checkpoints.layouts import weights_in
from know_cli.errors import (
    EXIT_CHECKPOINT,
    EXIT_DONE,
    EXIT_OUTPUT,
    EXIT_USAGE,
    CheckpointError,
)
from tests.support.command import Command, one_line


def state(value: float, layers: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layer{n}.weight": torch.randn(4, 3, generator=generator) * value for n in range(layers)
    }


def write(folder: Path, files: list[str], index: str | None, value: float = 1.0) -> Path:
    """A model in a folder, its tensors dealt out to files of these names, beside a config."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = state(value)
    weight_map = {name: files[n % len(files)] for n, name in enumerate(tensors)}
    for file in files:
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    if index is not None:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def loaded(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def numbered(stem: str, count: int, digits: int = 5, first: int = 1) -> list[str]:
    return [
        f"{stem}-{n + first:0{digits}d}-of-{count:0{digits}d}.safetensors" for n in range(count)
    ]


LAYOUTS: dict[str, tuple[list[str], str | None]] = {
    "transformers": (["model.safetensors"], None),
    "diffusers": (["diffusion_pytorch_model.safetensors"], None),
    "diffusers, sharded": (
        numbered("diffusion_pytorch_model", 3), "diffusion_pytorch_model.safetensors.index.json"
    ),
    "diffusers, a variant": (["diffusion_pytorch_model.fp16.safetensors"], None),
    "diffusers, a variant with another name": (["diffusion_pytorch_model.non_ema.safetensors"], None),
    "diffusers, a sharded variant": (
        numbered("diffusion_pytorch_model.fp16", 2),
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ),
    "diffusers, a sharded variant of older days": (
        ["diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
         "diffusion_pytorch_model-00002-of-00002.fp16.safetensors"],
        "diffusion_pytorch_model.fp16.safetensors.index.json",
    ),
    "PEFT": (["adapter_model.safetensors"], None),
    "open_clip": (["open_clip_model.safetensors"], None),
    "open_clip, older": (["open_clip_pytorch_model.safetensors"], None),
    "Mistral": (["consolidated.safetensors"], None),
    "Mistral, sharded": (numbered("consolidated", 2), "consolidated.safetensors.index.json"),
    "Meta": (["consolidated.00.safetensors"], None),
    "a variant": (["model.fp16.safetensors"], None),
    "a sharded variant": (numbered("model.bf16", 3), "model.safetensors.index.bf16.json"),
    "shards without an index": (numbered("model", 2), None),
    "shards without an index, of another name": (numbered("x", 3), None),
    "shards without an index, counted from 0": (numbered("weights", 3, 4, first=0), None),
    "shards of a variant without an index": (numbered("model.fp16", 2), None),
    "shards of few digits": (numbered("pytorch_model", 3, digits=1), None),
    "an index of another name": (["a.safetensors", "b.safetensors"], "mine.safetensors.index.json"),
    "one shard": (numbered("model", 1), "model.safetensors.index.json"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_and_written_in_its_own_form(
    layout: str, tmp_path: Path, know: Command
) -> None:
    files, index = LAYOUTS[layout]
    for k in range(3):
        write(tmp_path / f"s{k}", files, index, 1.0 - k / 10)
    done = know("predict", "s0..s2", "-o", "out", "--method", "shrink", "--option", "lambda=0.5", cwd=tmp_path)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert names(tmp_path / "out") == names(tmp_path / "s0")
    expected, found = state(1.0), loaded(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], 0.5 * tensor)
    assert know("verify", "out", "s0..s2", "--full", cwd=tmp_path).returncode == EXIT_DONE
    # It takes the place of itself, too, and leaves nothing else.
    again = know("predict", "s0..s2", "-o", "out", "--method", "naive", "--force", cwd=tmp_path)
    assert again.returncode == EXIT_DONE, again.stderr
    assert names(tmp_path / "out") == names(tmp_path / "s0")
    assert all(torch.equal(t, expected[name]) for name, t in loaded(tmp_path / "out").items())


@pytest.mark.parametrize("before", ["PEFT", "Mistral, sharded", "a sharded variant", "diffusers"])
@pytest.mark.parametrize("after", ["transformers", "open_clip", "shards without an index"])
def test_a_folder_in_another_layout_is_replaced_whole(
    before: str, after: str, tmp_path: Path, know: Command
) -> None:
    for k in range(2):
        write(tmp_path / f"s{k}", *LAYOUTS[after])
    write(tmp_path / "out", *LAYOUTS[before], 7.0)
    done = know("predict", "s0", "s1", "-o", "out", "--method", "naive", "--force", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert names(tmp_path / "out") == names(tmp_path / "s0")


# ------------------------------------------------------------------------- several models


def test_the_usual_model_goes_before_its_variants_and_others(tmp_path: Path) -> None:
    write(tmp_path, ["adapter_model.safetensors"], None, 3.0)
    write(tmp_path, ["model.fp16.safetensors"], None, 2.0)
    write(tmp_path, ["model.safetensors"], None, 1.0)
    with open_checkpoint(tmp_path) as checkpoint:
        assert [path.name for path in checkpoint.headers] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    with open_checkpoint(tmp_path) as checkpoint:
        assert [path.name for path in checkpoint.headers] == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    "files",
    [["model.fp16.safetensors", "model.bf16.safetensors"],
     ["consolidated.00.safetensors", "consolidated.01.safetensors"],
     [*numbered("a", 2), *numbered("b", 2)],
     [*numbered("model", 2), *numbered("model", 3)]],
)  # fmt: skip
def test_models_of_which_none_goes_first_are_refused(files: list[str], tmp_path: Path) -> None:
    for file in files:
        save_file(state(1.0), tmp_path / file)
    with pytest.raises(CheckpointError, match="several models, none of which goes first") as caught:
        open_checkpoint(tmp_path)
    assert files[0] in str(caught.value)


def test_an_index_and_a_file_beside_it_are_refused(tmp_path: Path) -> None:
    stem = "diffusion_pytorch_model"
    write(tmp_path, numbered(stem, 2), f"{stem}.safetensors.index.json")
    save_file(state(1.0), tmp_path / f"{stem}.safetensors")
    with pytest.raises(CheckpointError, match=f"both {stem}.safetensors and the shards of"):
        open_checkpoint(tmp_path)


def test_what_is_removed_first_is_not_what_is_read(tmp_path: Path) -> None:
    write(tmp_path, numbered("model", 2), "model.safetensors.index.json")
    save_file(state(1.0), tmp_path / "adapter_model.safetensors")
    save_file(state(1.0), tmp_path / "mine.safetensors")
    assert weights_in(tmp_path) == [
        "adapter_model.safetensors", *numbered("model", 2), "model.safetensors.index.json",
    ]  # fmt: skip


# ------------------------------------------------------------------------- what is there instead


def pipeline(folder: Path) -> None:
    for part, stem in (
        ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")
    ):  # fmt: skip
        write(folder / part, [f"{stem}.safetensors"], None)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")


def pickles(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (folder / "training_args.bin").write_bytes(b"PK\x03\x04")
    (folder / "config.json").write_text("{}")


def sharded_pickles(folder: Path) -> None:
    for n in (1, 2):
        (folder / f"pytorch_model-0000{n}-of-00002.bin").write_bytes(b"PK\x03\x04")
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def a_pipeline_of_pickles(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")
    (folder / "unet").mkdir()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")


def other_formats(folder: Path) -> None:
    (folder / "tf_model.h5").write_bytes(b"\x89HDF\r\n")
    (folder / "flax_model.msgpack").write_bytes(b"x")


def incomplete_shards(folder: Path) -> None:
    for name in (*numbered("model", 4)[:2], numbered("model", 4)[3]):
        save_file({name: torch.ones(1)}, folder / name)


def a_file_of_another_name(folder: Path) -> None:
    save_file(state(1.0), folder / "best.safetensors")


def a_trainer_s_folder(folder: Path) -> None:
    for step in (100, 200):
        write(folder / f"checkpoint-{step}", ["model.safetensors"], None)


def a_cache(folder: Path) -> None:
    write(folder / "snapshots" / "4d7a", ["model.safetensors"], None)


def nothing(folder: Path) -> None:
    pass


def text_only(folder: Path) -> None:
    for name in ("README.md", "config.json", "tokenizer.json"):
        (folder / name).write_text("{}")


INSTEAD: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "pipeline": (pipeline, ("is a pipeline of several models: text_encoder, unet, vae", "x/text_encoder")),
    "pickles": (pickles, ("pytorch_model.bin (a PyTorch pickle)", "'know convert'")),
    "sharded pickles": (sharded_pickles, ("pytorch_model-00001-of-00002.bin, pytorch_model-00002-of-00002.bin", "'know convert'")),
    "pickles further in": (a_pipeline_of_pickles, ("unet/diffusion_pytorch_model.bin", "'know convert'")),
    "other formats": (other_formats, ("flax_model.msgpack (Flax)", "safetensors")),
    "shards missing": (incomplete_shards, ("3 of the 4 shards", "model-00003-of-00004.safetensors is missing")),
    "another name": (a_file_of_another_name, ("best.safetensors", "name the file itself, x/best.safetensors")),
    "a cache": (a_cache, ("snapshots/4d7a",)),
    "nothing": (nothing, ("it is empty",)),
    "text only": (text_only, ("README.md, config.json, tokenizer.json",)),
}  # fmt: skip


@pytest.mark.parametrize("case", INSTEAD)
def test_a_folder_without_a_model_says_what_it_has(
    case: str, tmp_path: Path, know: Command
) -> None:
    make, words = INSTEAD[case]
    write(tmp_path / "y", ["model.safetensors"], None)
    (tmp_path / "x").mkdir()
    make(tmp_path / "x")
    done = know("predict", "x", "y", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    line = one_line(done.stderr)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_a_trainer_s_folder_is_a_run(tmp_path: Path, know: Command) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        a_trainer_s_folder(tmp_path / name)
    done = know("predict", "x", "y", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "is a folder with checkpoints of a training run; add --trajectory run" in one_line(
        done.stderr
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_component_of_pipelines(component: str, tmp_path: Path, know: Command) -> None:
    for k in range(3):
        pipeline(tmp_path / f"pipe{k}")
    for argument in (f"pipe0/{component}..pipe2/{component}", f"pipe0..pipe2/{component}"):
        done = know("predict", argument, "-o", "out", "--method", "naive", "--force", cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr
        assert names(tmp_path / "out") == names(tmp_path / "pipe0" / component)


def test_an_index_is_no_checkpoint_file(tmp_path: Path) -> None:
    write(tmp_path, numbered("model", 2), "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="is an index of shards.*name its folder"):
        open_checkpoint(tmp_path / "model.safetensors.index.json")


# ------------------------------------------------------------------------- links and the cache


def cached(cache: Path, revision: str, folder: Path, inside: str) -> Path:
    """A folder's files in the cache of Hugging Face: in blobs, with links from the snapshot."""
    place = cache / "snapshots" / revision / inside
    place.mkdir(parents=True)
    (cache / "blobs").mkdir(exist_ok=True)
    for path in folder.iterdir():
        blob = hashlib.sha256(revision.encode() + path.read_bytes()).hexdigest()
        shutil.copyfile(path, cache / "blobs" / blob)
        depth = len(place.relative_to(cache).parts)
        (place / path.name).symlink_to(Path(*[".."] * depth, "blobs", blob))
    return place


@pytest.mark.parametrize("layout", ["transformers", "diffusers, sharded", "a variant"])
@pytest.mark.parametrize("inside", ["", "unet", "deep/unet"])
@pytest.mark.parametrize("far", [False, True], ids=["here", "blobs behind a link"])
def test_snapshots_of_the_cache(
    layout: str, inside: str, far: bool, tmp_path: Path, know: Command
) -> None:
    cache = tmp_path / "hub" / "models--a--b"
    if far:
        (tmp_path / "disk").mkdir()
        cache.mkdir(parents=True)
        (cache / "blobs").symlink_to(tmp_path / "disk")
    for k in range(2):
        cached(cache, f"r{k}", write(tmp_path / f"s{k}", *LAYOUTS[layout], 1.0 + k), inside)
    (tmp_path / "short").symlink_to(cache / "snapshots")
    done = know(
        "predict", f"short/r0/{inside}", f"short/r1/{inside}", "-o", "out", "--method", "naive", cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert names(tmp_path / "out") == names(tmp_path / "s0")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert "left out" not in done.stderr


@pytest.mark.parametrize("layout", ["transformers", "PEFT", "diffusers, sharded", "a variant"])
def test_a_link_out_of_the_folder_is_refused_for_single_files_too(
    layout: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "s0", *LAYOUTS[layout])
    file = folder / LAYOUTS[layout][0][0]
    file.rename(tmp_path / "elsewhere")
    file.symlink_to("../elsewhere")
    with pytest.raises(CheckpointError, match="link that leads out of the folder"):
        open_checkpoint(folder)
    # Within the folder it may lead anywhere.
    (tmp_path / "elsewhere").rename(folder / "kept")
    file.unlink()
    file.symlink_to("kept")
    open_checkpoint(folder).close()


def test_blobs_that_lead_to_private_files_are_not_copied(tmp_path: Path, know: Command) -> None:
    """A stranger's folder can look like a cache whose blobs are any folder of this disk."""
    private, cache = tmp_path / "private", tmp_path / "cache"
    private.mkdir()
    cache.mkdir()
    (private / "secrets").write_text("secret")
    (cache / "blobs").symlink_to(private)
    folder = write(cache / "snapshots" / "r0", ["model.safetensors"], None)
    (folder / "notes.txt").symlink_to("../../blobs/secrets")
    write(tmp_path / "s1", ["model.safetensors"], None)
    done = know("predict", folder, "s1", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert names(tmp_path / "out") == {"model.safetensors", "config.json"}
    assert "notes.txt: left out" in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "rust_model.ot",
        "model.onnx_data",
        "tf_model.h5",
        "model.keras",
        "model.tflite",
        "model.gguf",
    ],
)
def test_weights_in_other_formats_do_not_go_with_a_prediction(
    name: str, tmp_path: Path, know: Command
) -> None:
    """They are Θ0's, and some reader would take them for the predicted ones."""
    for k in range(2):
        write(tmp_path / f"s{k}", ["model.safetensors"], None, 1.0 + k)
    (tmp_path / "s0" / name).write_bytes(b"x")
    done = know("predict", "s0", "s1", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert names(tmp_path / "out") == {"model.safetensors", "config.json"}
    assert f"{name}: left out" in done.stderr


def test_a_link_to_nothing_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match="is a link to 'gone', where there is no file"):
        open_checkpoint(tmp_path)


# ------------------------------------------------------------------------- the output's form


@pytest.mark.parametrize("name", ["x.safetensors", "my out.SAFETENSORS"])
def test_a_file_s_name_for_a_folder_is_refused(name: str, tmp_path: Path, know: Command) -> None:
    for k in range(2):
        write(tmp_path / f"s{k}", ["adapter_model.safetensors"], None)
    done = know("predict", "s0", "s1", "-o", name, "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert f"{name}: is the name of a file, but the output is a folder" in one_line(done.stderr)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["dir/", "my dir/", "dir/."])
def test_a_folder_s_name_for_a_file_is_refused(name: str, tmp_path: Path, know: Command) -> None:
    for k in range(2):
        save_file(state(1.0 + k), tmp_path / f"c{k}.safetensors")
    done = know("predict", "c0", "c1", "-o", name, "--method", "naive", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "is the name of a folder, but the output is a file" in one_line(done.stderr)
    assert sorted(names(tmp_path)) == ["c0.safetensors", "c1.safetensors"]
    folders = know("predict", "c0", "c1", "-o", "out", "--method", "naive", cwd=tmp_path)
    assert folders.returncode == EXIT_DONE
