"""Adapters of PEFT: the matrices of LoRA, the magnitudes of DoRA, a head that is trained whole."""

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
    same,
)

TOKENS = torch.arange(12).reshape(1, 12) * 5 % 64


def logits(model: nn.Module) -> Tensor:
    found = model(input_ids=TOKENS).logits
    assert isinstance(found, Tensor)
    return found


def language_model() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def convolutions() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(1))


def picture(model: nn.Module) -> Tensor:
    found = model(torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8))
    assert isinstance(found, Tensor)
    return found


def load(peft: Any, base: nn.Module, folder: Path) -> Any:
    """The adapter on its base, by PEFT's own loader, which may neither miss nor invent a tensor."""
    model = peft.PeftModel(base, peft.PeftConfig.from_pretrained(folder), "fresh")
    told = model.load_adapter(folder, "default")
    assert told.unexpected_keys == []
    # The weights of the base are no part of an adapter.
    assert [name for name in told.missing_keys if ".default" in name] == []
    return peft.PeftModel.from_pretrained(model.unload(), folder)


@pytest.mark.libraries
@pytest.mark.parametrize("decomposed", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_of_a_language_model(decomposed: bool, tmp_path: Path, know: Command) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, use_dora=decomposed, target_modules=["q_proj", "v_proj", "gate_proj"],
        modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(language_model(), config)
    sessions = record(model, tmp_path, model.save_pretrained, logits)
    out = predict(know, sessions)
    found = check_prediction(sessions, out, ["*layernorm.weight", "*.norm.weight"])
    assert decomposed == any("lora_magnitude_vector" in name for name in found)
    loaded = load(peft, language_model(), out)
    state = peft.get_peft_model_state_dict(loaded)
    assert state.keys() == found.keys()
    assert all(same(state[name], tensor) for name, tensor in found.items())
    check_answer(sessions, loaded, logits)
    loaded.save_pretrained(tmp_path / "again")
    check_saved_again(out, tmp_path / "again")


@pytest.mark.libraries
def test_decomposed_adapters_of_convolutions(tmp_path: Path, know: Command) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=["0", "2"])
    model = peft.get_peft_model(convolutions(), config)
    sessions = record(model, tmp_path, model.save_pretrained, picture)
    out = predict(know, sessions)
    found = check_prediction(sessions, out, [])
    magnitude = found["base_model.model.0.lora_magnitude_vector"]
    assert magnitude.shape == (1, 8, 1, 1)
    loaded = load(peft, convolutions(), out)
    check_answer(sessions, loaded, picture)
    loaded.save_pretrained(tmp_path / "again")
    check_saved_again(out, tmp_path / "again")
