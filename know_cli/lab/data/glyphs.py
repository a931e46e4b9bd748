"""Generated images: a letter over a textured background, in three alphabets.

The letters come from the fonts that ship with matplotlib, so nothing depends on the machine's
fonts. Each is drawn once per font, as a mask; everything else is arithmetic on whole batches.
The upper and lower case of a letter are one class. The images vary in font, size, proportions,
rotation, shear, position, a smooth distortion, colours and their contrast, background (noise at
several scales, gradient, stripes), parts of other letters, blur and noise. That is more than a
small network learns from a few thousand images, and deliberately so: more data helps.
"""

from __future__ import annotations

import math
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

from know_cli.errors import UsageError
from know_cli.lab.data.samples import DataSet, Samples
from know_cli.lab.data.source import Folders, Source

# Lower and upper case of each letter: Latin; Greek without the final sigma; Cyrillic, the 30
# letters of Bulgarian.
ALPHABETS = {
    "latin": "abcdefghijklmnopqrstuvwxyz",
    "greek": "αβγδεζηθικλμνξοπρστυφχψω",
    "cyrillic": "абвгдежзийклмнопрстуфхцчшщъьюя",
}
_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
)
_SIDE = 32
# Masks are drawn and transformed at twice the size of the images, then averaged for smooth edges.
_MASK_SIDE = 2 * _SIDE
_FONT_SIZE = 46
_FORMS = 2
_FRAGMENTS = 2
_CANDIDATE_COLOURS = 4
_BACKGROUND_RANGE = 0.35
_BATCH = 250
_TRAIN, _TEST = 6000, 2000
_TRAIN_SEED, _TEST_SEED = 32, 33


@cache
def _masks(alphabet: str) -> Tensor:
    """Coverage of every letter in every font, ``[classes, forms · fonts, 64, 64]``, 0 to 1."""
    try:
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise UsageError(
            "the glyphs need Pillow and matplotlib's fonts: pip install 'know-predict[collect]'"
        ) from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    masks = np.zeros((len(ALPHABETS[alphabet]), _FORMS * len(_FONTS), _MASK_SIDE, _MASK_SIDE))
    for number, name in enumerate(_FONTS):
        path = folder / f"{name}.ttf"
        if not path.is_file():
            raise UsageError(
                f"the glyphs need {path}, which matplotlib {matplotlib.__version__} lacks: "
                "pip install 'know-predict[collect]'"
            )
        # Pillow's other layout engine is not always available and may place letters differently.
        font = ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for letter, small in enumerate(ALPHABETS[alphabet]):
            for form, character in enumerate((small, small.upper())):
                left, top, right, bottom = font.getbbox(character)
                canvas = Image.new("L", (_MASK_SIDE, _MASK_SIDE))
                corner = ((_MASK_SIDE - left - right) / 2, (_MASK_SIDE - top - bottom) / 2)
                ImageDraw.Draw(canvas).text(corner, character, 255, font)
                masks[letter, form * len(_FONTS) + number] = np.asarray(canvas) / 255
    return torch.from_numpy(masks.astype(np.float32))


def _uniform(low: float, high: float, *size: int, generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(size, generator=generator)


@cache
def _interpolation(cells: int, side: int) -> Tensor:
    """The matrix ``[side, cells]`` of bicubic interpolation along one axis."""
    unit = torch.eye(cells).view(1, cells, cells, 1)
    lengthened = nn.functional.interpolate(unit, (side, 1), mode="bicubic", align_corners=True)
    return lengthened[0, :, :, 0].T.contiguous()


def _enlarged(coarse: Tensor, side: int) -> Tensor:
    """Interpolate ``[n, C, k, k]`` smoothly to ``[n, C, side, side]``."""
    # Two matrix products are a few times as fast as torch's interpolation.
    matrix = _interpolation(coarse.shape[-1], side)
    return matrix @ coarse @ matrix.T


def _placed(
    masks: Tensor,
    *,
    size: tuple[float, float],
    angle: float,
    shear: float,
    offset: tuple[float, float],
    distortion: float,
    generator: Generator,
) -> Tensor:
    """Transform each mask at random; return coverage ``[n, 1, 32, 32]``, 0 to 1.

    Args:
        masks: ``[n, 64, 64]``, 0 to 1.
        size: smallest and largest scaling factor.
        angle: the largest rotation in degrees, in either direction.
        shear: the largest shear as a slope, in either direction.
        offset: smallest and largest distance from the centre; 1 is half the image.
        distortion: the largest displacement by the smooth distortion, in the same unit.
        generator: of random numbers.
    """
    n = len(masks)
    draw = partial(_uniform, generator=generator)
    factor = torch.exp(draw(math.log(size[0]), math.log(size[1]), n))
    proportion = torch.exp(draw(-0.2, 0.2, n))
    turn = draw(-angle, angle, n) * (math.pi / 180)
    slope = draw(-shear, shear, n)
    distance, direction = draw(*offset, n), draw(0, 2 * math.pi, n)
    # grid_sample needs the source of each pixel of the result, so this is the inverse of the
    # letter's transformation: move back, rotate back, then shear and scale back.
    line = (torch.arange(_MASK_SIDE) + 0.5) * (2 / _MASK_SIDE) - 1
    x = line - (distance * torch.cos(direction)).view(-1, 1, 1)
    y = line.view(-1, 1) - (distance * torch.sin(direction)).view(-1, 1, 1)
    cosine, sine = torch.cos(turn).view(-1, 1, 1), torch.sin(turn).view(-1, 1, 1)
    turned_x, turned_y = cosine * x + sine * y, cosine * y - sine * x
    wide, high = (factor * proportion).view(-1, 1, 1), (factor / proportion).view(-1, 1, 1)
    from_x = (turned_x - slope.view(-1, 1, 1) * turned_y) / wide
    from_y = turned_y / high
    displaced = _enlarged(draw(-distortion, distortion, n, 2, 4, 4), _MASK_SIDE)
    grid = torch.stack([from_x + displaced[:, 0], from_y + displaced[:, 1]], 3)
    large = nn.functional.grid_sample(masks.unsqueeze(1), grid, align_corners=False)
    return nn.functional.avg_pool2d(large, 2)


def _textures(n: int, generator: Generator) -> Tensor:
    """Each background pixel's position between two colours: ``[n, 1, 32, 32]``, 0 to 1."""
    draw = partial(_uniform, generator=generator)
    line = torch.linspace(-1, 1, _SIDE)
    direction = draw(0, 2 * math.pi, n, 1, 1, 1)
    along = torch.cos(direction) * line.view(1, 1, 1, -1) + torch.sin(direction) * line.view(
        1, 1, -1, 1
    )
    stripes = torch.sin(draw(4, 22, n, 1, 1, 1) * along + draw(0, 2 * math.pi, n, 1, 1, 1))
    parts = [along, stripes]
    parts += [_enlarged(draw(-1.5, 1.5, n, 1, cells, cells), _SIDE) for cells in (3, 6, 12, _SIDE)]
    # Weights are cubed, so that mostly one or two parts are visible at a time.
    weights = draw(0, 1, len(parts), n, 1, 1, 1) ** 3
    mixed = (weights * torch.stack(parts)).sum(0)
    return torch.sigmoid(draw(1, 6, n, 1, 1, 1) * mixed)


def _contrasting(others: Tensor, generator: Generator) -> Tensor:
    """Draw a few colours for each image and return the one farthest from all others.

    Args:
        others: ``[n, k, 3]``, 0 to 1.
        generator: of random numbers.

    Returns:
        ``[n, 3, 1, 1]``.
    """
    n = len(others)
    drawn = torch.rand((n, _CANDIDATE_COLOURS, 3), generator=generator)
    nearest = torch.cdist(drawn, others, compute_mode="donot_use_mm_for_euclid_dist").amin(2)
    return drawn[torch.arange(n), nearest.argmax(1)].view(n, 3, 1, 1)


def _blurred(images: Tensor, amount: Tensor) -> Tensor:
    """Mix images with a blurred version of themselves by an amount ``[n, 1, 1, 1]``, 0 to 1."""
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    channels = images.shape[1]
    blurred = nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    for shape in ((1, 1, 1, 5), (1, 1, 5, 1)):
        kernel = weights.view(shape).expand(channels, *shape[1:])
        blurred = nn.functional.conv2d(blurred, kernel, groups=channels)
    return torch.lerp(images, blurred, amount)


def _batch(masks: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Render the letters that the labels name: ``[n, 3, 32, 32]`` uint8."""
    n = len(labels)
    classes, drawings = masks.shape[:2]
    draw = partial(_uniform, generator=generator)

    def some(letters: Tensor) -> Tensor:
        return masks[letters, torch.randint(drawings, (n,), generator=generator)]

    first = torch.rand((n, 1, 3), generator=generator)
    # The background's second colour is close to the first, so that letters stand out from both.
    second = (first + draw(-_BACKGROUND_RANGE, _BACKGROUND_RANGE, n, 1, 3)).clamp(0, 1)
    colours = torch.cat([first, second], 1)
    start, end = colours.view(n, 2, 3, 1, 1).unbind(1)
    images = torch.lerp(start, end, _textures(n, generator))
    for _ in range(_FRAGMENTS):
        fragment = _placed(
            some(torch.randint(classes, (n,), generator=generator)),
            size=(0.6, 2.0),
            angle=180,
            shear=0.3,
            offset=(0.7, 1.2),
            distortion=0.1,
            generator=generator,
        )
        opacity = draw(0, 0.5, n, 1, 1, 1)
        colour = torch.rand((n, 3, 1, 1), generator=generator)
        images = torch.lerp(images, colour.expand_as(images), fragment * opacity)
    letter = _placed(
        some(labels),
        size=(0.85, 1.3),
        angle=15,
        shear=0.2,
        offset=(0.0, 0.2),
        distortion=0.06,
        generator=generator,
    )
    opacity = draw(0.7, 1, n, 1, 1, 1)
    images = torch.lerp(
        images, _contrasting(colours, generator).expand_as(images), letter * opacity
    )
    images = _blurred(images, draw(0, 1, n, 1, 1, 1))
    deviation = draw(0, 0.06, n, 1, 1, 1)
    images = images + deviation * torch.randn(images.shape, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


@cache
def render_glyphs(alphabet: str, count: int, seed: int) -> Samples:
    """Render images of letters. The result is cached for calls with the same arguments.

    Args:
        alphabet: ``latin``, ``greek`` or ``cyrillic``.
        count: number of images.
        seed: not negative; the same seed gives the same images, as long as torch, Pillow and
            matplotlib stay the same.

    Returns:
        Images ``[count, 3, 32, 32]`` and labels, positions in the alphabet, in random order. The
        numbers of images of any two classes differ by at most one.

    Raises:
        UsageError: there is no such alphabet, the count is less than one, the seed is negative,
            or Pillow or matplotlib is missing.
    """
    if alphabet not in ALPHABETS:
        raise UsageError(f"unknown alphabet {alphabet!r}; choose from {', '.join(ALPHABETS)}")
    if count < 1 or seed < 0:
        raise UsageError(
            f"{count} images with seed {seed}: the count must be at least 1, the seed not negative"
        )
    masks = _masks(alphabet)
    # Without the alphabet, the same seed would give all three the same backgrounds.
    state = np.random.SeedSequence([seed, list(ALPHABETS).index(alphabet)]).generate_state(1)
    generator = torch.Generator().manual_seed(int(state[0]))
    labels = torch.arange(count) % len(masks)
    labels = labels[torch.randperm(count, generator=generator)]
    # Batches bound the memory for intermediate results.
    images = [_batch(masks, chosen, generator) for chosen in torch.split(labels, _BATCH)]
    return Samples(torch.cat(images), labels)


def _read(alphabet: str, folders: Folders) -> DataSet:
    return DataSet(
        f"glyphs-{alphabet}",
        "image",
        render_glyphs(alphabet, _TRAIN, _TRAIN_SEED),
        render_glyphs(alphabet, _TEST, _TEST_SEED),
        len(ALPHABETS[alphabet]),
    )


def _source(alphabet: str) -> Source:
    return Source(
        partial(_read, alphabet),
        lambda folders: all(find_spec(package) for package in ("PIL", "matplotlib")),
    )


LATIN = _source("latin")
GREEK = _source("greek")
CYRILLIC = _source("cyrillic")
