"""Round trips: five sessions saved by a model's own library, and a prediction that it loads again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from know_cli.errors import EXIT_DONE
from tests.support.command import Command

SESSIONS = 5
# How far training moves a weight on the way from Θ0 to Θ4, as a share of its tensor's size; on
# average it becomes smaller by as much, as with weight decay.
_MOVEMENT = 0.03
# The size of what is zero at first, as biases and LoRA's B are.
_SIZE_OF_ZEROS = 0.02


@dataclass(frozen=True)
class Sessions:
    """A model's sessions on disk.

    Attributes:
        folder: where they are.
        names: of the checkpoints in it, Θ0 first.
        answers: what the model answers in each.
    """

    folder: Path
    names: list[str]
    answers: list[Tensor]

    @property
    def first(self) -> Path:
        return self.folder / self.names[0]

    @property
    def last(self) -> Path:
        return self.folder / self.names[-1]


def record(
    model: nn.Module,
    folder: Path,
    save: Callable[[Path], object],
    answer: Callable[[nn.Module], Tensor],
    *,
    suffix: str = "",
    between: Callable[[int], None] = lambda session: None,
) -> Sessions:
    """Move a model's trainable parameters as sessions do, ever less, and save each session.

    Args:
        model: at Θ0; is left at Θ4.
        folder: for the checkpoints.
        save: writes the model to a path.
        answer: what the model says; it is asked in evaluation mode.
        suffix: of the checkpoints' names.
        between: moves what no gradient moves, before each session is saved.
    """
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    starts = [parameter.detach().clone() for parameter in trained]
    ways = [[_way(start, generator) for _ in range(2)] for start in starts]
    names, answers = [], []
    for session in range(SESSIONS):
        along = 1 - 0.5**session
        with torch.no_grad():
            for parameter, start, (straight, bend) in zip(trained, starts, ways, strict=True):
                moved = start.double() + along * straight + along**2 * bend
                parameter.copy_(moved.to(parameter.dtype))
        between(session)
        model.eval()
        with torch.no_grad():
            answers.append(answer(model).double())
        names.append(f"session{session}{suffix}")
        save(folder / names[-1])
    return Sessions(folder, names, answers)


def _way(start: Tensor, generator: torch.Generator) -> Tensor:
    size = float(start.double().square().mean().sqrt()) if start.numel() else 0.0
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    return (noise * (size or _SIZE_OF_ZEROS) - start.double()) * _MOVEMENT


def predict(know: Command, sessions: Sessions, *options: str, name: str = "out") -> Path:
    """Predict with the command line as users do; the output has Θ0's form."""
    output = name + sessions.first.suffix
    done = know("predict", *sessions.names, "-o", output, *options, cwd=sessions.folder)
    assert done.returncode == EXIT_DONE, done.stderr
    return sessions.folder / output


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of a folder's files, sharded or not."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found: dict[str, Tensor] = {}
    for file in files:
        loaded = load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
    assert found
    return found


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape, one type and the same bytes."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (one, other)))


def check_prediction(
    sessions: Sessions, output: Path, copied: Sequence[str], elsewhere: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Compare a prediction with its inputs; every tensor is to be copied or predicted, as said.

    No value moves further from Θ0 than the furthest of the sessions has, which is what a hyper-model
    for standardised windows promises.

    Args:
        sessions: the inputs.
        output: the prediction.
        copied: globs of the names of all that is to have Θ0's bytes.
        elsewhere: globs of what the test compares with something else.

    Returns:
        The prediction's tensors.
    """
    first, found = tensors(sessions.first), tensors(output)
    others = [tensors(sessions.folder / name) for name in sessions.names[1:]]
    assert list(found) == list(first)
    for glob in (*copied, *elsewhere):
        assert any(fnmatchcase(name, glob) for name in first), f"{glob} matches nothing"
    predicted = 0
    for name, start in first.items():
        if any(fnmatchcase(name, glob) for glob in elsewhere):
            continue
        if any(fnmatchcase(name, glob) for glob in copied):
            assert same(found[name], start), f"{name} is not copied"
            continue
        assert found[name].dtype == start.dtype
        change = (found[name].double() - start.double()).abs()
        spread = torch.stack([(other[name].double() - start.double()).abs() for other in others])
        rounding = start.double().abs() * torch.finfo(start.dtype).eps
        assert change.max() > 0, f"{name} is not predicted"
        assert bool((change <= spread.amax(0) + rounding).all()), f"{name} moves too far"
        predicted += 1
    assert predicted > 0
    if output.is_dir():
        _check_other_files(sessions.first, output)
    return found


def _check_other_files(source: Path, output: Path) -> None:
    names = {str(path.relative_to(source)) for path in source.rglob("*")}
    assert {str(path.relative_to(output)) for path in output.rglob("*")} == names
    for path in source.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert (output / path.relative_to(source)).read_bytes() == path.read_bytes()


def check_answer(
    sessions: Sessions, model: nn.Module, answer: Callable[[nn.Module], Tensor]
) -> None:
    """What a model answers that was loaded from a prediction is close to what Θ0 answers.

    No weight moves further from Θ0 than the sessions did, so the answer does not either, much.
    """
    model.eval()
    with torch.no_grad():
        found = answer(model).double()
    assert bool(torch.isfinite(found).all())
    start, *_, end = sessions.answers
    moved = float((end - start).norm())
    assert moved > 0
    assert 0 < float((found - start).norm()) <= 1.5 * moved


def check_saved_again(output: Path, again: Path) -> None:
    """What a library saves after it has loaded a prediction are the prediction's own bytes."""
    found, saved = tensors(output), tensors(again)
    assert found.keys() == saved.keys()
    assert [name for name, tensor in found.items() if not same(tensor, saved[name])] == []
