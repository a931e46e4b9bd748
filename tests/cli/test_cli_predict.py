"""``know predict`` as users run it: a process of its own, its exit code, its streams, its files."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from know_cli.checkpoints import arguments
from know_cli.errors import (
    EXIT_BROKEN_PIPE,
    EXIT_BUG,
    EXIT_CHECKPOINT,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_OUTPUT,
    EXIT_USAGE,
)
from know_cli.known.bundle import save_bundle
from tests.support.bundles import random_bundle
from tests.support.by_hand import by_hand
from tests.support.command import Command, one_line, run_here
from tests.support.folders import shards
from tests.support.forkserver import ForkServer
from tests.support.keras import write_keras
from tests.support.trajectories import network, states, write_trajectory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a trajectory, ckpt0 … ckpt4."""
    write_trajectory(tmp_path)
    return tmp_path


def test_the_main_job(run: Path, know: Command, bundle_path: Path) -> None:
    done = know("predict", "ckpt0..ckpt4", "-o", "out.safetensors", "--weights", bundle_path,
                "--json", "report.json", cwd=run, python=True)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "x2 the data: 1 step from 5 checkpoints at rate 0.5" in done.stdout
    for word in (
        "conv",
        "fc",
        "bias",
        "mean |change|",
        "relative change",
        "copied",
        "parameters per second",
    ):
        assert word in done.stdout
    assert "wrote out.safetensors" in done.stdout
    assert done.stderr.splitlines() == [
        "predicting 1.25 k parameters",
        "copying",
        "flushing to disk",
    ]
    assert load_file(run / "out.safetensors").keys() == network().keys()
    report = json.loads((run / "report.json").read_text())
    assert report["checkpoints"] == [f"ckpt{k}.safetensors" for k in range(5)]
    assert (report["factor"], report["steps"], report["rate"]) == ("x2", 1, 0.5)
    assert report["kinds"]["fc"]["predicted"] == 20 * 33 + 160 + 160 + 30
    assert report["bytes_written"] == (run / "out.safetensors").stat().st_size
    # The one is planned, the other measured.
    assert 0 < report["memory"] <= report["max_memory"]
    assert report["memory"] < report["peak_memory"] < report["memory"] + (4 << 30)
    assert "of working memory, and with Python and torch" in done.stdout
    assert set(report["seconds"]) == {"reading", "computing", "writing", "total"}
    (run / "again").mkdir()
    know(
        "predict", "ckpt0..ckpt4", "-o", "again/out.safetensors", "--weights", bundle_path, cwd=run
    )
    assert (run / "again" / "out.safetensors").read_bytes() == (
        run / "out.safetensors"
    ).read_bytes()


def test_know_predict_is_know_predict(run: Path, bundle_path: Path, know: Command) -> None:
    arguments = ["ckpt0..ckpt4", "--weights", str(bundle_path), "-o"]
    done = run_here([*arguments, "a"], run, {}, "know-predict")
    other = know("predict", *arguments, "b", cwd=run)
    assert done.returncode == other.returncode == EXIT_DONE, done.stderr
    assert (run / "a").read_bytes() == (run / "b").read_bytes()
    measured = re.compile(r"^read .*$|[0-9.]+ [KMG]iB at most$", re.MULTILINE)
    assert measured.sub("", done.stdout).replace("wrote a", "wrote b") == measured.sub(
        "", other.stdout
    )


@pytest.mark.parametrize("words", ["--help", "--version"])
def test_the_script_know_predict(words: str, know: Command) -> None:
    """Its entry point is called where it is not installed."""
    code = "import sys; sys.argv[0] = 'know-predict'; from know_cli.cli.main import know_predict; know_predict()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}, check=False,
    )  # fmt: skip
    other = know(*(["predict"] if words == "--help" else []), words)
    assert (done.returncode, done.stderr) == (EXIT_DONE, "")
    said = [text.replace("know-predict", "know predict") for text in (done.stdout, other.stdout)]
    assert said[0] == said[1]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_keras_files_through_the_command_line(tmp_path: Path, know: Command, steps: int) -> None:
    """Golden values from float64 numpy, for all kinds, with the window shifted each step."""
    from know_cli.known.module import Preparation

    bundle = random_bundle(seed=7)
    write_keras(bundle, tmp_path / "keras")
    window = torch.randn(300, 5, generator=torch.Generator().manual_seed(5)) * 0.1
    columns = [window[:, 4 - k] for k in range(5)]  # Θ0 is the last column
    write_trajectory(tmp_path, [
        {"conv": column.reshape(10, 3, 5, 2).clone(), "fc": column.reshape(15, 20).clone(), "bias": column.clone()}
        for column in columns
    ])  # fmt: skip
    done = know(
        "predict",
        "ckpt0..ckpt4",
        "-o",
        "out",
        "--weights",
        "./keras",
        "--steps",
        steps,
        cwd=tmp_path,
    )
    assert done.returncode == EXIT_DONE, done.stderr
    out = load_file(tmp_path / "out")
    for kind, state in bundle.states.items():
        values = window.double().numpy()
        for _ in range(steps):
            predicted = by_hand(state, values, Preparation.RAW)
            values = torch.cat(
                [torch.from_numpy(values)[:, 1:], torch.from_numpy(predicted)[:, None]], 1
            ).numpy()
        difference = out[kind.value].reshape(-1).double() - torch.from_numpy(predicted)
        assert difference.abs().max() < 1e-6


def test_folders_in_folder_out(tmp_path: Path, know: Command, bundle_path: Path) -> None:
    for k in range(5):
        folder = shards(tmp_path / f"session{k}")
        for number in range(2):
            save_file(
                {f"layer{number}.weight": torch.linspace(0, 1 - 0.1 * k, 12).reshape(3, 4)},
                folder / f"model-{number + 1:05d}-of-00002.safetensors",
                {"format": "pt"},
            )
        (folder / "config.json").write_text('{"a": 1}')
    (tmp_path / "session0" / "optimizer.pt").write_text("state")
    done = know("predict", "session0..session4", "-o", "out", "--weights", bundle_path, "--steps", 2,
                "--every-step", cwd=tmp_path)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert "optimizer.pt: left out" in done.stderr
    for name in ("out", "out.x2"):
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == [
            "config.json", "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        ]  # fmt: skip
        source = (tmp_path / "session0" / "model.safetensors.index.json").read_bytes()
        assert (tmp_path / name / "model.safetensors.index.json").read_bytes() == source


def test_transformers_loads_the_output(tmp_path: Path, know: Command, bundle_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    for k in range(5):
        model.save_pretrained(tmp_path / f"s{k}", max_shard_size="3KB")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01 * 0.5**k)
    done = know("predict", "s0..s4", "-o", "out", "--weights", bundle_path, cwd=tmp_path)
    assert done.returncode == EXIT_DONE, done.stderr
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out", local_files_only=True)
    name = "bert.encoder.layer.0.output.dense.weight"
    shard = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())[
        "weight_map"
    ][name]
    written = load_file(tmp_path / "out" / shard)[name]
    assert torch.equal(loaded.state_dict()[name], written)


def test_checkpoints_may_be_cut_into_shards_differently(
    tmp_path: Path, know: Command, bundle_path: Path
) -> None:
    trajectory = [{"a": s["fc.weight"], "b": s["fc.bias"]} for s in states()]
    write_trajectory(tmp_path, trajectory)
    folder = tmp_path / "resharded"
    folder.mkdir()
    for name, shard in (("a", "one.safetensors"), ("b", "two.safetensors")):
        save_file({name: trajectory[3][name]}, folder / shard)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    know("predict", "ckpt0..ckpt4", "-o", "x", "--weights", bundle_path, cwd=tmp_path)
    done = know(
        "predict",
        "ckpt0",
        "ckpt1",
        "ckpt2",
        "resharded",
        "ckpt4",
        "-o",
        "y",
        "--weights",
        bundle_path,
        cwd=tmp_path,
    )
    assert done.returncode == EXIT_DONE, done.stderr
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux tells it")
def test_working_memory_is_bounded(tmp_path: Path, bundle_path: Path, server: ForkServer) -> None:
    """One tensor of 8 MB in five checkpoints, in 16 MiB of working memory."""
    peaks = {}
    for rows in (20, 2000):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, 1000, generator=generator)
        write_trajectory(tmp_path, [{"w": weight * (1 - 0.1 * k)} for k in range(5)])
        child = server.start(
            "predict", "ckpt0..ckpt4", "-o", "out", "--force", "--quiet", "--threads", "1",
            "--max-memory", "16M", "--device", "cpu", "--weights", bundle_path, cwd=tmp_path,
        )  # fmt: skip
        code, peak = server.wait_for_peak(child)
        assert code == EXIT_DONE
        peaks[rows] = peak / 2**20
    assert peaks[2000] - peaks[20] < 24, peaks


def test_dry_run_tells_everything_and_writes_nothing(
    run: Path, know: Command, bundle_path: Path
) -> None:
    before = sorted(run.iterdir())
    done = know(
        "predict",
        "ckpt0..ckpt4",
        "-o",
        "out",
        "--weights",
        bundle_path,
        "--dry-run",
        "--steps",
        3,
        cwd=run,
    )
    assert done.returncode == EXIT_DONE, done.stderr
    assert sorted(run.iterdir()) == before
    for words in ("plan, nothing is written", "x8 the data: 3 steps", "reads ", "writes ", "of memory",
                  "would write out", "copy: normalisation layer (2 tensors)",
                  "copy: frozen: the same in all checkpoints", "rescaled to the change of the layer before (2 tensors)",
                  "copy: integer, boolean, complex or quantised (2 tensors)"):  # fmt: skip
        assert words in done.stdout
    done = know(
        "predict",
        "ckpt0..ckpt4",
        "-o",
        "out",
        "--weights",
        bundle_path,
        "--dry-run",
        "--json",
        "plan.json",
        cwd=run,
    )
    plan = json.loads((run / "plan.json").read_text())
    assert {tensor["name"] for tensor in plan["tensors"]} == network().keys()
    assert plan["bytes_to_write"] == (run / "ckpt0.safetensors").stat().st_size


def test_quiet_says_nothing(run: Path, know: Command, bundle_path: Path) -> None:
    done = know(
        "predict", "ckpt0..ckpt4", "-o", "out", "--weights", bundle_path, "--quiet", cwd=run
    )
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_DONE, "", "")
    done = know(
        "predict", "ckpt0..ckpt4", "-o", "out", "--weights", bundle_path, "--quiet", cwd=run
    )
    assert done.returncode == EXIT_OUTPUT
    assert done.stdout == ""
    one_line(done.stderr)


def test_wrong_order_is_put_right_with_a_notice(
    tmp_path: Path, know: Command, bundle_path: Path
) -> None:
    recorded = [
        {"know.session": str(k), "know.fraction": str(0.5**k), "know.rate": "0.5", "know.trajectory": "t"}
        for k in range(5)
    ]  # fmt: skip
    write_trajectory(tmp_path, metadata=recorded)
    forward = know("predict", "ckpt0..ckpt4", "-o", "a", "--weights", bundle_path, cwd=tmp_path)
    backward = know("predict", "ckpt4..ckpt0", "-o", "b", "--weights", bundle_path, cwd=tmp_path)
    assert "put right to 0, 1, 2, 3, 4" in backward.stderr
    assert "put right" not in forward.stderr
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_suspected_reversal_is_a_warning(run: Path, know: Command, bundle_path: Path) -> None:
    done = know("predict", "ckpt4..ckpt0", "-o", "out", "--weights", bundle_path, cwd=run)
    assert done.returncode == EXIT_DONE
    assert "warning: the steps between checkpoints grow" in done.stderr


def test_a_name_of_another_format_is_warned_of(run: Path, know: Command, bundle_path: Path) -> None:
    for name, words in (("out.pt", "no PyTorch pickle as its name says"), ("out", None)):
        done = know("predict", "ckpt0..ckpt4", "-o", name, "--weights", bundle_path, cwd=run)
        assert done.returncode == EXIT_DONE, done.stderr
        assert (f"warning: {name}: will be a safetensors file" in done.stderr) == bool(words)
        assert words is None or words in done.stderr
    assert (run / "out.pt").read_bytes() == (run / "out").read_bytes()


def test_options_reach_the_engine(run: Path, know: Command, bundle_path: Path) -> None:
    done = know("predict", "ckpt0..ckpt4", "-o", "out.safetensors", "--weights", bundle_path, "--kind", "fc.*=copy",
                "--kind", "scale=fc", "--norm", "reset", "--frozen", "predict", "--rate", "1/3", "--steps", 2,
                "--every-step", "--device", "cpu", "--threads", 1, "--max-memory", "32M", "--no-progress", cwd=run)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    out = load_file(run / "out.safetensors")
    first = network()
    assert torch.equal(out["fc.weight"], first["fc.weight"])
    assert not torch.equal(out["frozen.weight"], first["frozen.weight"])
    assert out["bn1.weight"].tolist() == [1.0] * 8
    with safe_open(run / "out.x3.safetensors", "pt") as file:
        assert file.metadata()["know.steps"] == "1"
        assert float(file.metadata()["know.rate"]) == 1 / 3
    assert "x9 the data" in done.stdout


def test_nonfinite_inputs(tmp_path: Path, know: Command, bundle_path: Path) -> None:
    trajectory = states()
    trajectory[2]["fc.weight"][0, 0] = float("nan")
    write_trajectory(tmp_path, trajectory)
    done = know("predict", "ckpt0..ckpt4", "-o", "out", "--weights", bundle_path, cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert "ckpt2.safetensors: tensor 'fc.weight'" in one_line(done.stderr)
    assert not (tmp_path / "out").exists()
    done = know(
        "predict",
        "ckpt0..ckpt4",
        "-o",
        "out",
        "--weights",
        bundle_path,
        "--allow-nonfinite",
        cwd=tmp_path,
    )
    assert done.returncode == EXIT_DONE
    assert "1 input was not finite" in done.stdout


# arguments after "predict" → exit code and words of the one line on stderr
ERRORS: dict[str, tuple[str, int, str]] = {
    "no arguments": ("", EXIT_USAGE, "Missing argument 'CKPT...'"),
    "no output": ("ckpt0..ckpt4", EXIT_USAGE, "Missing option '-o' / '--output'"),
    "no such option": ("ckpt0..ckpt4 -o out --speed 11", EXIT_USAGE, "No such option: --speed"),
    "steps": ("ckpt0..ckpt4 -o out --steps 9", EXIT_USAGE, "--steps"),
    "a method's steps": ("ckpt0..ckpt4 -o out --method known,steps=9", EXIT_USAGE,
                         "--method known,steps=9: steps=9 is not in the range 1 to 8"),
    "no steps": ("ckpt0..ckpt4 -o out --method shrink,steps=0", EXIT_USAGE, "steps=0 is not in the range"),
    "empty run": ("folder --trajectory run -o out", EXIT_CHECKPOINT, "nor has it a run's checkpoints, folders or .safetensors files"),
    "rate": ("ckpt0..ckpt4 -o out --rate 2", EXIT_USAGE, "'2': a rate is at least 0.01 and below 1"),
    "rate is no number": ("ckpt0..ckpt4 -o out --rate half", EXIT_USAGE, "'half' is not a rate"),
    "size": ("ckpt0..ckpt4 -o out --max-memory much", EXIT_USAGE, "'much' is not a size"),
    "too little memory": ("ckpt0..ckpt4 -o out --max-memory 1k", EXIT_USAGE, "is too small: one block needs"),
    "norm": ("ckpt0..ckpt4 -o out --norm drop", EXIT_USAGE, "--norm"),
    "device": ("ckpt0..ckpt4 -o out --device tpu", EXIT_USAGE, "--device tpu: is none of"),
    "absent device": ("ckpt0..ckpt4 -o out --device cuda:99", EXIT_USAGE, "cuda:99: torch sees"),
    "kind": ("ckpt0..ckpt4 -o out --kind fc=dense", EXIT_USAGE, "--kind fc=dense: write PATTERN=KIND"),
    "kind matches nothing": ("ckpt0..ckpt4 -o out --kind x.*=fc", EXIT_USAGE, "--kind x.*=fc: matches no tensor"),
    "weights": ("ckpt0..ckpt4 -o out --weights nothing", EXIT_USAGE, "--weights nothing: neither"),
    "method": ("ckpt0..ckpt4 -o out --method best", EXIT_USAGE, "--method best: is none of known, naive"),
    "option": ("ckpt0..ckpt4 -o out --option a=1", EXIT_USAGE, "--option a: --method known takes no options"),
    "option's value": ("ckpt0..ckpt4 -o out --method shrink --option lambda=x --weights nothing", EXIT_USAGE,
                       "--option lambda=x: is not a number"),
    "weights of a rival": ("ckpt0..ckpt4 -o out --method linear", EXIT_USAGE, "--method linear reads no KNOWN"),
    "no rule": ("ckpt0..ckpt4 -o out --method lstsq", EXIT_CHECKPOINT, "has no 'rule' in a manifest.json"),
    "one checkpoint": ("ckpt0 -o out", EXIT_USAGE, "got 1 checkpoint: give 2 to 16"),
    "one checkpoint twice": ("ckpt0 ckpt0 -o out", EXIT_USAGE, "given twice"),
    "no such checkpoint": ("ckpt0 ckpt9 -o out", EXIT_CHECKPOINT, "ckpt9: no such file"),
    "no range": ("ckpt7..ckpt9 -o out", EXIT_CHECKPOINT, "ckpt7 and ckpt9 should be there but are not"),
    "corrupt": ("ckpt0 corrupt -o out", EXIT_CHECKPOINT, "corrupt: is only 3 bytes long"),
    "other model": ("ckpt0 other.safetensors -o out", EXIT_CHECKPOINT, "not of one model"),
    "no KNOWN for four": ("ckpt0..ckpt3 -o out", EXIT_CHECKPOINT, "this KNOWN reads 5 checkpoints, 4 were given"),
    "family without four": ("ckpt0..ckpt3 -o out --weights FAMILY", EXIT_CHECKPOINT, "only for 5"),
    "output is an input": ("ckpt0..ckpt4 -o ckpt3.safetensors --force", EXIT_OUTPUT, "an input is never overwritten"),
    "output exists": ("ckpt0..ckpt4 -o corrupt", EXIT_OUTPUT, "exists already; --force replaces it"),
    "no parent": ("ckpt0..ckpt4 -o no/out", EXIT_OUTPUT, "no: no such folder; make it first: mkdir -p no"),
    "output is a folder": ("ckpt0..ckpt4 -o folder --force", EXIT_OUTPUT, "is a folder, but the output is a file"),
    "output is this folder": ("ckpt0..ckpt4 -o .", EXIT_OUTPUT, "is a folder, but the output is a file"),
    "output's name is too long": (f"ckpt0..ckpt4 -o {'o' * 300}", EXIT_OUTPUT, "name too long"),
    "input's name is too long": (f"{'i' * 300} ckpt0 -o out", EXIT_CHECKPOINT, "name too long"),
    "report's name is too long": (f"ckpt0..ckpt4 -o out --json {'r' * 300}", EXIT_OUTPUT, "name too long"),
    "report has no folder": ("ckpt0..ckpt4 -o out --json no/r.json", EXIT_OUTPUT, "mkdir -p no"),
    "output to a stream": ("ckpt0..ckpt4 -o -", EXIT_OUTPUT, "name a file"),
    "unknown option": ("ckpt0..ckpt4 -o out --foo", EXIT_USAGE, "see 'know predict --help'"),
    "report is an input": ("ckpt0..ckpt4 -o out --json ckpt0.safetensors", EXIT_OUTPUT, "is an input or an output of this run"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_with_the_documented_code(
    case: str, run: Path, know: Command, bundle_path: Path
) -> None:
    text, code, message = ERRORS[case]
    (run / "corrupt").write_text("abc")
    (run / "folder").mkdir()
    save_file({"x": torch.ones(1)}, run / "other.safetensors")
    save_bundle(random_bundle(), run / "family" / "checkpoints-5")
    arguments = [str(run / "family") if word == "FAMILY" else word for word in text.split()]
    if "--weights" not in arguments:
        arguments += ["--weights", str(bundle_path)]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = know("predict", *(arguments if text else []), cwd=run)
    assert done.returncode == code, done.stderr
    assert message in one_line(done.stderr)
    assert done.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_bug_is_one_line_unless_asked_for_more(
    know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(arguments, "find_checkpoints", broken)
    for debug in ("", "1"):
        done = know("predict", "a", "-o", "b", KNOW_DEBUG=debug)
        assert done.returncode == EXIT_BUG
        assert done.stderr.splitlines()[-1].startswith(
            "know: error: bug: RuntimeError: boom; please report"
        )
        assert ("Traceback" in done.stderr) == bool(debug)


def test_an_interruption_that_became_another_error_is_one(
    know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 and older make a RuntimeError of what is raised while a class is being made."""

    class Field:
        def __set_name__(self, *_: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        arguments, "find_checkpoints", lambda *_, **__: type("Model", (), {"f": Field()})
    )
    done = know("predict", "a", "-o", "b")
    assert done.returncode == EXIT_INTERRUPTED
    assert one_line(done.stderr) == "know: error: interrupted; the output is left as it was"


def await_beginning(said: Path) -> None:
    """Until a command line says that it predicts."""
    while "predicting" not in said.read_text():
        time.sleep(0.001)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_behind(
    tmp_path: Path, bundle_path: Path, signal_number: signal.Signals, server: ForkServer
) -> None:
    generator = torch.Generator().manual_seed(0)
    write_trajectory(
        tmp_path, [{"w": torch.randn(1000, 1000, generator=generator)} for _ in range(5)]
    )
    (tmp_path / "out").write_text("precious")
    out, err = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
    before = sorted([*tmp_path.iterdir(), out, err])
    child = server.start(
        "predict", "ckpt0..ckpt4", "-o", "out", "--force", "--steps", "8", "--threads", "1",
        "--device", "cpu", "--weights", bundle_path, cwd=tmp_path,
    )  # fmt: skip
    await_beginning(err)
    time.sleep(0.1)
    os.kill(child, signal_number)
    assert server.wait(child) == EXIT_INTERRUPTED, err.read_text()
    assert "interrupted" in one_line(err.read_text())
    assert out.read_text() == ""
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "out").read_text() == "precious"


def test_a_terminal_gets_a_progress_bar(run: Path, bundle_path: Path, server: ForkServer) -> None:
    main, other = pty.openpty()
    child = server.start(
        "predict", "ckpt0..ckpt4", "-o", "out", "--weights", bundle_path,
        cwd=run, err=other, env={"TERM": "xterm"},
    )  # fmt: skip
    os.close(other)
    text = b""
    while True:
        try:
            data = os.read(main, 4096)
        except OSError:
            break
        if not data:
            break
        text += data
    assert server.wait(child) == EXIT_DONE
    assert b"predicting 1.25 k parameters" in text
    assert "━".encode() in text
    assert b"\x1b[2K" in text  # the bar is taken away at the end


def test_a_report_never_replaces_what_is_read_or_written(
    run: Path, know: Command, bundle_path: Path
) -> None:
    for k in range(5):
        folder = run / f"c{k}"
        folder.mkdir()
        shutil.copy(run / f"ckpt{k}.safetensors", folder / "model.safetensors")
    (run / "out").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    every = ["--steps", "2", "--every-step"]
    for given in (
        ["predict", "c0..c4", "-o", "out", "--json", "c1/model.safetensors"],
        ["predict", "c0..c4", "-o", "out", "--json", "out/report.json"],
        ["predict", "ckpt0..ckpt4", "-o", "o.safetensors", "--json", "o.x2.safetensors", *every],
        ["inspect", "c0..c4", "--json", "c2/model.safetensors"],
        ["inspect", "c0..c4", "--json", "c2/report.json"],
    ):
        if given[0] == "predict":
            given += ["--weights", str(bundle_path)]
        done = know(*given, cwd=run)
        assert done.returncode == EXIT_OUTPUT, given
        assert "is an input or an output of this run" in one_line(done.stderr)
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before


def gone() -> int:
    """A pipe whose reader is no more."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("command", ["predict", "predict --dry-run", "inspect", "--help"])
def test_readers_that_go_away(
    command: str, run: Path, bundle_path: Path, server: ForkServer
) -> None:
    arguments = command.split()
    if command != "--help":
        arguments += ["ckpt0..ckpt4"]
    if "predict" in command:
        arguments += ["--weights", str(bundle_path), "-o", "a.safetensors"]
    writer = gone()
    child = server.start(*arguments, cwd=run, out=writer)
    os.close(writer)
    assert server.wait(child) == EXIT_BROKEN_PIPE
    # Notices may be there, but no error.
    assert not re.search("error|bug|Traceback|BrokenPipe", (run / "stderr.txt").read_text())


def test_a_shell_s_pipe(run: Path) -> None:
    """The interpreter, too, has nothing to say of a reader that went away when it ends."""
    command = f"{sys.executable} -m know_cli --help 2> errors | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=run, capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split() == [str(EXIT_BROKEN_PIPE)]
    assert (run / "errors").read_text() == ""


def test_notices_need_no_reader(run: Path, bundle_path: Path, server: ForkServer) -> None:
    writer = gone()
    child = server.start(
        "predict", "ckpt0..ckpt4", "-o", "a.safetensors", "--weights", bundle_path, cwd=run, err=writer
    )  # fmt: skip
    os.close(writer)
    assert server.wait(child) == EXIT_DONE
    assert (run / "a.safetensors").exists()


@pytest.mark.parametrize("closed", ["out err", "out", "err", "-q out"])
def test_closed_streams_are_no_bugs(
    closed: str, run: Path, bundle_path: Path, server: ForkServer
) -> None:
    words = closed.split()
    quiet = [word for word in words if word == "-q"]
    done = server.complete(
        "predict", "ckpt0..ckpt4", "--weights", bundle_path, "-o", "a.safetensors", *quiet,
        cwd=run, **{stream: None for stream in words if stream != "-q"},
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert (run / "a.safetensors").exists()


def test_streams_that_a_shell_closes(tmp_path: Path) -> None:
    for streams in (">&-", "2>&-", ">&- 2>&-"):
        command = f"{sys.executable} -m know_cli --help {streams}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, check=False)  # fmt: skip
        assert done.returncode == EXIT_DONE
        assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_standard_output_is_an_error(run: Path, server: ForkServer) -> None:
    with Path("/dev/full").open("w") as full:
        done = server.complete("inspect", "ckpt0..ckpt4", cwd=run, out=full.fileno())
    assert done.returncode == EXIT_OUTPUT
    assert "standard output: No space left" in one_line(done.stderr)


def test_paths_that_are_no_text(run: Path, know: Command, bundle_path: Path) -> None:
    name = os.fsdecode(b"odd-\xff.safetensors")
    done = know("predict", "ckpt0..ckpt4", "-o", name, "--weights", bundle_path, "--json", "r.json", cwd=run)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert json.loads((run / "r.json").read_text())["outputs"]
    assert (run / name).exists()


def test_a_lost_terminal_ends_like_ctrl_c(run: Path, bundle_path: Path, server: ForkServer) -> None:
    for k in range(5):
        save_file({"w": k * torch.rand(1000, 1000)}, run / f"ckpt{k}.safetensors")
    child = server.start(
        "predict", "ckpt0..ckpt4", "-o", "out.safetensors", "--steps", "8", "--threads", "1",
        "--device", "cpu", "--weights", bundle_path, cwd=run,
    )  # fmt: skip
    await_beginning(run / "stderr.txt")
    os.kill(child, signal.SIGHUP)
    assert server.wait(child) == EXIT_INTERRUPTED
    assert "interrupted" in (run / "stderr.txt").read_text()
    assert sorted(path.name for path in run.glob("*.safetensors")) == [
        f"ckpt{k}.safetensors" for k in range(5)
    ]
    assert not list(run.glob(".know-*"))


def test_dry_run_figures(run: Path, know: Command, bundle_path: Path) -> None:
    done = know("predict", "ckpt0..ckpt4", "-o", "out", "--weights", bundle_path, "--dry-run",
                "--json", "plan.json", cwd=run)  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    plan = json.loads((run / "plan.json").read_text())
    state = network()
    actions = {tensor["name"]: tensor["action"] for tensor in plan["tensors"]}
    size = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    times = {"predict": 5, "copy": 1, "rescale": 1}
    assert plan["bytes_to_read"] == sum(size[name] * times[actions[name]] for name in state)
    assert plan["bytes_to_write"] == (run / "ckpt0.safetensors").stat().st_size
    fc = next(line.split() for line in done.stdout.splitlines() if line.startswith("fc "))
    # Without frozen.weight, 25 of the 1,035.
    assert fc == ["fc", "6", "1.03", "k", "1.01", "k"]


def test_the_default_bundle_is_the_one_that_is_documented(run: Path, know: Command) -> None:
    done = know("predict", "ckpt0..ckpt4", "-o", "out", "--dry-run", "--json", "r.json", cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert json.loads((run / "r.json").read_text())["target"] == "continuation"


def test_report_is_another_name_of_json(run: Path, know: Command, bundle_path: Path) -> None:
    command = ("predict", "ckpt0..ckpt4", "-o", "out", "--weights", bundle_path, "--dry-run")
    for option in ("--json", "--report"):
        assert know(*command, option, f"{option}.json", cwd=run).returncode == EXIT_DONE
    assert json.loads((run / "--json.json").read_text()) == json.loads(
        (run / "--report.json").read_text()
    )
    both = know(*command, "--json", "a.json", "--report", "b.json", cwd=run)
    assert both.returncode == EXIT_USAGE
    assert "--report is the older name of --json" in one_line(both.stderr)
    assert "--report" not in know("predict", "--help").stdout
    assert "--report" not in know("train", "--help").stdout
