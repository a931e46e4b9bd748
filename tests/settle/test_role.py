"""The roles that the hyper-model settle can read, of tensors of models in use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from know_cli.kinds import NORMALISATION, Kind, classify_all
from know_cli.names import Shape
from know_cli.settle.role import TensorRole, role_features, role_of

INVENTORIES = Path(__file__).parents[1] / "fixtures" / "inventories"
#: As timm names the tensors of a ViT with layer scale.
TIMM_VIT = {
    "cls_token": (1, 1, 64), "pos_embed": (1, 197, 64),
    "patch_embed.proj.weight": (64, 3, 16, 16), "patch_embed.proj.bias": (64,),
    "blocks.0.norm1.weight": (64,), "blocks.0.norm1.bias": (64,),
    "blocks.0.attn.qkv.weight": (192, 64), "blocks.0.attn.qkv.bias": (192,),
    "blocks.0.attn.q_norm.weight": (16,), "blocks.0.attn.q_norm.bias": (16,),
    "blocks.0.attn.proj.weight": (64, 64), "blocks.0.attn.proj.bias": (64,),
    "blocks.0.ls1.gamma": (64,),
    "blocks.0.norm2.weight": (64,), "blocks.0.norm2.bias": (64,),
    "blocks.0.mlp.fc1.weight": (256, 64), "blocks.0.mlp.fc1.bias": (256,),
    "blocks.0.mlp.fc2.weight": (64, 256), "blocks.0.mlp.fc2.bias": (64,),
    "norm.weight": (64,), "norm.bias": (64,), "head.weight": (10, 64), "head.bias": (10,),
}  # fmt: skip
#: As torch names them in its own transformer, with an embedding before.
TORCH_TRANSFORMER = {
    "embedding.weight": (100, 32),
    "layers.0.self_attn.in_proj_weight": (96, 32), "layers.0.self_attn.in_proj_bias": (96,),
    "layers.0.self_attn.out_proj.weight": (32, 32), "layers.0.self_attn.out_proj.bias": (32,),
    "layers.0.linear1.weight": (64, 32), "layers.0.linear1.bias": (64,),
    "layers.0.norm1.weight": (32,), "layers.0.norm1.bias": (32,),
}  # fmt: skip
# Written by hand: model → role → the pattern of all its tensors that are predicted; none is left.
WANTED = {
    "torch-resnet18": {
        "normalisation": r".*\.?bn\d\.(weight|bias)|layer\d\.0\.downsample\.1\.(weight|bias)",
        "pointwise": r"layer[234]\.0\.downsample\.0\.weight",
        "other": r"conv1\.weight|layer\d\.\d\.conv[12]\.weight|fc\.(weight|bias)",
    },
    "gpt2": {
        "normalisation": r".*\.ln_(1|2|f)\.(weight|bias)",
        "table": r"transformer\.w[tp]e\.weight",
        "attention": r".*\.attn\.c_(attn|proj)\.(weight|bias)",
        "other": r".*\.mlp\.c_(fc|proj)\.(weight|bias)|lm_head\.weight",
    },
    "timm-vit": {
        "normalisation": r"(.*\.)?(norm\d?|q_norm)\.(weight|bias)",
        "table": r"cls_token|pos_embed",
        "attention": r"blocks\.0\.attn\.(qkv|proj)\.(weight|bias)",
        "factor": r"blocks\.0\.ls1\.gamma",
        "other": r"patch_embed\.proj\..*|blocks\.0\.mlp\..*|head\..*",
    },
    "torch-transformer": {
        "normalisation": r".*\.norm1\..*",
        "table": r"embedding\.weight",
        "attention": r".*\.self_attn\..*",
        "other": r".*\.linear1\..*",
    },
    "bert": {
        "normalisation": r".*LayerNorm\.(weight|bias)",
        "table": r".*\.(word|position|token_type)_embeddings\.weight",
        "attention": r".*\.attention\.(self\.(query|key|value)|output\.dense)\.(weight|bias)",
        "other": r".*\.layer\.\d\.(intermediate|output)\.dense\..*|cls\.predictions\.(?!.*LayerNorm).*",
    },
    "llama": {
        "normalisation": r".*norm\.weight",
        "table": r"model\.embed_tokens\.weight",
        "attention": r".*\.self_attn\.[qkvo]_proj\.weight",
        "other": r".*\.mlp\..*|lm_head\.weight",
    },
    "convnext": {
        "normalisation": r".*(layernorm|downsampling_layer\.0)\.(weight|bias)",
        "depthwise": r".*\.dwconv\.weight",
        "factor": r".*\.layer_scale_parameter",
        # Of a bias its own name and shape do not tell which convolution it is of.
        "other": r".*\.(dwconv\.bias|pwconv\d\..*|downsampling_layer\.1\..*|patch_embeddings\..*)|classifier\..*",
    },
    "mobilenetv2": {
        "normalisation": r".*\.normalization\.(weight|bias)",
        "depthwise": r".*\.conv_3x3\.convolution\.weight",
        "pointwise": r".*\.((expand|reduce)_1x1|conv_1x1)\.convolution\.weight",
        "other": r".*\.first_conv\.convolution\.weight|classifier\..*",
    },
    "swin": {
        "normalisation": r".*(norm|layernorm|layernorm_(before|after))\.(weight|bias)",
        "table": r".*relative_position_bias_table",
        "attention": r".*\.attention\.[qkvo]_proj\.(weight|bias)",
        "other": r".*\.(mlp\..*|projection\..*|reduction\.weight)|classifier\..*",
    },
}  # fmt: skip


def tensors_of(model: str) -> dict[str, tuple[Shape, str]]:
    """name → (shape, dtype)."""
    by_hand: Mapping[str, Mapping[str, Shape]] = {
        "timm-vit": TIMM_VIT,
        "torch-transformer": TORCH_TRANSFORMER,
    }
    if model in by_hand:
        return {name: (shape, "F32") for name, shape in by_hand[model].items()}
    rows = json.loads((INVENTORIES / f"{model}.json").read_text(encoding="utf-8"))
    return {name: (tuple(shape), dtype) for name, shape, dtype, *_ in rows}


def roles_of(tensors: Mapping[str, tuple[Shape, str]]) -> dict[str, TensorRole]:
    return {
        name: role_of(name, tensors[name][0], found.reason)
        for name, found in classify_all(tensors).items()
        if found.kind is not Kind.COPY
    }


@pytest.mark.parametrize("model", WANTED)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_roles_of_models_in_use(model: str, prefix: str) -> None:
    found = roles_of({prefix + name: of for name, of in tensors_of(model).items()})
    assert {role.value for role in found.values()} == set(WANTED[model])
    for name, role in found.items():
        matching = [
            wanted
            for wanted, pattern in WANTED[model].items()
            if re.fullmatch(pattern, name.removeprefix(prefix))
        ]
        assert matching == [role.value], name


@pytest.mark.parametrize("path", sorted(INVENTORIES.glob("*.json")), ids=lambda path: path.stem)
def test_what_the_rule_says_of_norms_and_tables_is_the_role(path: Path) -> None:
    tensors = tensors_of(path.stem)
    found = roles_of(tensors)
    for name, of in classify_all(tensors).items():
        if of.kind is not Kind.COPY:
            is_norm = of.reason == NORMALISATION
            assert (found[name] is TensorRole.NORMALISATION) == is_norm, name
            if of.reason.startswith("embedding"):
                assert found[name] is TensorRole.TABLE, name
            if found[name] in (TensorRole.DEPTHWISE, TensorRole.POINTWISE):
                assert of.kind is Kind.CONV, name


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        # Names alone say neither that a layer is an attention's nor that a matrix is a table.
        ("h.0.mlp.c_proj.weight", (8, 8), "other"),
        ("attention_pooling.dense.weight", (8, 8), "other"),
        ("attn.cpb_mlp.0.weight", (8, 2), "other"),
        ("attentions.0.transformer_blocks.0.ff.net.0.proj.weight", (8, 8), "other"),
        ("time_embed.0.weight", (8, 8), "other"),
        ("patch_embedding.weight", (8, 3, 4, 4), "other"),
        ("query.weight", (8, 8), "other"),
        ("prelu.weight", (8,), "other"),
        ("attentions.0.transformer_blocks.0.attn1.to_out.0.weight", (8, 8), "attention"),
        ("decoder.block.0.layer.1.EncDecAttention.q.weight", (8, 8), "attention"),
        ("h.0.crossattention.q_attn.weight", (8, 8), "attention"),
        ("mid.attn_1.q.weight", (8, 8, 1, 1), "attention"),
        ("model.layers.0.self_attn.q_proj.base_layer.weight", (8, 8), "attention"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (2, 8), "attention"),
        ("attn.qkv_dwconv.weight", (8, 1, 3, 3), "depthwise"),
        ("attn.logit_scale", (4, 1, 1), "factor"),
        ("attn.relative_position_bias_table", (9, 4), "table"),
        ("model.decoder.embed_positions.weight", (9, 8), "table"),
        ("conv.weight_g", (8, 1, 1), "factor"),
        ("blocks.0.gamma_1", (8,), "factor"),
        ("beit.layers.0.lambda_1", (8,), "factor"),
        ("mixer.conv1d.weight", (8, 1, 4), "depthwise"),
        ("grey.weight", (8, 1, 1, 1), "pointwise"),
        ("", (), "other"),
    ],
)
def test_single_names(name: str, shape: Shape, role: str) -> None:
    reason = classify_all({name: (shape, "F32")})[name].reason
    assert role_of(name, shape, reason).value == role


def test_whose_kind_the_user_chose_is_no_norm() -> None:
    assert role_of("norm.weight", (8,), NORMALISATION) is TensorRole.NORMALISATION
    assert role_of("norm.weight", (8,), "--kind norm.*=fc") is TensorRole.OTHER


@given(st.text(max_size=30), st.lists(st.integers(0, 5), max_size=5), st.text(max_size=5))
def test_any_name_and_shape_has_one_role(name: str, shape: list[int], rule: str) -> None:
    row = role_features(role_of(name, tuple(shape), rule))
    assert (sorted(row), len(row)) == ([0.0] * 6 + [1.0], 7)
    assert role_features(None) == [0.0] * 7
