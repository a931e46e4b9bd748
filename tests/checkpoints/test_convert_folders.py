"""``know convert`` of folders, shards, indexes and several inputs at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from know_cli.checkpoints import open_checkpoint
from know_cli.checkpoints import pickles as module
from know_cli.checkpoints.pickle_folders import safetensors_name
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_OUTPUT
from tests.support.command import Command, one_line
from tests.support.pickles import names
from tests.support.trajectories import network


def shards(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """A network's state dict dealt out to shards."""
    state = list(network(seed).items())
    return [dict(state[number::count]) for number in range(count)]


def write_shards(
    folder: Path, stem: str = "pytorch_model", end: str = ".bin", index: str | None = None
) -> dict[str, Tensor]:
    """A sharded model; ``index`` is the name of its index, if it is to have one."""
    folder.mkdir(exist_ok=True)
    weight_map, whole = {}, {}
    for number, shard in enumerate(shards(), 1):
        name = f"{stem}-{number:05d}-of-00003{end}"
        torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
        whole |= shard
    if index is not None:
        content = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": weight_map}
        (folder / index).write_text(json.dumps(content))
    return whole


def same(folder: Path, state: dict[str, Tensor]) -> bool:
    """Whether all files of a folder together hold exactly a state dict."""
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        part = load_file(path)
        assert not part.keys() & found.keys()
        found |= part
    return found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


def test_a_single_file_and_what_lies_beside_it(tmp_path: Path, know: Command) -> None:
    source = tmp_path / "bert"
    (source / "onnx").mkdir(parents=True)
    (source / "1_Pooling").mkdir()
    torch.save(network(), source / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", "trainer_state.json"):
        (source / name).write_text("{}")
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "tf_model.h5",
        ".gitattributes",
        "onnx/model.onnx",
    ):
        (source / name).write_text("no weights of PyTorch")
    done = know("convert", "bert", "-o", "out", cwd=tmp_path, process=True)
    assert done.returncode == EXIT_DONE, done.stderr
    assert names(tmp_path / "out") == [
        "1_Pooling/config.json", "config.json", "model.safetensors", "tokenizer.json",
        "trainer_state.json",
    ]  # fmt: skip
    assert "wrote out: 16 tensors, " in done.stdout
    for name in ("training_args.bin", "optimizer.pt", "tf_model.h5", "onnx"):
        assert f"bert/{name}: left out, it is not of the model" in done.stderr
    assert "pytorch_model.bin" not in done.stderr
    save_file(network(), tmp_path / "expected", {"format": "pt"})
    out = tmp_path / "out" / "model.safetensors"
    assert out.read_bytes() == (tmp_path / "expected").read_bytes()


SHARDED = {
    "transformers": ("pytorch_model", ".bin", "pytorch_model.bin.index.json", "model-{}.safetensors", "model.safetensors.index.json"),
    "a variant of it": ("pytorch_model.fp16", ".bin", "pytorch_model.bin.index.fp16.json", "model.fp16-{}.safetensors", "model.safetensors.index.fp16.json"),
    "diffusers": ("diffusion_pytorch_model", ".bin", "diffusion_pytorch_model.bin.index.json", "diffusion_pytorch_model-{}.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    "another variant": ("diffusion_pytorch_model", ".fp16.bin", "diffusion_pytorch_model.bin.index.fp16.json", "diffusion_pytorch_model-{}.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
}  # fmt: skip


@pytest.mark.parametrize("by", ["folder", "index", "no index", "shards"])
@pytest.mark.parametrize("case", SHARDED)
def test_shards_become_the_same_shards(case: str, by: str, tmp_path: Path, know: Command) -> None:
    stem, end, index, shard, new_index = SHARDED[case]
    state = write_shards(tmp_path / "in", stem, end, index if "no" not in by else None)
    (tmp_path / "in" / "config.json").write_text("{}")
    given = {
        "index": [f"in/{index}"],
        "shards": [f"in/{stem}-{n:05d}-of-00003{end}" for n in (2, 1, 3)],
    }
    if by == "shards":
        (tmp_path / "in" / index).unlink()
    done = know("convert", *given.get(by, ["in"]), "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert done.stderr == ""
    files = [shard.format(f"{n:05d}-of-00003") for n in (1, 2, 3)]
    beside = [] if by == "shards" else ["config.json"]
    assert names(tmp_path / "out") == sorted([*files, new_index, *beside])
    assert same(tmp_path / "out", state)
    content = json.loads((tmp_path / "out" / new_index).read_text())
    expected = {name: files[n] for n, part in enumerate(shards()) for name in part}
    assert content["weight_map"] == expected
    size = sum(tensor.nbytes for tensor in state.values())
    kept = {"note": "kept"} if by in ("folder", "index") else {}
    assert content["metadata"] == {"total_size": size, **kept}


def test_a_converted_folder_is_read_as_a_checkpoint(tmp_path: Path, know: Command) -> None:
    state = write_shards(tmp_path / "in", index="pytorch_model.bin.index.json")
    assert know("convert", "in", "-o", "out", cwd=tmp_path).returncode == EXIT_DONE
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.tensors.keys() == state.keys()
        assert len(checkpoint.headers) == 3
    done = know("predict", "out", "in", "-o", "x", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.fp16.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("consolidated.00.pth", "consolidated.safetensors"),
    ],
)
def test_names_of_libraries(name: str, becomes: str, tmp_path: Path, know: Command) -> None:
    (tmp_path / "in").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "in" / name)
    done = know("convert", "in", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert names(tmp_path / "out") == [becomes]
    assert safetensors_name(name) == becomes


def test_keys_go_through_all_shards(tmp_path: Path, know: Command) -> None:
    (tmp_path / "in").mkdir()
    for number, shard in enumerate(shards(2), 1):
        content = {"model": shard, "ema": {name: value * 2 for name, value in shard.items()}}
        torch.save(content, tmp_path / "in" / f"pytorch_model-{number:05d}-of-00002.bin")
    done = know("convert", "in", "-o", "out", cwd=tmp_path)
    assert "holds more than one state dict" in one_line(done.stderr)
    done = know("convert", "in", "-o", "out", "--key", "model", cwd=tmp_path)
    assert done.stderr.count("taking the state dict under 'model'") == 1
    assert done.stderr.count("a moving average of the weights is there as well, under 'ema'") == 1
    assert same(tmp_path / "out", network())


def test_links_of_the_cache_of_hugging_face(tmp_path: Path, know: Command) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "models--x" / "blobs" / "4d7a")
    (snapshot / "pytorch_model.bin").symlink_to("../../blobs/4d7a")
    done = know("convert", snapshot, "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert same(tmp_path / "out", {"w": torch.ones(2)})


def _several(folder: Path) -> None:
    for number in range(3):
        torch.save({"w": torch.full((2,), float(number))}, folder / f"ckpt{number}.pt")
    (folder / "hf").mkdir()
    torch.save({"w": torch.ones(2)}, folder / "hf" / "pytorch_model.bin")
    (folder / "hf" / "config.json").write_text("{}")


def test_several_inputs_go_into_a_folder(tmp_path: Path, know: Command) -> None:
    _several(tmp_path)
    done = know("convert", "ckpt0.pt", "ckpt2.pt", "hf", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert names(tmp_path / "out") == [
        "ckpt0.safetensors", "ckpt2.safetensors", "hf/config.json", "hf/model.safetensors",
    ]  # fmt: skip
    assert load_file(tmp_path / "out" / "ckpt2.safetensors")["w"].tolist() == [2, 2]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "wrote out/ckpt0.safetensors", "wrote out/ckpt2.safetensors", "wrote out/hf",
    ]  # fmt: skip
    done = know("convert", "ckpt0..ckpt2.pt", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "out/ckpt0.safetensors: exists already" in one_line(done.stderr)
    assert not (tmp_path / "out" / "ckpt1.safetensors").exists()
    done = know("convert", "ckpt0..ckpt2.pt", "-o", "out", "--force", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert load_file(tmp_path / "out" / "ckpt1.safetensors")["w"].tolist() == [1, 1]
    done = know("convert", "hf/pytorch_model.bin", "hf", "-o", "more", cwd=tmp_path)
    assert names(tmp_path / "more") == [
        "hf/config.json",
        "hf/model.safetensors",
        "model.safetensors",
    ]


def test_one_that_cannot_be_converted_keeps_all_from_being_written(
    tmp_path: Path, know: Command
) -> None:
    _several(tmp_path)
    (tmp_path / "ckpt1.pt").write_bytes(b"spoilt")
    done = know("convert", "ckpt0..ckpt2.pt", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "ckpt1.pt: is not a file of torch.save" in one_line(done.stderr)
    assert not (tmp_path / "out").exists()
    # What only shows in the data ends the run in its middle; each output is whole or not there.
    content = bytearray((tmp_path / "ckpt2.pt").read_bytes())
    content[content.index(torch.full((2,), 2.0).numpy().tobytes())] ^= 1
    (tmp_path / "ckpt2.pt").write_bytes(content)
    done = know("convert", "ckpt0.pt", "ckpt2.pt", "-o", "out", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert names(tmp_path / "out") == ["ckpt0.safetensors"]
    done = know("convert", "ckpt2.pt", "ckpt0.pt", "-o", "other", cwd=tmp_path)
    assert not (tmp_path / "other").exists()


def test_a_damaged_shard_leaves_the_old_output_as_it_was(tmp_path: Path, know: Command) -> None:
    write_shards(tmp_path / "in", index="pytorch_model.bin.index.json")
    assert know("convert", "in", "-o", "out", cwd=tmp_path).returncode == EXIT_DONE
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")}
    path = tmp_path / "in" / "pytorch_model-00003-of-00003.bin"
    content = bytearray(path.read_bytes())
    wanted = (
        shards()[2]["conv1.bias"]
        if "conv1.bias" in shards()[2]
        else next(iter(shards()[2].values()))
    )
    content[content.index(wanted.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    done = know("convert", "in", "-o", "out", "--force", cwd=tmp_path)
    assert "Bad CRC-32" in one_line(done.stderr)
    assert {
        name: (tmp_path / "out" / name).read_bytes() for name in names(tmp_path / "out")
    } == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_shards_are_read_one_by_one(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held of a shard that is not being copied is its list of tensors."""
    write_shards(tmp_path / "in", index="pytorch_model.bin.index.json")
    real, open_now, most = module.open_torch_file, [0], [0]

    @contextmanager
    def counted(path: Path) -> Iterator[Any]:
        open_now[0] += 1
        most[0] = max(most[0], open_now[0])
        with real(path) as file:
            yield file
        open_now[0] -= 1

    monkeypatch.setattr(module, "open_torch_file", counted)
    assert know("convert", "in", "-o", "out", cwd=tmp_path).returncode == EXIT_DONE
    assert most == [1]


def test_an_existing_folder_is_replaced_with_force(tmp_path: Path, know: Command) -> None:
    state = write_shards(tmp_path / "in", index="pytorch_model.bin.index.json")
    (tmp_path / "out").mkdir()
    save_file({"old": torch.ones(1)}, tmp_path / "out" / "model.safetensors")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "old.pt").write_text("mine")
    done = know("convert", "in", "-o", "out", cwd=tmp_path)
    assert "out: exists already; --force replaces it" in one_line(done.stderr)
    done = know("convert", "in", "-o", "out", "--force", cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "out/old.pt: was there before and stays, beside the converted weights" in done.stderr
    assert same(tmp_path / "out", state)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_model_of_transformers_answers_as_before(tmp_path: Path, know: Command) -> None:
    """Saved as older versions did, whole and in shards, tied weights included."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        expected = model(tokens).logits
    config.save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "sharded")
    state = model.state_dict()
    torch.save(state, tmp_path / "whole" / "pytorch_model.bin")
    parts = [dict(list(state.items())[:11]), dict(list(state.items())[11:])]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(part, tmp_path / "sharded" / name)
        weight_map |= dict.fromkeys(part, name)
    (tmp_path / "sharded" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    for form in ("whole", "sharded"):
        done = know("convert", form, "-o", f"{form}-out", cwd=tmp_path)
        assert done.returncode == EXIT_DONE, done.stderr
        assert (form == "whole") == ("share memory" in done.stderr)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{form}-out").eval()
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, expected)
