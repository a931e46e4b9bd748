"""Language models and adapters by their tensors' names, and what their users are told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from know_cli.kinds import Kind, classify_all
from know_cli.known import language
from know_cli.names import Shape
from tests.support.check_inventories import read_inventories
from tests.support.command import Command
from tests.support.trajectories import write_trajectory

SAMPLE = Path(__file__).parents[1] / "fixtures" / "inventories-sample.zip"
OF_TEXT: dict[str, dict[str, Shape]] = {
    "gpt2": {"transformer.wte.weight": (50257, 768), "transformer.h.0.attn.c_attn.weight": (768, 2304)},
    "llama": {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096)},
    "t5": {"shared.weight": (32128, 512), "encoder.block.0.layer.0.SelfAttention.q.weight": (512, 512)},
    "bert": {"bert.embeddings.word_embeddings.weight": (30522, 768), "classifier.weight": (2, 768)},
    "few letters": {"embed_tokens.weight": (33, 1280), "layers.0.fc1.weight": (5120, 1280)},
    "peft": {"base_model.model.layers.0.q_proj.lora_A.weight": (8, 64),
             "base_model.model.layers.0.q_proj.lora_B.weight": (64, 8)},
    "kohya": {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768),
              "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (3072, 4)},
}  # fmt: skip
OF_NO_TEXT: dict[str, dict[str, Shape]] = {
    "perceptron": {"fc1.weight": (64, 784), "fc1.bias": (64,), "head.weight": (10, 64)},
    "vit": {"patch_embed.proj.weight": (192, 3, 16, 16), "pos_embed": (1, 197, 192)},
    "patches by a matrix": {"embeddings.patch_embedding.weight": (1152, 768),
                            "embeddings.position_embedding.weight": (256, 1152),
                            "layers.0.fc1.weight": (4304, 1152)},
    "captions": {"conv.weight": (16, 3, 3, 3), "words.embedding.weight": (60, 32)},
    "adapter of a convolution": {"down.lora_A.weight": (4, 64, 3, 3), "down.lora_B.weight": (64, 4, 1, 1)},
    "shared layers": {"shared.weight": (64, 8), "shared.bias": (64,), "actor.weight": (4, 64)},
    "tokens that are mixed": {"blocks.0.mlp_tok.weight": (64, 49), "blocks.0.mlp_tok.bias": (64,)},
    "items": {"user_embedding.weight": (1000, 16), "item_embedding.weight": (500, 16)},
    "a class token": {"cls_token.token": (10, 64), "blocks.0.fc1.weight": (64, 64)},
    "queries of attention": {"attn.query_key_value.weight": (96, 32)},
}  # fmt: skip


def is_of_language(tensors: Mapping[str, tuple[Shape, str]]) -> bool:
    kinds = {name: found.kind for name, found in classify_all(tensors).items()}
    return language.is_of_language({name: shape for name, (shape, _) in tensors.items()}, kinds)


def floats(shapes: dict[str, Shape]) -> dict[str, tuple[Shape, str]]:
    return {name: (shape, "F32") for name, shape in shapes.items()}


@pytest.mark.parametrize("name", OF_TEXT)
def test_language_models_and_adapters_are_told_by_their_names(name: str) -> None:
    tensors = floats(OF_TEXT[name])
    assert is_of_language(tensors)
    # A single convolution makes it another network.
    assert not is_of_language(tensors | floats({"stem.conv.weight": (8, 3, 3, 3)}))


@pytest.mark.parametrize("name", OF_NO_TEXT)
def test_other_networks_are_not(name: str) -> None:
    tensors = floats(OF_NO_TEXT[name])
    assert not is_of_language(tensors)


def test_words_that_cannot_be_predicted_do_not_count() -> None:
    codes = {"embed_tokens.weight": ((32000, 64), "I8"), "fc1.weight": ((64, 64), "F32")}
    assert not is_of_language(codes)


def test_real_networks_with_words_and_no_convolution_are_found() -> None:
    """By the types of the modules, which are not asked for."""
    counted = {True: 0, False: 0}
    for name, inventory in read_inventories(SAMPLE):
        tensors: dict[str, tuple[Shape, str]] = {
            tensor: (tuple(shape), dtype) for tensor, shape, dtype, *_ in inventory["tensors"]
        }
        has_convolution = Kind.CONV in {found.kind for found in classify_all(tensors).values()}
        has_words = any(
            owner.endswith("Embedding") and "position" not in tensor and "patch" not in tensor
            for tensor, *_, owner in inventory["tensors"]
        )
        is_wanted = (has_words or "lora" in name) and not has_convolution
        counted[is_wanted] += 1
        assert is_of_language(tensors) == is_wanted, name
    assert min(counted.values()) >= 3


# --- the command ---------------------------------------------------------------------------------

TOLD = "warning: these look like a language model or an adapter"


def write_model(folder: Path, extra: dict[str, torch.Tensor]) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    first = {"blocks.0.fc1.weight": torch.randn(16, 8, generator=generator), **extra}
    return write_trajectory(
        folder,
        [
            {
                name: t + 0.1 * k * torch.randn(t.shape, generator=generator)
                for name, t in first.items()
            }
            for k in range(5)
        ],
    )


def notices(know: Command, *arguments: Any) -> str:
    done = know("predict", *arguments, "--json", "-", "--force")
    assert done.returncode == 0, done.stderr
    found: str = "\n".join(json.loads(done.stdout)["notices"])
    assert (TOLD in found) == (TOLD in " ".join(done.stderr.split()))
    return found


def test_users_of_the_default_are_told_what_was_measured(tmp_path: Path, know: Command) -> None:
    paths = write_model(tmp_path, {"embed_tokens.weight": torch.zeros(12, 8)})
    out = ("-o", tmp_path / "out.safetensors")
    told = notices(know, *paths, *out)
    assert "KNOWN continuation was a worse start than the first checkpoint" in told
    assert TOLD in notices(know, *paths, *out, "--dry-run")
    # Not where they have chosen themselves.
    for chosen in (
        ["--weights", "continuation"], ["--weights", "retrodiction"], ["--method", "average"],
        ["--method", "lstsq"], ["--trajectory", "run"], ["--kind", "embed_tokens*=copy"],
    ):  # fmt: skip
        assert TOLD not in notices(know, *paths, *out, *chosen)


def test_users_with_other_networks_are_not_told(tmp_path: Path, know: Command) -> None:
    paths = write_model(tmp_path, {"conv.weight": torch.ones(4, 4, 3, 3)})
    assert TOLD not in notices(know, *paths, "-o", tmp_path / "out.safetensors")
