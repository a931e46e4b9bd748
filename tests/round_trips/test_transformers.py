"""Models of transformers: its own configurations, small and random, its own saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.command import Command
from tests.support.round_trips import (
    Sessions,
    check_answer,
    check_prediction,
    check_saved_again,
    predict,
    record,
    same,
    tensors,
)

TOKENS = torch.arange(12).reshape(1, 12) * 5 % 64


def logits(model: nn.Module) -> Tensor:
    found = model(TOKENS).logits
    assert isinstance(found, Tensor)
    return found


def load(kind: Any, folder: Path, **options: Any) -> nn.Module:
    """``from_pretrained``, without a key that is missing, unexpected or of another shape."""
    model, told = kind.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, **options
    )
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(model, nn.Module)
    return model


def save_in_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 3


def qwen3(transformers: Any) -> Any:
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(config)


def test_a_sharded_language_model_with_tied_embeddings(tmp_path: Path, know: Command) -> None:
    transformers = pytest.importorskip("transformers")
    model = qwen3(transformers)
    sessions = record(model, tmp_path, lambda path: save_in_shards(model, path), logits)
    norms = ["*layernorm.weight", "*.q_norm.weight", "*.k_norm.weight", "model.norm.weight"]
    out = predict(know, sessions)
    assert "lm_head.weight" not in check_prediction(sessions, out, norms)
    loaded: Any = load(transformers.Qwen3ForCausalLM, out)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    check_answer(sessions, loaded, logits)
    save_in_shards(loaded, tmp_path / "again")
    check_saved_again(out, tmp_path / "again")
    all_of_it = predict(know, sessions, "--norm", "predict", name="norms")
    check_prediction(sessions, all_of_it, [])
    check_answer(sessions, load(transformers.AutoModelForCausalLM, all_of_it), logits)


def test_experts_whose_balance_no_gradient_moves(tmp_path: Path, know: Command) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, q_lora_rank=16, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(config)
    balance = model.model.layers[1].mlp.gate.e_score_correction_bias

    def rebalance(session: int) -> None:
        balance.copy_(torch.tensor([0.3, -0.1, 0.2, 0.1]) * (1 + 0.001 * session))

    sessions = record(
        model, tmp_path, lambda path: save_in_shards(model, path), logits, between=rebalance
    )
    out = predict(know, sessions)
    copied = ["*layernorm.weight", "model.norm.weight", "*.gate.e_score_correction_bias"]
    check_prediction(sessions, out, copied)
    loaded = load(transformers.DeepseekV3ForCausalLM, out)
    check_answer(sessions, loaded, logits)
    save_in_shards(loaded, tmp_path / "again")
    check_saved_again(out, tmp_path / "again")


@pytest.mark.libraries
def test_experts_in_stacks(tmp_path: Path, know: Command) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GraniteMoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GraniteMoeForCausalLM(config)
    sessions = record(model, tmp_path, model.save_pretrained, logits)
    out = predict(know, sessions)
    found = check_prediction(sessions, out, ["*layernorm.weight", "model.norm.weight"])
    assert found["model.layers.0.block_sparse_moe.input_linear.weight"].shape == (4, 32, 32)
    loaded: Any = load(transformers.GraniteMoeForCausalLM, out)
    check_answer(sessions, loaded, logits)
    loaded.save_pretrained(tmp_path / "again")
    check_saved_again(out, tmp_path / "again")


# ---------------------------------------------------------------------- four bits

EXPERTS = ("gate_up_proj", "down_proj")


def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts in random numbers of four bits with a power of two for 32 of them each."""
    generator = torch.Generator().manual_seed(2)
    packed = {}
    for name, tensor in state.items():
        if not name.endswith(EXPERTS):
            packed[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator)
        scales = torch.randint(118, 122, (experts, outputs, inputs // 32), generator=generator)
        packed[f"{name}_blocks"] = blocks.to(torch.uint8)
        packed[f"{name}_scales"] = scales.to(torch.uint8)
    return packed


def test_experts_in_four_bits(tmp_path: Path, know: Command) -> None:
    """The packed form of gpt-oss; its loader unpacks it where there is no GPU."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(EXPERTS))
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    unpack = transformers.Mxfp4Config(dequantize=True)

    def save(path: Path) -> None:
        model.save_pretrained(path, state_dict=pack(model.state_dict()))

    def load_packed(path: Path) -> Any:
        return load(transformers.GptOssForCausalLM, path, quantization_config=unpack, dtype="auto")

    sessions = record(model, tmp_path, save, logits)
    # The model that was saved has other experts than the one that was packed.
    answers = [
        logits(load_packed(path).eval()).double() for path in (sessions.first, sessions.last)
    ]
    sessions = Sessions(tmp_path, sessions.names, [answer.detach() for answer in answers])
    out = predict(know, sessions)
    packed = [f"*.experts.{name}_{part}" for name in EXPERTS for part in ("blocks", "scales")]
    norms = ["*layernorm.weight", "model.norm.weight"]
    found = check_prediction(sessions, out, [*packed, *norms])
    assert found["model.layers.0.mlp.experts.down_proj_blocks"].dtype == torch.uint8
    loaded = load_packed(out)
    check_answer(sessions, loaded, logits)
    state = loaded.state_dict()
    for name, tensor in found.items():
        assert name.endswith(("_blocks", "_scales")) or same(state[name], tensor)


# ---------------------------------------------------------------------- sound


@pytest.mark.libraries
def test_weight_norm_within_a_speech_encoder(tmp_path: Path, know: Command) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Wav2Vec2Model(config)
    sound = torch.sin(torch.arange(400.0) ** 1.3)[None]

    def answer(model: nn.Module) -> Tensor:
        found = model(sound).last_hidden_state
        assert isinstance(found, Tensor)
        return found

    sessions = record(model, tmp_path, model.save_pretrained, answer)
    out = predict(know, sessions)
    found = check_prediction(sessions, out, ["*layer_norm.weight", "*layer_norm.bias"])
    parts = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    assert (found[f"{parts}0"].shape, found[f"{parts}1"].shape) == ((1, 1, 16), (32, 16, 16))
    loaded: Any = load(transformers.Wav2Vec2Model, out)
    check_answer(sessions, loaded, answer)
    loaded.save_pretrained(tmp_path / "again")
    check_saved_again(out, tmp_path / "again")


def test_codebooks_that_follow_a_moving_average(tmp_path: Path, know: Command) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.EncodecConfig(
        num_filters=4, hidden_size=16, codebook_size=16, codebook_dim=16, upsampling_ratios=[4],
        num_residual_layers=1, num_lstm_layers=1, sampling_rate=400, target_bandwidths=[2.0, 4.0],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.EncodecModel(config)
    books = [layer.codebook for layer in model.quantizer.layers]
    assert books
    for book in books:
        book.embed.normal_()
        book.inited.fill_(1)

    def follow(session: int) -> None:
        for book in books:
            book.cluster_size.copy_(torch.arange(16.0) + 3 + 0.25 * session)
            book.embed.mul_(1.01)
            book.embed_avg.copy_(book.embed * book.cluster_size[:, None])

    sound = torch.sin(torch.arange(128.0) ** 1.2)[None, None]

    def answer(model: Any) -> Tensor:
        codes = model.encode(sound, bandwidth=4.0)
        assert codes.audio_codes.unique().numel() > 4
        return torch.cat([model.encoder(sound).flatten(), model(sound).audio_values.flatten()])

    sessions = record(model, tmp_path, model.save_pretrained, answer, between=follow)
    out = predict(know, sessions)
    leaves = ("embed", "embed_avg", "cluster_size", "inited")
    copied = [f"quantizer.layers.*.codebook.{leaf}" for leaf in leaves]
    check_prediction(sessions, out, copied)
    assert not same(
        *(tensors(path)["quantizer.layers.0.codebook.embed"] for path in (out, sessions.last))
    )
    loaded: Any = load(transformers.EncodecModel, out)
    check_answer(sessions, loaded, answer)
    loaded.save_pretrained(tmp_path / "again")
    check_saved_again(out, tmp_path / "again")
