"""What the README says of all tasks of the release regime together is what was measured on each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import know_cli
from know_cli.evaluation.anchors import NAIVE
from know_cli.evaluation.release import results
from know_cli.evaluation.statistics import Estimate, mean_estimate

ROOT = Path(know_cli.__file__).parents[1]
SGD = "release-cifar10-resnet-sgd"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Any]:
    found = json.loads((ROOT / "docs" / "results" / "release.json").read_text(encoding="utf-8"))
    return results.alike(found["tasks"])[0]


@pytest.fixture(scope="module")
def readme() -> str:
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_readme_says_on_how_many_tasks_each_start_was_measured(
    tasks: dict[str, Any], readme: str
) -> None:
    found = {name: NUMBERS[one.tasks] for name, one in results.pooled(tasks, "1250 images").items()}
    pair = found["authors-x8"], found["shrink-0.5"]
    assert "tasks fine-tuned by Adam that have them ({} and {})".format(*pair) in readme
    assert f"from training longer ({found['longer']} tasks)" in readme
    assert f"that a forgetting trains longest ({found['average-forgotten-3']})" in readme
    assert f"twice the data ({found['more-data']}" in readme
    of_own = found["continuation-x8"], found["retrodiction-x8"], found["faithful-322-x8"]
    assert len({*of_own[:2]}) == 1
    for words in ("`continuation` is", f"({of_own[0]})", f"({of_own[2]})"):
        assert words in readme, words


@pytest.mark.parametrize("start", ["authors-x8", "shrink-0.5"])
def test_what_is_below_the_first_checkpoint_is_so_on_two_tasks(
    start: str, tasks: dict[str, Any], readme: str
) -> None:
    assert "nearly all of that loss on the transformer and on a ResNet18" in readme
    lost, others = [], []
    for name, task in tasks.items():
        cell = task["cells"]["1250 images"]
        if start in cell:
            pairs = results.paired(cell[start]["tuned"], cell[NAIVE]["tuned"])
            is_one = name in ("release-cifar10-pyramid", "release-cifar10-resnet18")
            (lost if is_one else others).extend(one - other for one, other in pairs)
    assert mean_estimate(others).low < 0 < mean_estimate(others).high
    assert sum(others) > 0.2 * sum(lost)


def test_the_expectations_say_on_how_many_tasks_each_start_was_measured(
    tasks: dict[str, Any],
) -> None:
    page = (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8").replace("−", "-")
    page = " ".join(page.split())
    found = results.pooled(tasks, "1250 images")

    def said(name: str, digits: int = 2) -> str:
        of = found[name].tuned
        return f"{100 * of.value:+.{digits}f} ± {100 * of.half_width:.{digits}f}"

    def count(name: str) -> str:
        return NUMBERS[found[name].tasks]

    others = {n: task for n, task in tasks.items() if n != "release-cifar10-fashion-resnet"}
    without = results.pooled(others, "1250 images")["longer"].tuned
    assert (
        f"training longer leaves {said('longer')} ({count('longer')} tasks; "
        f"{100 * without.value:+.2f} ± {100 * without.half_width:.2f} without the one to Fashion-MNIST)"
    ) in page
    assert (
        f"The best combination of the checkpoints in hindsight is {said('hindsight')} "
        f"({count('hindsight')}), and training longer with a rate that falls to 0 "
        f"{said('longer-decayed')} ({count('longer-decayed')})"
    ) in page
    mean, five = "average-forgotten-3", "average"
    assert (
        f"for as many steps, {said(mean)} ({count(mean)}), the mean of the five {said(five)} "
        f"({count(five)}), `continuation` {said('continuation-x8')} ({count('continuation-x8')})"
    ) in page
    below = said("authors-x8", 1).removeprefix("-")
    assert (
        f"the authors' release is significantly *below* Θ0, by {below} ({count('authors-x8')}), and "
        f"half the weights are {said('shrink-0.5')} from it ({count('shrink-0.5')}), nearly all that "
        "either loses on the transformer and on the release's ResNet18"
    ) in page
    assert found["authors-x8"].tuned.high < 0 < found["shrink-0.5"].tuned.high
    assert f"twice the data gives {said('more-data')} ({count('more-data')})" in page
    own = [found[name].own for name in ("continuation-x8", "retrodiction-x8")]
    assert (
        "At the release's rate `continuation` ×8 has {} and `retrodiction` ×8 {}".format(
            *(f"{100 * of.value:+.2f} ± {100 * of.half_width:.2f}" for of in own)
        )
        in page
    )
    assert f"`retrodiction` {said('retrodiction-x8')} ({count('retrodiction-x8')})" in page
    faithful = said("faithful-322-x8").removeprefix("-")
    assert f"over the three at the tuned one by {faithful}: the session before" in page
    older = found["faithful-x8"]
    texts = [
        f"{100 * of.value:+.1f} ± {100 * of.half_width:.1f}" for of in (older.own, older.tuned)
    ]
    assert "gains nothing ({}, {}, five seeds)".format(*texts) in page


def test_the_first_checkpoint_with_its_own_norm_layers_is_told(
    tasks: dict[str, Any], readme: str
) -> None:
    page = " ".join(page_of("expectations.md").split())
    having = {n: of for n, of in tasks.items() if "naive-stored" in of["cells"]["1250 images"]}
    found = results.pooled(having, "1250 images")["naive-stored"]
    assert (found.tasks, found.trials) == (4, 40)
    own, tuned = (
        f"{100 * of.value:+.2f} ± {100 * of.half_width:.2f}" for of in (found.own, found.tuned)
    )
    assert f"with its own layers as they were is {own} points from that at the release's" in page
    assert f"and {tuned} at the tuned one: to" in page
    assert f"are worth {tuned} (four small ResNets; fine-tuned by SGD," in readme
    every = every_task()
    of_each = {
        name: results.at_tuned_rate(of["cells"]["1250 images"])["naive-stored"].difference
        for name, of in {**having, SGD: every[SGD]}.items()
    }
    assert f"to Fashion-MNIST {text_of(of_each.pop('release-cifar10-fashion-resnet'))}, on" in page
    by_sgd = text_of(of_each.pop(SGD))
    assert f"by SGD {by_sgd}." in page
    assert f"which is not among these tasks, {by_sgd.replace('-', '−')})" in readme
    others = sorted(100 * of.value for of in of_each.values() if of is not None)
    del having["release-cifar10-fashion-resnet"]
    left = results.pooled(having, "1250 images")["naive-stored"].tuned
    together = f"({100 * left.value:+.2f} ± {100 * left.half_width:.2f} together)"
    assert f"on the three others {others[0]:+.1f} to {others[-1]:+.1f} {together};" in page
    for name in (*having, "release-cifar10-fashion-resnet", SGD):
        cell = every[name]["cells"]["1250 images"]
        assert cell["naive-stored"] == cell["naive-re-estimated"], name


def test_what_was_taught_is_told_with_its_trials(tasks: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "expectations.md").read_text(encoding="utf-8").replace("−", "-")
    of_three = {n: tasks[f"release-cifar10-{n}"] for n in ("resnet", "cnn", "pyramid")}
    found = results.pooled(of_three, "1250 images")
    names = ("taught-331", "taught-elements-331", "taught-known-331-x2", "average-forgotten-3")
    texts = [
        f"{100 * found[n].tuned.value:+.2f} ± {100 * found[n].tuned.half_width:.2f}" for n in names
    ]
    assert [found[name].trials for name in names] == [25, 15, 30, 30]
    assert (
        "the first is {} points above Θ0 (25 trials), the richer one {} (15), KNOWN itself {} (30), and "
        "the plain mean of the three {} (30 trials;"
    ).format(*texts) in " ".join(page.split())


_CONVERGED = {
    "authors-x8": "the authors' release ×8",
    "shrink-0.7": "0.7 of Θ0's weights",
    "shrink-0.5": "half of Θ0's weights",
    "longer-decayed": "Θ0 trained longer, its rate falling",
    "continuation-x8": "`continuation` ×8",
    "retrodiction-x8": "`retrodiction` ×8",
    "average": "the mean of the five",
    "average-forgotten-3": "the mean of the three most forgotten",
    "more-data": "on twice the data",
}


def every_task() -> dict[str, Any]:
    found = json.loads((ROOT / "docs" / "results" / "release.json").read_text(encoding="utf-8"))
    return dict(found["tasks"])


def page_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8").replace("−", "-")


def text_of(difference: Estimate | None) -> str:
    assert difference is not None
    return f"{100 * difference.value:+.1f} ± {100 * difference.half_width:.1f}"


def test_the_expectations_have_the_table_of_converged_networks() -> None:
    tasks = every_task()
    of_networks = [tasks[f"release-cifar10-{n}-converged"] for n in ("resnet", "cnn", "pyramid")]
    cells = [task["cells"]["1250 images"] for task in of_networks]
    found = [
        "| "
        + " | ".join([words, *(text_of(standing(cell)[start].difference) for cell in cells)])
        + " |"
        for standing in (results.at_own_rate, results.at_tuned_rate)
        for start, words in _CONVERGED.items()
    ]
    page = page_of("expectations.md")
    section = page[page.index("### The same networks, converged") : page.index("### What to do")]
    rows = [line for line in section.splitlines() if "±" in line and line.startswith("| ")]
    assert rows == found
    for cell, seeds in zip(cells, (10, 10, 10), strict=True):
        assert {results.at_tuned_rate(cell)[start].seeds for start in _CONVERGED} == {seeds}
    over_all = results.pooled(dict(enumerate(of_networks)), "1250 images")
    words = " ".join(section.split())
    for start, of in over_all.items():
        # "only training longer and twice the data are above Θ0"
        assert (of.tuned.low > 0) == (start in ("longer-decayed", "more-data")), start
        figure = f"{100 * of.tuned.value:+.2f} ± {100 * of.tuned.half_width:.2f}"
        assert figure in words, (start, figure)
        assert f"({of.trials} trials)" in words
    # As the sentence beside it says, in whole points.
    worth = [
        round(
            100 * (results.at_tuned_rate(cell)[NAIVE].mean - results.at_own_rate(cell)[NAIVE].mean)
        )
        for cell in cells
    ]
    assert "Tuning the rate of Θ0 is worth {}, {} and {} points".format(*worth) in " ".join(
        section.split()
    )


def test_the_methods_say_what_a_shrunk_start_leaves_over_all_tasks(tasks: dict[str, Any]) -> None:
    words = " ".join(page_of("methods.md").split())
    of = results.pooled(tasks, "1250 images")["shrink-0.7"]
    assert (
        f"Over all {NUMBERS[of.tasks]} tasks fine-tuned by Adam that have it, 0.7 is "
        f"{100 * of.tuned.value:+.2f} ± {100 * of.tuned.half_width:.2f}"
    ) in words
    gains = {}
    for name, task in every_task().items():
        cell = task["cells"].get("1250 images", {})
        if "shrink-0.7" in cell and "epochs" not in name and "decay" not in name:
            gains[name] = results.at_tuned_rate(cell)["shrink-0.7"].difference
    above = {name for name, gain in gains.items() if gain is not None and gain.low > 0}
    assert above == {"release-cifar10-cnn", "release-cifar10-cnn-third"}
    third = text_of(gains["release-cifar10-cnn-third"])
    assert f"it gains on the CNN alone, with r = 1/3 {third}." in words


_EACH_TASK = {
    "resnet": "ResNet, BatchNorm",
    "cnn": "CNN, no norm",
    "pyramid": "pyramid transformer, LayerNorm",
    "whole-resnet": "ResNet, 32×32 pixels",
    "resnet-sgd": "ResNet, fine-tuned by SGD",
    "fashion": "ResNet, from Fashion-MNIST",
    "to-fashion": "ResNet, to Fashion-MNIST",
    "resnet-third": "ResNet, r = 1/3",
    "cnn-third": "CNN, r = 1/3",
    "pyramid-third": "transformer, r = 1/3",
    "resnet-converged": "ResNet, converged",
    "cnn-converged": "CNN, converged",
    "pyramid-converged": "transformer, converged",
}
_EACH_START = (
    "longer", "average-forgotten-3", "average", "continuation-x8", "retrodiction-x8", "shrink-0.5",
    "authors-x8", "hindsight", "more-data",
)  # fmt: skip


def test_the_expectations_have_every_task_at_the_tuned_rate() -> None:
    tasks, found = every_task(), []
    full = {"fashion": "fashion-cifar10-resnet", "to-fashion": "cifar10-fashion-resnet"}
    for name, words in _EACH_TASK.items():
        task = tasks[f"release-{full.get(name, f'cifar10-{name}')}"]
        tuned = results.at_tuned_rate(task["cells"]["1250 images"])
        texts = []
        for start in _EACH_START:
            if name.endswith("third"):
                start = start.replace("x8", "x27")
            if name.endswith("converged") and start == "longer":
                start = "longer-decayed"
            if start == "hindsight" and start not in tuned:
                assert name == "whole-resnet" or name.endswith("converged"), name
                texts.append("–")
                continue
            assert tuned[start].seeds >= 10 or name == "whole-resnet", (name, start)
            few = " (5)" if tuned[start].seeds < 10 else ""
            texts.append(text_of(tuned[start].difference) + few)
        found.append(f"| {words} | {' | '.join(texts)} |")
    page = page_of("expectations.md")
    section = page[page.index("### Task by task") : page.index("### With more images")]
    rows = [line for line in section.splitlines() if "±" in line and line.startswith("| ")]
    assert rows == found


def test_the_methods_say_what_weight_decay_does_beside_shrinking() -> None:
    tasks = every_task()
    plain = tasks["release-cifar10-cnn"]
    without = dict(zip(plain["seeds"], plain["cells"]["1250 images"][NAIVE]["tuned"], strict=True))
    gains, over = [], []
    for decay in ("0.1", "0.3", "1"):
        task = tasks[f"release-cifar10-cnn-decay-{decay}"]
        cell = task["cells"]["1250 images"]
        gained = [
            one - without[seed]
            for seed, one in zip(task["seeds"], cell[NAIVE]["tuned"], strict=True)
        ]
        assert len(gained) == 10
        gains.append(text_of(mean_estimate(gained)))
        over.append(text_of(results.at_tuned_rate(cell)["shrink-0.7"].difference))
    assert (
        "Θ0 gains {}, {} and {} points over none on the CNN at the tuned rate (ten seeds each), and "
        "λ = 0.7 over that {}, {} and {}: at a decay of 1 nothing is left of it."
    ).format(*gains, *over) in " ".join(page_of("methods.md").split())


def test_the_expectations_say_what_was_measured_at_32_pixels() -> None:
    tasks = every_task()
    page = " ".join(page_of("expectations.md").split())
    cell = tasks["release-cifar10-whole-resnet"]["cells"]["1250 images"]
    own, tuned = results.at_own_rate(cell), results.at_tuned_rate(cell)
    starts = ("authors-x8", "shrink-0.5")
    assert {own[start].seeds for start in starts} == {10}
    figures = [text_of(of[start].difference) for start in starts for of in (own, tuned)]
    assert (
        "{} for the authors' release at their rate, {} at the tuned one; half the weights {} and {}."
    ).format(*figures) in page
    cell = tasks["release-cifar10-resnet18"]["cells"]["1250 images"]
    below = [
        text_of(of(cell)["authors-x8"].difference).removeprefix("-")
        for of in (results.at_own_rate, results.at_tuned_rate)
    ]
    assert "×8 is {} points below Θ0 at theirs, {} at the tuned one.".format(*below) in page


def test_the_methods_say_how_shrinking_goes_with_the_length_of_the_fine_tuning() -> None:
    tasks = every_task()
    page = page_of("methods.md")
    found = []
    for epochs in (10, 30, 90):
        for factor in ("0.7", "0.4"):
            cells = []
            for network in ("resnet", "cnn", "pyramid"):
                name = f"release-cifar10-{network}"
                name += "" if epochs == 30 else f"-epochs-{epochs}"
                cell = tasks[name]["cells"]["1250 images"]
                for standing in (results.at_own_rate, results.at_tuned_rate):
                    of = standing(cell)[f"shrink-{factor}"]
                    assert of.seeds >= 10
                    cells.append(text_of(of.difference))
            found.append(f"| {factor} | {epochs} | {' | '.join(cells)} |")
    section = page[page.index("By how long the fine-tuning takes") : page.index("## Averages")]
    assert [line for line in section.splitlines() if "±" in line and line[0] == "|"] == found
    words = " ".join(section.split())
    short, long = (
        results.at_tuned_rate(tasks[f"release-cifar10-cnn-epochs-{n}"]["cells"]["1250 images"])
        for n in (10, 90)
    )
    ends = [of["shrink-0.4"].difference for of in (short, long)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].high < 0 < ends[1].low
    texts = [text_of(one) for one in ends]
    assert (
        "λ = 0.4 is {} points from Θ0 at the tuned rate, after 90 epochs {}.".format(*texts)
        in words
    )
    controls = []
    for control, plain, condition, start in (
        ("cnn-epochs-90-decay-1", "cnn-epochs-90", "1250 images", "shrink-0.4"),
        ("cnn-decay-1", "cnn", "2500 images", "shrink-0.5"),
    ):
        task, usual = tasks[f"release-cifar10-{control}"], tasks[f"release-cifar10-{plain}"]
        without = dict(zip(usual["seeds"], usual["cells"][condition][NAIVE]["tuned"], strict=True))
        cell = task["cells"][condition]
        gained = [
            one - without[seed]
            for seed, one in zip(task["seeds"], cell[NAIVE]["tuned"], strict=True)
        ]
        assert len(gained) == 10
        over = results.at_tuned_rate(cell)[start].difference
        assert over is not None
        assert over.low < 0 < mean_estimate(gained).low  # the decay gains, and leaves nothing
        controls += [text_of(mean_estimate(gained)), text_of(over)]
    half = results.at_tuned_rate(tasks["release-cifar10-cnn"]["cells"]["2500 images"])["shrink-0.5"]
    assert (
        "with one of 1, Θ0 gains {} points there, and λ = 0.4 over that {}. On 2,500 images half the "
        f"weights gain {text_of(half.difference)}, that decay {{}}, and half the weights over it {{}}."
    ).format(*controls) in words


def test_the_methods_say_what_half_of_the_layers_gives() -> None:
    tasks = every_task()
    words = " ".join(page_of("methods.md").split())
    cells = [
        tasks[f"release-cifar10-{n}"]["cells"]["1250 images"] for n in ("resnet", "cnn", "pyramid")
    ]
    tuned = [
        results.at_tuned_rate(cell)[f"shrink-0.5-{half}"]
        for half in ("first", "last")
        for cell in cells
    ]
    assert {of.seeds for of in tuned} == {10}
    texts = [text_of(of.difference) for of in tuned]
    assert (
        "it is {} points on the ResNet, {} on the CNN and {} on the transformer at the tuned rate; "
        "where only the last half does, {}, {} and {}."
    ).format(*texts) in words
    own = results.at_own_rate(cells[0])
    names = ("shrink-0.5-first", "shrink-0.5-last", "shrink-0.5")
    texts = [text_of(own[name].difference) for name in names]
    assert "the ResNet gains {} and {} by them, and of both together {}.".format(*texts) in words
    apart = []
    for cell in cells:
        pairs = results.paired(*(cell[name]["tuned"] for name in names[:2]))
        apart.append(mean_estimate([first - last for first, last in pairs]))
    assert (
        "the first half is {}, {} and {} points from the last".format(*map(text_of, apart)) in words
    )
    assert [of.low > 0 for of in apart] == [False, True, False]


_MORE_IMAGES = {
    "shrink-0.5": "half of Θ0's weights",
    "authors-x8": "the authors' release ×8",
    "longer": "Θ0 trained longer",
    "average-forgotten-3": "the mean of the three most forgotten",
}


def test_the_expectations_have_the_table_by_the_number_of_images() -> None:
    tasks = every_task()
    found = []
    for start, words in _MORE_IMAGES.items():
        for images in (1250, 2500, 5000):
            row = [f"| {words} | {images:,}"]
            for network in ("resnet", "cnn", "pyramid"):
                cell = tasks[f"release-cifar10-{network}"]["cells"][f"{images} images"]
                for standing in (results.at_own_rate, results.at_tuned_rate):
                    of = standing(cell)[start]
                    assert of.seeds >= 10
                    row.append(text_of(of.difference))
            found.append(" | ".join(row) + " |")
    page = page_of("expectations.md")
    section = page[page.index("### With more images") : page.index("### The same networks, conv")]
    assert [line for line in section.splitlines() if "±" in line and line[0] == "|"] == found
    # And over the three networks together.
    of_networks = {n: tasks[f"release-cifar10-{n}"] for n in ("resnet", "cnn", "pyramid")}
    twice, four = (results.pooled(of_networks, f"{n} images") for n in (2500, 5000))
    texts = {
        start: [
            f"{100 * of[start].tuned.value:+.2f} ± {100 * of[start].tuned.half_width:.2f}"
            for of in (twice, four)
        ]
        for start in _MORE_IMAGES
    }
    words = " ".join(section.split())
    longer, mean = texts["longer"], texts["average-forgotten-3"]
    authors, half = texts["authors-x8"], texts["shrink-0.5"]
    assert (
        f"leaves {longer[0]} with 2,500 images and {longer[1]} with 5,000, the mean of the three "
        f"most forgotten {mean[0]} and {mean[1]}, and the authors' release {authors[0]} and "
        f"{authors[1]}. Half the weights leave {half[0]} and {half[1]}: on the CNN they gain"
    ) in words
    # "none of the four starts that were measured so can be told from Θ0"
    assert set(four) == set(_MORE_IMAGES)
    assert all(of.tuned.low < 0 < of.tuned.high for of in four.values())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"on three networks (training longer {longer[1]})" in readme
