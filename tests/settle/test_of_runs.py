"""What is said of settle through 339 runs and of branches: the figures of the published pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (ROOT / "docs" / "results" / f"{page}.json").read_text(encoding="utf-8")
    )
    return found


def words(path: str) -> str:
    return " ".join((ROOT / path).read_text(encoding="utf-8").replace("−", "-").split())


def gained(page: str, start: str) -> str:
    mean, half = of(page)["gains"]["runs"]["accuracy"][start]
    return f"{mean:+.2f} ± {half:.2f}"


def test_the_prose_has_what_it_gains_on_other_runs() -> None:
    text = words("docs/averages.md")
    held, later = "network-339", "network-339-later"
    assert (
        f"held out at once it gains {gained(held, 'settle')} points, the mean of five "
        f"{gained(held, 'average-5')} and the exponential average {gained(held, 'average-5-ema')}"
    ) in text
    assert f"{gained('network-339-elements-later', 'settle')} points, and ahead of every" in text
    first, effort = of(held)["curve"][0], of(held)["settings"]["steps"]
    mean, half = first["runs"]["ahead"]["average-5-ema"]
    assert f"after {first['step']:,} steps it was {mean:+.2f} ± {half:.2f} from that" in text
    assert f"339 runs in {effort:,} steps" in text
    for page in (later, "network-339-elements-later"):
        assert len(of(page)["held_out"]["runs"]) == 296
        ahead = of(page)["gains"]["runs"]["ahead"]
        assert all(mean > half for name, (mean, half) in ahead.items() if "average" in name)
    mean, half = of(later)["gains"]["runs"]["ahead_loss"]["average-5"]
    assert mean < half
    known = [
        of(page)["gains"]["runs"]["ahead"]["average-5-ema"]
        for page in ("network-339-known", "network-339-known-later")
    ]
    held_out, on_later = (f"{mean:+.2f} ± {half:.2f}" for mean, half in known)
    assert f"{held_out} points ahead of it on the runs held out, {on_later} [on those" in text
    assert all(abs(mean) < half for mean, half in known)


def test_the_prose_has_what_it_gains_on_other_tasks() -> None:
    text = words("docs/averages.md")
    page = words("docs/results/runs-settle.md")
    averages = page.split("### settle What")[1].split("| recovered gain, 16 tasks |")[1]
    cells = [cell.strip() for cell in averages.split("|")[:7]]
    names = ("average-2", "average-3", "average-5", "linear", "sqrt", "cosine", "ema")
    gains = dict(zip(names, cells, strict=True))
    assert (
        f"recovered gain is {gains['average-5']} from the mean of five, {gains['ema']} from the "
        f"exponential average and {gains['average-3']} from the mean of three"
    ) in text
    elements = page.split("### settle-elements")[1].split("| recovered gain, 16 tasks |")[1]
    assert f"{elements.split('|')[2].strip()} from the mean of five." in text
    # What it has over the mean of five the exponential average has, too.
    spaced = page.split("| settle - average-5-ema |")[2].split("|")
    low, high = (float(end) for end in spaced[4].split("(")[1].strip(") ").split(" to "))
    assert low < 0 < high


def test_the_prose_has_the_exponential_average_by_spacing() -> None:
    text, page = words("docs/averages.md"), words("docs/results/runs-settle.md")
    own = page.split("### settle What")[1].split("### settle-elements")[0]
    rows = own.split("| 1 % | 2 % | 4 % | 8 % | all |")[1]

    def row(start: str) -> list[str]:
        return [cell.split("(")[0].strip() for cell in rows.split(f"| {start} |")[1].split("|")[:4]]

    mean, ema = row("average-5"), row("average-5-ema")
    assert (
        f"five are 8 % of the run apart, it recovers {ema[3]} and the mean {mean[3]} (six" in text
    )
    assert f"where they are 1 % apart, {ema[0]} and {mean[0]}." in text


def test_the_prose_has_what_the_one_for_branches_gains() -> None:
    text, found = words("docs/averages.md"), of("network-branches")
    gains = {
        name: f"{m:+.2f} ± {h:.2f}" for name, (m, h) in found["gains"]["runs"]["accuracy"].items()
    }
    assert len(found["taught_on"]) == 53
    assert len(found["held_out"]["runs"]) == 15
    assert (
        f"it gains {gains['settle']} points over Θ0, the average {gains['average-4']}, and more steps"
    ) in text
    assert f"gains {gains['longer']} at the same rate and {gains['annealed']} annealed" in text
    best = [point["runs"]["ahead"]["average-4"][0] for point in found["curve"]]
    assert max(best) == best[0]
