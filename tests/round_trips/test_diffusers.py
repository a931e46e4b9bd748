"""Models of diffusers, as component folders: whole, in shards, in shards of a variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.command import Command
from tests.support.round_trips import (
    check_answer,
    check_prediction,
    check_saved_again,
    predict,
    record,
)

NORMS = ["*norm*.weight", "*norm*.bias"]
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "whole": ({}, "diffusion_pytorch_model.safetensors"),
    "sharded": (
        {"max_shard_size": "150KB"},
        "diffusion_pytorch_model.safetensors.index.json",
    ),
    "a variant, sharded": (
        {"max_shard_size": "150KB", "variant": "fp16"},
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ),
}


def unet(diffusers: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def answer(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    words = torch.randn(1, 5, 24, generator=generator)
    found = model(noise, 7, encoder_hidden_states=words).sample
    assert isinstance(found, Tensor)
    return found


@pytest.mark.libraries
@pytest.mark.parametrize("form", FORMS)
def test_a_unet(form: str, tmp_path: Path, know: Command) -> None:
    diffusers = pytest.importorskip("diffusers")
    options, file = FORMS[form]
    variant = {"variant": options["variant"]} if "variant" in options else {}
    model = unet(diffusers)
    sessions = record(model, tmp_path, lambda path: model.save_pretrained(path, **options), answer)
    assert (sessions.first / file).is_file()
    out = predict(know, sessions)
    check_prediction(sessions, out, NORMS)
    loaded, told = diffusers.UNet2DConditionModel.from_pretrained(
        out, output_loading_info=True, local_files_only=True, **variant
    )
    assert not any(told.values()), told
    check_answer(sessions, loaded, answer)
    loaded.save_pretrained(tmp_path / "again", **options)
    check_saved_again(out, tmp_path / "again")
