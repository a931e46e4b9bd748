"""What the command line says, where it says it, and what it takes a name for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from know_cli.cli.report_file import check_reports
from know_cli.errors import EXIT_CHECKPOINT, EXIT_DONE, EXIT_OUTPUT, EXIT_USAGE, UsageError, a_type
from know_cli.files import check_writable, missing_folder
from know_cli.known.shipped import find_bundle, shipped
from tests.support.command import Command, one_line

COMMANDS = [
    "predict", "verify", "choose", "inspect", "demo", "forget", "collect", "train", "eval", "bench",
    "convert", "plot trajectory", "plot landscape", "plot results",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=generator)
    for k in range(3):
        save_file(
            {"fc.weight": weight * (1 - k / 10), "fc.bias": torch.ones(6) / (k + 1)},
            tmp_path / f"c{k}.safetensors",
        )
    return tmp_path


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(
            (name, "threads")
            for name in ("predict", "verify", "choose", "forget", "train", "bench")
        ),
        *((name, "processes") for name in ("eval", "collect")),
    ],
)
def test_threads_and_processes_are_bounded_alike(command: str, option: str, know: Command) -> None:
    """More than a system gives would end the process without a word of what to do."""
    for number in ("0", "1025"):
        done = know(command, f"--{option}", number)
        assert done.returncode == EXIT_USAGE
        assert f"'--{option}'" in (said := one_line(done.stderr))
        assert "1024" in said or number == "0"


# ------------------------------------------------------------------------- reports to stdout


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_predict_reports_to_standard_output(
    quiet: list[str], dry: list[str], run: Path, know: Command
) -> None:
    done = know(
        "predict", "c0..c2", "-o", "out", "--method", "naive", "--report", "-", *quiet, *dry, cwd=run
    )  # fmt: skip
    assert done.returncode == EXIT_DONE, done.stderr
    assert json.loads(done.stdout)["method"] == "naive"
    # What people read goes to the other stream, if it goes anywhere.
    assert ("x2 the data" in done.stderr) == (not quiet)
    assert not (run / "-").exists()


@pytest.mark.parametrize(
    ("command", "key", "words"),
    [
        (("verify", "out", "c0..c2"), "bytes_compared", "computed again is the same"),
        (("inspect", "c0..c2"), "checkpoints", "length of step"),
        (("plot", "trajectory", "c0..c2", "-o", "p.svg"), "distances", "wrote p.svg"),
    ],
)
def test_json_to_standard_output(
    command: tuple[str, ...], key: str, words: str, run: Path, know: Command
) -> None:
    know("predict", "c0..c2", "-o", "out", "--method", "naive", cwd=run)
    done = know(*command, "--json", "-", cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert key in json.loads(done.stdout)
    assert words in done.stderr
    assert not (run / "-").exists()


def test_a_difference_is_reported_on_standard_output_too(run: Path, know: Command) -> None:
    know("predict", "c0..c2", "-o", "out", "--method", "naive", cwd=run)
    content = bytearray((run / "out").read_bytes())
    content[-1] ^= 255
    (run / "out").write_bytes(content)
    done = know("verify", "out", "c0..c2", "--full", "--json", "-", cwd=run)
    assert done.returncode == EXIT_CHECKPOINT
    assert len(json.loads(done.stdout)["differences"]) == 1
    assert "is not what its provenance gives" in one_line(done.stderr)


def test_standard_output_takes_one_report(run: Path, know: Command) -> None:
    done = know("bench", "--json", "-", "--table", "-", cwd=run)
    assert done.returncode == EXIT_USAGE
    assert "standard output takes one report" in one_line(done.stderr)


@pytest.mark.parametrize(
    "command",
    [
        ("bench", "--sizes", "0", "--rows", "1000", "--rounds", "1", "--threads", "1"),
        ("train", "recorded", "--evaluate", "continuation"),
        ("train", "recorded", "--objective", "network", "--evaluate", "continuation"),
        ("train", "recorded", "--objective", "network", "-o", "bundle"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_two_reports_in_one_file_are_refused_before_any_work(
    command: tuple[str, ...], exists: bool, run: Path, know: Command
) -> None:
    (run / "recorded").mkdir()
    if exists:
        (run / "out.txt").write_text("before")
    force = ["--force"] if exists else []
    reports = ["--json", "out.txt", "--table", f"../{run.name}/out.txt"]
    done = know(*command, *reports, *force, cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert f"--table ../{run.name}/out.txt: is an input or an output of" in one_line(done.stderr)
    assert (run / "out.txt").exists() == exists


def test_two_reports_may_go_into_one_device(tmp_path: Path) -> None:
    check_reports(Path("/dev/null"), Path("/dev/null"), [])
    check_reports(tmp_path / "one.json", tmp_path / "one.md", [])


@pytest.mark.parametrize("name", ["results.json", "runs.json", "branches.json", "release.json"])
def test_a_table_in_the_place_of_results_is_refused_before_any_work(
    name: str, tmp_path: Path, know: Command
) -> None:
    (tmp_path / "out").mkdir()
    done = know("eval", "-o", "out", "--task", "none", "--table", f"out/{name}", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert f"--table out/{name}: is an input or an output of" in one_line(done.stderr)


@pytest.mark.parametrize("name", ["search/report.json", "search/measures.jsonl", "search"])
def test_a_report_in_the_place_of_the_search_s_own_is_refused(
    name: str, run: Path, know: Command
) -> None:
    if name != "search":
        (run / "search").mkdir()
    done = know(
        "choose", "c0..c2", "-o", "start", "--folder", "search", "--measure", "false {start}",
        "--json", name, "--force", cwd=run,
    )  # fmt: skip
    assert done.returncode == EXIT_OUTPUT
    assert f"--json {name}: is an input or an output of" in one_line(done.stderr)
    assert not list((run / "search").glob("*"))


# ------------------------------------------------------------------------- verify


@pytest.mark.parametrize(
    "arguments", [["c0..c2", "out"], ["c0", "c1", "c2", "out"], ["c0..c2", "./out"]]
)
def test_swapped_arguments_of_verify(arguments: list[str], run: Path, know: Command) -> None:
    know("predict", "c0..c2", "-o", "out", "--method", "naive", cwd=run)
    done = know("verify", *arguments, cwd=run)
    assert done.returncode == EXIT_USAGE
    line = one_line(done.stderr)
    assert "the output goes first: know verify out c0.safetensors c1.safetensors c2.safetensors" in line  # fmt: skip


def test_the_digest_that_is_compared_is_not_replaced(run: Path, know: Command) -> None:
    know("predict", "c0..c2", "-o", "out", "--method", "naive", "--checksum", cwd=run)
    digest = (run / "out.sha256").read_bytes()
    done = know("verify", "out", "c0..c2", "--json", "out.sha256", "--force", cwd=run)
    assert done.returncode == EXIT_OUTPUT
    assert "--json out.sha256: is an input or an output of this run" in one_line(done.stderr)
    assert (run / "out.sha256").read_bytes() == digest


def test_the_right_order_is_shown_for_a_shell(run: Path, know: Command) -> None:
    (run / "my run").mkdir()
    know("predict", "c0..c2", "-o", "my run/out", "--method", "naive", cwd=run)
    done = know("verify", "c0..c2", "my run/out", cwd=run)
    assert "know verify 'my run/out' c0.safetensors" in one_line(done.stderr)


def test_several_outputs_are_no_output(run: Path, know: Command) -> None:
    done = know("verify", "c0..c2", "c1", cwd=run)
    assert done.returncode == EXIT_USAGE
    assert "c0..c2: names 3 checkpoints; OUT is one, and goes first" in one_line(done.stderr)


def test_a_prediction_from_a_prediction_is_in_order(run: Path, know: Command) -> None:
    know("predict", "c0..c2", "-o", "first", "--method", "naive", cwd=run)
    know("predict", "first", "c0", "c1", "-o", "second", "--method", "linear", cwd=run)
    done = know("verify", "second", "first", "c0", "c1", "--full", cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr


# ------------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("my dir", "mkdir -p 'my dir'"),
        ("a/b", "mkdir -p a/b"),
        ("it's", """mkdir -p 'it'"'"'s'"""),
        ("$HOME", "mkdir -p '$HOME'"),
        ("-x", "mkdir -p ./-x"),
    ],
)
def test_hints_can_be_pasted(folder: str, command: str) -> None:
    assert str(missing_folder(Path(folder))).endswith(f"make it first: {command}")


def test_commands_quote_folders_in_their_hints(run: Path, know: Command) -> None:
    for command in (
        ("predict", "c0..c2", "-o", "my dir/x"),
        ("predict", "c0..c2", "-o", "out", "--report", "my dir/r.json"),
        ("inspect", "c0..c2", "--json", "my dir/r.json"),
        ("demo", "my dir/demo"),
        ("eval", "-o", "my dir/results"),
        ("eval", "-o", "results", "--table", "my dir/t.md"),
        ("bench", "--folder", "my dir", "--sizes", "1e3"),
    ):
        done = know(*command, cwd=run)
        assert done.returncode == EXIT_OUTPUT, done.stderr
        assert "mkdir -p 'my dir'" in one_line(done.stderr)


# ------------------------------------------------------------------------- demo


def test_demo_fails_before_it_trains(
    tmp_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not keep root out, so that the system is asked to refuse."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(Path, "touch", refuse)
    done = know("demo", "run", cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "run: cannot be written in: Read-only file system" in one_line(done.stderr)
    assert "training" not in done.stderr
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("name", ["taken", "taken/deeper"])
def test_demo_where_a_file_is(name: str, tmp_path: Path, know: Command) -> None:
    (tmp_path / "taken").write_text("")
    done = know("demo", name, cwd=tmp_path)
    assert done.returncode == EXIT_OUTPUT
    assert "training" not in done.stderr


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------- words


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_python_types(command: str, know: Command) -> None:
    done = know(*command.split(), "--help")
    assert done.returncode == EXIT_DONE
    for word in ("list[", "<str>", "<path>", "<Path>", "typing", "Optional", "None]"):
        assert word not in done.stdout


def test_words_that_are_values_are_still_shown(know: Command) -> None:
    assert "<copy|predict|reset|rescale|average>" in know("predict", "--help").stdout
    assert "<copy|predict|reset|rescale|average>" in know("eval", "--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--norm", "rescle"), "'--norm': 'rescle' is not one of 'copy', 'predict', 'reset', 'rescale'"),
        (("--frozen", "thaw"), "'--frozen': 'thaw' is not one of 'copy', 'predict'"),
    ],
)  # fmt: skip
def test_wrong_words_are_answered_plainly(
    arguments: tuple[str, ...], message: str, run: Path, know: Command
) -> None:
    done = know("predict", "c0..c2", "-o", "out", *arguments, cwd=run)
    assert done.returncode == EXIT_USAGE
    assert message in one_line(done.stderr)
    assert "Value error" not in done.stderr


@pytest.mark.parametrize(
    ("value", "text"),
    [(3, "an int"), ([], "a list"), ({}, "a dict"), (1.5, "a float"), (None, "a NoneType"),
     (torch.ones(1), "a Tensor"), (object(), "an object")],
)  # fmt: skip
def test_types_have_their_article(value: object, text: str) -> None:
    assert a_type(value) == text


@pytest.mark.parametrize(("value", "text"), [(7, "a number"), ([1], "a list"), ("x", "a text")])
def test_a_pickle_of_something_else(
    value: object, text: str, tmp_path: Path, know: Command
) -> None:
    torch.save(value, tmp_path / "in.pt")
    done = know("convert", "in.pt", "-o", "out.safetensors", cwd=tmp_path)
    assert done.returncode == EXIT_CHECKPOINT
    assert f"holds {text}" in one_line(done.stderr)


# ------------------------------------------------------------------------- names of bundles


def test_a_folder_in_the_working_directory_is_not_taken_for_a_shipped_bundle(
    run: Path, bundle_path: Path, know: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    for name in shipped():
        shutil.copytree(bundle_path, run / name)
        for size in (2, 3):
            assert find_bundle(name, size) == shipped()[name][size]
        assert find_bundle(f"./{name}", 3) == Path(name)
    done = know("predict", "c0..c2", "-o", "out", "--report", "r.json", cwd=run)
    assert done.returncode == EXIT_DONE, done.stderr
    assert json.loads((run / "r.json").read_text())["target"] == "continuation"
    named = know("predict", "c0..c2", "-o", "named", "--weights", "continuation", cwd=run)
    assert named.returncode == EXIT_DONE
    assert (run / "named").read_bytes() == (run / "out").read_bytes()


@pytest.mark.parametrize("name", ["mine", "known-2"])
def test_a_path_of_a_bundle_has_to_look_like_one(
    name: str, run: Path, bundle_path: Path, know: Command
) -> None:
    shutil.copytree(bundle_path, run / name)
    command = ("predict", "c0", "c1", "c2", "-o", "out")
    done = know(*command, "--weights", name, cwd=run)
    assert done.returncode == EXIT_USAGE
    assert f"for the folder write ./{name}" in one_line(done.stderr)
    for path in (f"./{name}", f"{run}/{name}"):
        # It is for five checkpoints, so that it is found and then refused.
        done = know(*command, "--weights", path, cwd=run)
        assert done.returncode == EXIT_CHECKPOINT
        assert "this KNOWN reads 5 checkpoints, 3 were given" in one_line(done.stderr)


def test_what_is_no_bundle_at_all() -> None:
    with pytest.raises(
        UsageError, match=r"nothing: neither a folder with a hyper-model .* nor a shipped"
    ):
        find_bundle("nothing", 5)
