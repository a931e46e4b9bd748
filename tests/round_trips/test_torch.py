"""Networks of torch alone, saved and loaded by safetensors: spectral norm, weights that are tied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as by_parametrization

from tests.support.command import Command
from tests.support.round_trips import check_answer, check_prediction, predict, record

PICTURES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(4))
Normed = Callable[[nn.Module], nn.Module]
FORMS: dict[str, tuple[Normed, list[str]]] = {
    "hooks": (nn.utils.spectral_norm, ["*.weight_u", "*.weight_v"]),
    "parametrizations": (by_parametrization, ["*.weight.0._u", "*.weight.0._v"]),
}


def discriminator(normed: Normed) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        normed(nn.Conv2d(3, 8, 3, stride=2)), nn.LeakyReLU(0.1), normed(nn.Conv2d(8, 16, 3)),
        nn.LeakyReLU(0.1), nn.Flatten(), normed(nn.Linear(16 * 9, 1)),
    )  # fmt: skip


def answer(model: nn.Module) -> Tensor:
    found = model(PICTURES)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_discriminator(form: str, tmp_path: Path, know: Command) -> None:
    normed, vectors = FORMS[form]
    model = discriminator(normed)

    def follow(session: int) -> None:
        model.train()
        for _ in range(5 if session else 30):
            answer(model)

    sessions = record(
        model, tmp_path, lambda path: save_model(model, str(path)), answer,
        suffix=".safetensors", between=follow,
    )  # fmt: skip
    out = predict(know, sessions)
    found = check_prediction(sessions, out, vectors)
    lengths = [float(found[name].norm()) for name in found if name.endswith(("_u", "_v"))]
    assert lengths == pytest.approx([1.0] * 6, abs=1e-5)
    loaded = discriminator(normed)
    assert not any(load_model(loaded, out))  # neither missing nor unexpected
    check_answer(sessions, loaded, answer)
    # The vectors of Θ0 still tell the norm of what was predicted from it.
    for layer in (loaded[0], loaded[2], loaded[5]):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        norm = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
        assert float(norm) == pytest.approx(1, abs=0.01)


class Tied(nn.Module):
    """Its output layer is its embedding, of which ``save_model`` keeps one and notes the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 8)
        self.mixing = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.head(torch.tanh(self.mixing(self.embedding(tokens))))
        assert isinstance(found, Tensor)
        return found


def notes(path: Path) -> dict[str, str]:
    """A file's metadata, but for this program's."""
    with safe_open(path, framework="pt") as file:
        return {key: text for key, text in file.metadata().items() if not key.startswith("know.")}


def test_weights_that_are_stored_once(tmp_path: Path, know: Command) -> None:
    model = Tied()

    def logits(model: nn.Module) -> Tensor:
        found = model(torch.arange(16))
        assert isinstance(found, Tensor)
        return found

    sessions = record(
        model, tmp_path, lambda path: save_model(model, str(path)), logits, suffix=".safetensors"
    )
    out = predict(know, sessions)
    assert len(check_prediction(sessions, out, [])) == 3
    assert notes(sessions.first) == {"head.weight": "embedding.weight"}
    assert notes(out) == {"head.weight": "embedding.weight", "format": "pt"}
    loaded = Tied()
    assert not any(load_model(loaded, out))  # neither missing nor unexpected
    assert loaded.head.weight is loaded.embedding.weight
    check_answer(sessions, loaded, logits)
