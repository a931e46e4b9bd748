"""Everything that is read beside weights, spoilt: metadata, manifests, journals, digests, and options."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import metadata as keys
from know_cli.checkpoints import open_checkpoint
from know_cli.engine.journal import _END, journal_path
from know_cli.methods.registry import METHODS
from know_cli.prediction.opening import open_prediction
from know_cli.prediction.request import Request

ROOT = Path(__file__).parents[2]
INDEX = "model.safetensors.index.json"
EXTREMES: list[Any] = [
    0, -1, 1, 2, 5000, 1e308, -1e308, 1e-300, 5e-324, 0.5, 0.999999999, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400,
    float("nan"), float("inf"), float("-inf"), True, False, None, "", " ", "0", "-1", "nan", "inf", "1e400", "9" * 5000,
    "\x00", "\x1b[2J", "\u202eevil", "line\nbreak", "a" * 10_000, "../../etc/passwd", "..", "/", [], {}, [[]], [None], {"a": {}},
    [0] * 100, ["a", 1],
]  # fmt: skip
TEXTS = [one if isinstance(one, str) else json.dumps(one) for one in EXTREMES]
OF_SESSIONS = [
    keys.SESSION, keys.FRACTION, keys.RATE, keys.TRAJECTORY, keys.REGIME, keys.CONTINUATION,
    keys.TRAJECTORY_KIND, keys.TRAINING_STEP, keys.BRANCH, keys.SEED,
]  # fmt: skip
OF_OUTPUTS = [
    keys.VERSION, keys.METHOD, keys.OPTIONS, keys.STEPS, keys.CHECKPOINTS, keys.BUNDLE, keys.TARGET, keys.NORM,
    keys.FROZEN, keys.KINDS, keys.NONFINITE, keys.DEVICE, keys.KERNEL, keys.INPUTS, keys.CHOSEN, keys.COEFFICIENTS,
    keys.RATE, keys.TRAJECTORY_KIND,
]  # fmt: skip
QUIET = ["--quiet", "--threads", "1"]


def mutate_json(chance: random.Random, content: Any) -> str:
    """A JSON text with one to three places spoilt; sometimes no JSON any more."""
    content = copy.deepcopy(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        content = _spoil(chance, content)
    text = json.dumps(content)
    if chance.random() < 0.15:
        place = chance.randrange(len(text) + 1)
        text = (
            text[:place]
            + chance.choice(("", "{", "]", "\x00", "1e999", ",", '"'))
            + text[place + chance.randrange(3) :]
        )
    return text  # fmt: skip


def _extreme(chance: random.Random) -> Any:
    return copy.deepcopy(chance.choice(EXTREMES))  # or it would hold itself in the end


def _spoil(chance: random.Random, content: Any) -> Any:
    """Descend at random, and replace, remove or add something there."""
    holder, key, here = None, None, content
    while isinstance(here, dict | list) and here and chance.random() < 0.85:
        holder = here
        key = chance.choice(list(here)) if isinstance(here, dict) else chance.randrange(len(here))
        here = here[key]
    if holder is None:
        return _extreme(chance) if chance.random() < 0.3 else content
    if chance.random() < 0.15:
        del holder[key]
    elif isinstance(holder, dict) and chance.random() < 0.1:
        holder[str(chance.choice(TEXTS))[:50]] = _extreme(chance)
    else:
        holder[key] = _extreme(chance)
    return content


class Workshop:
    """A folder with one valid file of each sort, and commands that read them spoilt."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder, self._bundle = folder, bundle
        generator = torch.Generator().manual_seed(0)
        self.state = {
            "fc.weight": torch.randn(4, 3, generator=generator),
            "fc.bias": torch.randn(4),
        }
        for k in range(5):
            session = {
                keys.SESSION: str(k), keys.FRACTION: str(0.5**k), keys.RATE: "0.5", keys.TRAJECTORY: "abc",
            }  # fmt: skip
            self.write(f"c{k}", {"format": "pt", **session}, 1 - k / 10)
        self.words = ["predict", "c0", "c1", "c2", "-o", "out", *QUIET]
        self.out = folder / "made.safetensors"
        request = Request(
            [folder / f"c{k}.safetensors" for k in range(3)], self.out, method="linear"
        )
        with open_prediction(request) as prediction:
            prediction.execute()
        self.journal = self._journal()
        results = json.loads((ROOT / "docs" / "results" / "downstream.json").read_text())
        name = next(iter(results["tasks"]))
        self.results = {**results, "tasks": {name: results["tasks"][name]}}
        self.kinds: dict[str, Callable[[random.Random], list[str]]] = {
            "sessions": self._sessions, "provenance": self._provenance, "manifest": self._manifest, "journal": self._spoilt_journal,
            "digest": self._digest, "index": self._index, "results": self._results, "options": self._options,
            "record": self._record, "trainer": self._trainer, "series": self._series, "names": self._names,
        }  # fmt: skip

    def write(self, name: str, metadata: dict[str, str], factor: float = 1.0) -> None:
        """Write a checkpoint with some metadata."""
        state = {key: tensor * factor for key, tensor in self.state.items()}
        save_file(state, self.folder / f"{name}.safetensors", metadata)

    def _journal(self) -> bytes:
        """The journal of a run that was ended after its first batch."""

        class Ending:
            def phase(self, text: str, parameters: int = 0) -> None:
                if text == "copying":
                    raise KeyboardInterrupt

            def advance(self, parameters: int) -> None:
                """Nothing."""

        request = Request(
            [self.folder / f"c{k}.safetensors" for k in range(3)], self.folder / "out", method="linear", resume=True
        )  # fmt: skip
        with open_prediction(request) as prediction, suppress(KeyboardInterrupt):
            prediction.execute(Ending())
        path = journal_path(self.folder / "out")
        content = path.read_bytes()
        path.unlink()
        return content

    def spoil(self, chance: random.Random) -> tuple[str, list[str]]:
        """Spoil something; what sort of thing, and the command that reads it."""
        kind = chance.choice(list(self.kinds))
        return kind, self.kinds[kind](chance)

    def clean(self) -> None:
        """Remove what commands and spoiling left."""
        for path in self.folder.iterdir():
            if not (
                path.name.startswith(("c", "made.safetensors")) and path.suffix == ".safetensors"
            ):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    # ------------------------------------------------------------------ each sort of file

    def _texts(self, chance: random.Random, names: list[str]) -> dict[str, str]:
        """Metadata of which some entries are extreme."""
        return {name: chance.choice(TEXTS) for name in names if chance.random() < 0.3}

    def _command(self, chance: random.Random, *names: str) -> list[str]:
        method = chance.choice(("linear", "task-vector", "average", "naive"))
        flags = [["--trajectory", kind] for kind in ("forgetting", "run", "branches")]
        return chance.choice(
            [
                ["predict", *names, "-o", "out", "--method", method, *chance.choice([[], *flags]), *QUIET],
                ["predict", *names, "-o", "out", "--method", method, "--every-step", "--steps", "3", *QUIET],
                ["predict", *names, "-o", "out", "--dry-run", *QUIET],
                ["inspect", *names, *chance.choice([[], *flags])],
            ]
        )  # fmt: skip

    def _sessions(self, chance: random.Random) -> list[str]:
        for k in range(3):
            base = {
                keys.SESSION: str(k),
                keys.FRACTION: str(0.5**k),
                keys.RATE: "0.5",
                keys.TRAJECTORY: "abc",
            }
            every = self._texts(chance, OF_SESSIONS) if chance.random() < 0.6 else {}
            self.write(f"m{k}", {**base, **every}, 1 - k / 10)
        return self._command(chance, "m0", "m1", "m2")

    def _provenance(self, chance: random.Random) -> list[str]:
        with open_checkpoint(self.out) as made:
            metadata = dict(made.metadata)
        metadata |= self._texts(chance, OF_OUTPUTS)
        if chance.random() < 0.3:
            metadata[keys.OPTIONS] = mutate_json(chance, {"alpha": 1.0, "range": "full"})
        for name in list(metadata):
            if chance.random() < 0.1:
                del metadata[name]
        save_file(load_file(self.out), self.folder / "p.safetensors", metadata)
        return chance.choice(
            [
                ["verify", "p", "c0", "c1", "c2", *QUIET],
                ["verify", "p", "c0", "c1", "c2", "--full", *QUIET],
                self._command(chance, "p", "c0", "c1"),
            ]
        )  # fmt: skip

    def _manifest(self, chance: random.Random) -> list[str]:
        shutil.copytree(self._bundle, self.folder / "bundle")
        path = self.folder / "bundle" / "manifest.json"
        path.write_text(mutate_json(chance, json.loads(path.read_text())))
        names = [f"c{k}" for k in range(5)]
        method = chance.choice(("known", "lstsq", "noise"))
        return chance.choice(
            [
                ["predict", *names, "-o", "out", "--weights", "./bundle", "--method", method, *QUIET],
                ["train", "bundle", "--evaluate", "./bundle"],
            ]
        )  # fmt: skip

    def _spoilt_journal(self, chance: random.Random) -> list[str]:
        content = bytearray(self.journal)
        if chance.random() < 0.7:
            content = bytearray(self._forged(chance))
        else:
            for _ in range(chance.randint(1, 4)):
                content[chance.randrange(len(content))] = chance.randrange(256)
            del content[chance.randint(1, len(content)) :]
        path = journal_path(self.folder / "out")
        path.write_bytes(content)
        return [*self.words, "--method", "linear", "--resume"]

    def _forged(self, chance: random.Random) -> bytes:
        """A journal with other facts and checksums that are right."""
        start = self.journal.index(b"\n", self.journal.index(b"\n") + 1) + 1
        place = self.journal.rindex(b'{"frozen"')
        data = self.journal[start : place - _END.size]
        facts = json.loads(self.journal[place:])
        text = mutate_json(chance, facts).encode()
        crc = zlib.crc32(text, zlib.crc32(data))
        return self.journal[:start] + data + struct.pack("<II", len(text), crc) + text

    def _digest(self, chance: random.Random) -> list[str]:
        (self.folder / "p.safetensors").write_bytes(self.out.read_bytes())
        line = f"{'0' * 64}  p.safetensors\n"
        place = chance.randrange(len(line))
        text = chance.choice(
            [
                line[:place] + chance.choice(TEXTS)[:200] + line[place + chance.randrange(3) :],
                line * chance.randrange(3), "\\" + line, line.replace("p.", "\\n."), line.encode().hex(),
            ]
        )  # fmt: skip
        (self.folder / "p.safetensors.sha256").write_text(text, encoding="utf-8", errors="replace")
        words = [
            "predict",
            "c0",
            "c1",
            "-o",
            "p.safetensors",
            "--force",
            "--method",
            "naive",
            *QUIET,
        ]
        return chance.choice(
            [["verify", "p", "c0", "c1", "c2", *QUIET], words, [*words, "--checksum"]]
        )

    def _index(self, chance: random.Random) -> list[str]:
        for k in range(2):
            (self.folder / f"s{k}").mkdir()
            shard = "model-00001-of-00001.safetensors"
            save_file(self.state, self.folder / f"s{k}" / shard)
            index = {"metadata": {"total_size": 64}, "weight_map": dict.fromkeys(self.state, shard)}
            spoilt = (
                mutate_json(chance, index) if k == 0 or chance.random() < 0.5 else json.dumps(index)
            )
            (self.folder / f"s{k}" / INDEX).write_text(spoilt)
        words = ["predict", "s0", "s1", "-o", "out", "--method", "naive", *QUIET]
        other = ["predict", "s1", "s0", "-o", "out", "--method", "naive", *QUIET]
        return chance.choice(
            [words, other, ["convert", "s0", "-o", "out"], ["inspect", "s0", "s1"]]
        )

    def _results(self, chance: random.Random) -> list[str]:
        results = mutate_json(chance, self.results)
        if chance.random() < 0.5:
            runs = json.loads((ROOT / "docs" / "results" / "runs.json").read_text())
            name = next(iter(runs["tasks"]))
            results = mutate_json(chance, {**runs, "tasks": {name: runs["tasks"][name]}})
        (self.folder / "results.json").write_text(results)
        return ["results", "results.json"]

    def _options(self, chance: random.Random) -> list[str]:
        def number() -> str:
            return chance.choice([*TEXTS[:30], "1/3", "1e-7", "0x10", "-0", "1_000", "٣"])

        method = chance.choice(METHODS)
        words = ["predict", "c0", "c1", "c2", "-o", "out", "--method", method.name, *QUIET]
        for option in chance.sample(
            [
                "--rate",
                "--steps",
                "--max-memory",
                "--threads",
                "--kind",
                "--last",
                "--every",
                "--device",
            ],
            2,
        ):
            if chance.random() < 0.5:
                words += [f"{option}={number()}"]
        names = [option.name for option in method.options] or ["alpha"]
        if chance.random() < 0.8:
            words += ["--option", f"{chance.choice(names)}={number()}"]
        return [word.replace("\x00", "?") for word in words]

    def _record(self, chance: random.Random) -> list[str]:
        (self.folder / "run").mkdir()
        record = {
            "format": 1, "trajectory": "0123456789ab", "function": "json:dumps", "options": {}, "seed": 0, "rate": 0.5,
            "sessions": 3, "continuations": 0, "recorded": {"0": {"fraction": 1.0, "samples": 10, "seed": 1, "measurements": {}}},
        }  # fmt: skip
        (self.folder / "run" / "trajectory.json").write_text(mutate_json(chance, record))
        return ["forget", "json:dumps", "--size", "10", "-o", "run", "--sessions", "3"]

    def _trainer(self, chance: random.Random) -> list[str]:
        for k in (100, 200):
            (self.folder / f"run/checkpoint-{k}").mkdir(parents=True)
            save_file(self.state, self.folder / f"run/checkpoint-{k}/model.safetensors")
            text = mutate_json(chance, {"global_step": k, "epoch": 1.0})
            (self.folder / f"run/checkpoint-{k}/trainer_state.json").write_text(text)
        return chance.choice(
            [
                ["predict", "run", "-o", "out", "--trajectory", "run", *QUIET],
                ["inspect", "run", "--trajectory", "run"],
                ["predict", "run", "-o", "out", "--trajectory", "run", "--last", "2", "--every", number_of(chance), *QUIET],
            ]
        )  # fmt: skip

    def _series(self, chance: random.Random) -> list[str]:
        facts = {
            "format": 1, "indices": [0, 1, 2, 3], "names": ["w"], "regime": "chain", "trajectory": "0123456789ab", "rate": 0.5,
            "setup": {"design": {"architecture": "cnn"}, "data_set": "digits"}, "sessions": 4, "continuations": 0,
            "recorded": {"0": {"measurements": {"test_accuracy": 0.5}}, "-1": {"measurements": {"test_accuracy": 0.6}}},
        }  # fmt: skip
        tables = {kind: torch.ones(2, 4) for kind in ("conv", "fc", "bias")}
        tensors = {f"{kind}.tensor": torch.zeros(2, dtype=torch.int32) for kind in tables}
        metadata = {"know.series": mutate_json(chance, facts)}
        (self.folder / "all").mkdir()
        save_file({**tables, **tensors}, self.folder / "all" / "00000.safetensors", metadata)
        return ["train", "all", "-o", "bundle", "--epochs", "1", "--checkpoints", "2", "--quiet"]

    def _names(self, chance: random.Random) -> list[str]:
        names = [one[:300] or "w" for one in TEXTS if "\x00" not in one]
        chosen = chance.sample(names, 3)
        for k in range(2):
            state = {name: torch.full((2, 2), 1.0 + k) for name in chosen if name != "__metadata__"}
            save_file(state, self.folder / f"n{k}.safetensors", {name: name for name in chosen})
        return self._command(chance, "n0", "n1")


def number_of(chance: random.Random) -> str:
    """An extreme number, as text."""
    return chance.choice(TEXTS[:25]).replace("\x00", "?")
