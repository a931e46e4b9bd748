"""The mean of five folders, as users run it: ``know predict``, mergekit where it is, a bare copy.

mergekit ("Arcee's MergeKit: A Toolkit for Merging Large Language Models", Goddard et al., EMNLP
2024, arXiv 2403.13257) is what many average with. Each runs in a process of its own, from its start
to its end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from know_cli.benchmark.runs import copy_bytes, write_checkpoints
from know_cli.benchmark.scaling import COPY
from know_cli.benchmark.timing import Times, take_turns
from know_cli.files import make_folder, open_file, remove_tree, write_text
from know_cli.ranks.environment import own_command

OWN = "know predict --method average"
MERGEKIT = "mergekit, linear"
#: The command that mergekit installs.
MERGEKIT_COMMAND = "mergekit-yaml"
_CHECKPOINTS = 5
# Runs a command from a process that is small itself: what the one that starts it has resident
# counts as the command's, too.
_MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
_WIDTH, _INNER, _VOCABULARY, _HEADS = 1024, 2816, 32_000, 16


def measure_averages(
    folder: Path, parameters: int, rounds: int, threads: int
) -> tuple[int, dict[str, Times], dict[str, int]]:
    """Time the mean of five folders of a language model in bfloat16.

    Args:
        folder: for the checkpoints, which are removed afterwards.
        parameters: approximate number of parameters.
        rounds: see :func:`~know_cli.benchmark.timing.take_turns`.
        threads: of ``know predict``.

    Returns:
        The exact number of parameters; times by name, without processor times of commands; and the
        most bytes that a command had resident. mergekit is left out where it is not installed.

    Raises:
        OutputError: the folder cannot be written, or the disk is full.
        subprocess.CalledProcessError: a command fails.
    """
    shapes = llama_shapes(parameters)
    folders = [folder / f"checkpoint-{k}" for k in range(_CHECKPOINTS)]
    for one in folders:
        make_folder(one)
        write_text(one / "config.json", json.dumps(_config(shapes)), replace=False)
    paths = [one / "model.safetensors" for one in folders]
    write_checkpoints(paths, shapes, "BF16")
    recipe = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [
            {"model": str(one), "parameters": {"weight": 1 / _CHECKPOINTS}} for one in folders
        ],
    }
    write_text(folder / "recipe.yml", json.dumps(recipe), replace=False)  # JSON is YAML, too
    peaks: dict[str, int] = {}
    outputs = {name: folder / f"out-{k}" for k, name in enumerate((OWN, MERGEKIT))}
    commands = {
        OWN: [
            *own_command("know_cli"), "predict", *map(str, folders), "-o", str(outputs[OWN]),
            "--method", "average", "--threads", str(threads), "--quiet",
        ],
    }  # fmt: skip
    program = shutil.which(MERGEKIT_COMMAND)
    if program is not None:
        words = [str(folder / "recipe.yml"), str(outputs[MERGEKIT]), "--no-copy-tokenizer"]
        commands[MERGEKIT] = [program, *words]
    cases: dict[str, Callable[[], object]] = {
        COPY: lambda: copy_bytes(paths, folder / "copy"),
    }
    for name, command in commands.items():

        def run(name: str = name, command: list[str] = command) -> None:
            remove_tree(outputs[name], quietly=True)
            peaks[name] = max(_run(command), peaks.get(name, 0))

        cases[name] = run
    elements = sum(_elements(shape) for shape in shapes.values())
    # A command may leave them on disk alone, and the next would have to wait for them.
    times = take_turns(cases, rounds, before=lambda: _read_all(paths))
    return elements, times, peaks


def _read_all(paths: Iterable[Path]) -> None:
    """Have files in the page cache."""
    buffer = bytearray(1 << 20)
    for path in paths:
        with open_file(path) as file:
            while file.readinto(buffer):
                pass


def llama_shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a language model of Llama's form, of about so many parameters."""
    width, inner = _WIDTH, _INNER
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, width)}
    layer: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{which}_proj.weight": (width, width) for which in "qkvo"},
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    of_layer = sum(map(_elements, layer.values()))
    layers = max(1, round((parameters - 2 * _VOCABULARY * width) / of_layer))
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (_VOCABULARY, width)
    return shapes


def _elements(shape: tuple[int, ...]) -> int:
    rows, columns = (*shape, 1)[:2]
    return rows * columns


def _config(shapes: dict[str, tuple[int, ...]]) -> dict[str, object]:
    """What a model's folder says of it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in shapes),
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _run(command: list[str]) -> int:
    """Run a command to its end, and return the most bytes that it had resident.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
