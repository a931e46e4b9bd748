"""Builds the inventories in ``tests/fixtures``: names, shapes and kinds of real architectures.

Run by hand, needs the extra ``test``: ``python -m tests.support.make_inventories``. Models are
built on the meta device from their configurations, small, but with the real names; nothing is
downloaded. Review what changes by eye before it is committed: the tests take the inventories
for what is right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor, nn

from know_cli.checkpoints.dtypes import safetensors_dtype
from know_cli.kinds import classify
from know_cli.normalisation import find_norm_layers

FOLDER = Path(__file__).parents[1] / "fixtures" / "inventories"
State = dict[str, Tensor]


def state(build: Callable[[], nn.Module]) -> State:
    """State dict of a model on the meta device."""
    with torch.device("meta"):
        return dict(build().state_dict())


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm, ReLU6 in one Sequential, as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(),
        )


class ResidualBlock(nn.Module):
    """BasicBlock of torchvision's ResNet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )


class ResNet18(nn.Module):
    """torchvision's ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, outputs in enumerate((64, 128, 256, 512), 1):
            blocks = nn.Sequential(ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs))
            self.add_module(f"layer{number}", blocks)
            inputs = outputs
        self.fc = nn.Linear(512, 1000)


class PreActivationBlock(nn.Module):
    """Block of a pre-activation ResNet: bn1 comes before conv1."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, bias=False)


class PreActivationResNet(nn.Module):
    """He et al., 2016, for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, bias=False)
        self.layer1 = nn.Sequential(PreActivationBlock(64, 64), PreActivationBlock(64, 64))
        self.layer2 = nn.Sequential(PreActivationBlock(64, 128), PreActivationBlock(128, 128))
        self.linear = nn.Linear(128, 10)


class InvertedResidual(nn.Module):
    """Block of torchvision's MobileNetV2."""

    def __init__(self, inputs: int, outputs: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = [] if expand == 1 else [ConvNorm(inputs, hidden, 1)]
        layers += [
            ConvNorm(hidden, hidden, 3, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)


class MobileNetV2(nn.Module):
    """torchvision's MobileNetV2, shortened."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNorm(3, 32, 3),
            InvertedResidual(32, 16, 1),
            InvertedResidual(16, 24, 6),
            InvertedResidual(24, 24, 6),
            ConvNorm(24, 1280, 1),
        )
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 1000))


class DenseLayer(nn.Module):
    """Layer of torchvision's DenseNet: each norm comes before the convolution of its number."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 128, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 32, 3, bias=False)


class DenseNet(nn.Module):
    """torchvision's DenseNet, shortened; its third layer has 128 inputs, as many as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 64, 7, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(64))
        block = nn.ModuleDict({f"denselayer{k + 1}": DenseLayer(64 + 32 * k) for k in range(3)})
        self.features.add_module("denseblock1", block)
        transition = nn.ModuleDict(
            {"norm": nn.BatchNorm2d(160), "conv": nn.Conv2d(160, 80, 1, bias=False)}
        )
        self.features.add_module("transition1", transition)
        self.features.add_module("norm5", nn.BatchNorm2d(80))
        self.classifier = nn.Linear(80, 1000)


class AtrousPooling(nn.Module):
    """ASPP of torchvision's DeepLabV3."""

    def __init__(self) -> None:
        super().__init__()
        branches: list[nn.Module] = [ConvNorm(512, 256, 1)]
        branches += [ConvNorm(512, 256, 3) for _ in range(3)]
        pooling = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(512, 256, 1, bias=False), nn.BatchNorm2d(256)
        )
        self.convs = nn.ModuleList([*branches, pooling])
        self.project = ConvNorm(5 * 256, 256, 1)


def deeplab_head() -> nn.Module:
    """DeepLabHead of torchvision, under its usual name."""
    head = nn.Sequential(
        AtrousPooling(),
        nn.Conv2d(256, 256, 3, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.Conv2d(256, 21, 1),
    )
    return nn.ModuleDict({"classifier": head})


def lora() -> State:
    """Adapter matrices as PEFT names them."""
    tensors: State = {}
    for layer in range(2):
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.empty(8, 64, device="meta")
            tensors[f"{prefix}.lora_B.weight"] = torch.empty(64, 8, device="meta")
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.empty(
        8, 1000, device="meta"
    )
    return tensors


def gptq() -> State:
    """One quantised layer as GPTQ and AWQ name it, with the float tensors around it."""
    prefix = "model.layers.0.mlp.up_proj"
    return {
        f"{prefix}.qweight": torch.empty(8, 64, dtype=torch.int32, device="meta"),
        f"{prefix}.qzeros": torch.empty(1, 8, dtype=torch.int32, device="meta"),
        f"{prefix}.scales": torch.empty(1, 64, dtype=torch.float16, device="meta"),
        f"{prefix}.g_idx": torch.empty(64, dtype=torch.int32, device="meta"),
        "model.layers.0.mlp.down_proj.weight": torch.empty(
            64, 64, dtype=torch.float8_e4m3fn, device="meta"
        ),
        "model.layers.0.mlp.down_proj.weight_scale_inv": torch.empty(1, 1, device="meta"),
        "model.layers.0.mlp.gate_proj.weight": torch.empty(
            2048, 1, dtype=torch.uint8, device="meta"
        ),
        "model.layers.0.mlp.gate_proj.weight.absmax": torch.empty(64, device="meta"),
        "model.layers.0.mlp.gate_proj.weight.quant_map": torch.empty(16, device="meta"),
        "model.layers.0.input_layernorm.weight": torch.empty(64, device="meta"),
        "lm_head.weight": torch.empty(1000, 64, dtype=torch.float16, device="meta"),
    }


def gpt2_old() -> State:
    """GPT-2 as older versions of transformers saved it, causal masks and all."""
    tensors = state(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=64, n_head=4)))
    tensors["transformer.h.0.attn.bias"] = torch.empty(1, 1, 1024, 1024, device="meta")
    tensors["transformer.h.0.attn.masked_bias"] = torch.empty((), device="meta")
    return tensors


SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SMALL_LLAMA = {**SMALL, "num_key_value_heads": 2, "vocab_size": 1000}

MODELS: dict[str, Callable[[], State]] = {
    "torch-resnet18": lambda: state(ResNet18),
    "torch-preactivation-resnet": lambda: state(PreActivationResNet),
    "torch-mobilenetv2": lambda: state(MobileNetV2),
    "torch-densenet": lambda: state(DenseNet),
    "torch-deeplab-head": lambda: state(deeplab_head),
    "peft-lora": lora,
    "quantised": gptq,
    "gpt2-old": gpt2_old,
    "resnet": lambda: state(
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(hidden_sizes=[64, 128], depths=[2, 1], embedding_size=32)
        )
    ),
    "convnext": lambda: state(
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[32, 64], depths=[1, 1], num_stages=2)
        )
    ),
    "mobilenetv2": lambda: state(lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config())),
    "pvtv2": lambda: state(
        lambda: hf.PvtV2ForImageClassification(hf.PvtV2Config(depths=[1, 1, 1, 1]))
    ),
    "vit": lambda: state(lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL))),
    "swin": lambda: state(
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(embed_dim=32, depths=[1, 1], num_heads=[2, 4])
        )
    ),
    "swinv2": lambda: state(
        lambda: hf.Swinv2ForImageClassification(
            hf.Swinv2Config(embed_dim=32, depths=[1], num_heads=[2])
        )
    ),
    "deit": lambda: state(
        lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SMALL))
    ),
    "beit": lambda: state(
        lambda: hf.BeitForImageClassification(
            hf.BeitConfig(**SMALL, use_relative_position_bias=True, use_mask_token=True)
        )
    ),
    "dinov2-registers": lambda: state(
        lambda: hf.Dinov2WithRegistersModel(
            hf.Dinov2WithRegistersConfig(
                hidden_size=64, num_hidden_layers=1, num_attention_heads=4
            )
        )
    ),
    "bert": lambda: state(lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, vocab_size=1000))),
    "gpt2": lambda: state(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=1, n_embd=64, n_head=4))),
    "llama": lambda: state(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL_LLAMA))),
    "t5": lambda: state(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, vocab_size=1000)
        )
    ),
    "clip": lambda: state(
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config=dict(SMALL), vision_config=dict(SMALL))
        )
    ),
    "whisper": lambda: state(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
                vocab_size=1000, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1,
            )
        )
    ),
    "mixtral": lambda: state(
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL_LLAMA, num_local_experts=4))
    ),
    "mamba": lambda: state(
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=1000, state_size=16)
        )
    ),
}  # fmt: skip


def rows(tensors: State) -> list[list[object]]:
    """A line a tensor: name, shape, dtype, kind, normalisation layer, layer that feeds it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layers = {
        name: layer
        for layer in find_norm_layers(shapes)
        for name in (*layer.affine, *layer.statistics)
    }
    result: list[list[object]] = []
    for name, tensor in sorted(tensors.items()):
        dtype = safetensors_dtype(tensor.dtype)
        kind = classify(name, shapes[name], dtype).kind.value
        layer = layers.get(name)
        prefix = None if layer is None else layer.prefix
        source = None if layer is None else layer.source_weight
        result.append([name, list(tensor.shape), dtype, kind, prefix, source])
    return result


def main() -> None:
    """Write every inventory."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for model, build in MODELS.items():
        lines = ",\n".join(json.dumps(row) for row in rows(build()))
        (FOLDER / f"{model}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(model)


if __name__ == "__main__":
    main()
