"""What growing saved in deep_*: from the kept records, at equal validation loss, against tokens per parameter.

    python recipes/experiments/deep_figure.py deep_24x32 --figure recipes/figures/deep_24x32.png
    python recipes/experiments/deep_figure.py deep_24x32 --loss train   # no text is seen twice: held out, too
    python recipes/experiments/deep_figure.py deep_24x32 --sweep        # the learning rates that were tried
    python recipes/experiments/deep_figure.py --keep runs/deep_24x32_stack-1 ...       # a run's records -> results/

How a saving is found. Losses, from the target model's 100th step on (its warm-up), are smoothed: straight lines in
the logarithm of FLOPs, over SPAN of it on either side and FEWEST records at least. For a seed and a number of tokens of
its baseline, the baseline's smoothed loss there is the loss asked for; the saving is FLOPs(baseline) / FLOPs(grown, its
base included) - 1, where the grown run of that seed first has it. A seed is independent of the others, so the mean over
seeds, of log(1 + saving), has a 95% interval by Student's t from three seeds on. With fewer there is none; what is told
then is the noise of the smoothing, within the runs: another seed may differ by more.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RESULTS = Path(__file__).parent / "results"
SPAN = 0.25  # of log FLOPs: from 1 / 1.28 to 1.28 times as many
FEWEST = 5  # records that a line is drawn through
SETTLED = 100  # steps of the target model: its warm-up
POINTS = 6  # in the table
T95 = {
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
}  # Student's t, two-sided, by number of seeds
FILES = {"validation": "validation", "train": "metrics"}


class Curve(NamedTuple):
    """The validation losses of one run's target model, and its tokens, over FLOPs; the base's are counted."""

    flops: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    def smoothed(self, flops: float) -> tuple[float, float]:
        """The loss there, and the standard error of it from the scatter around the line."""
        x = np.log(self.flops / flops)
        near = np.abs(x) <= max(SPAN, np.sort(np.abs(x))[min(FEWEST, len(x)) - 1])
        design = np.stack([np.ones(near.sum()), x[near]], axis=1)
        inverse = np.linalg.inv(design.T @ design)
        fitted = inverse @ design.T @ self.loss[near]
        scatter = self.loss[near] - design @ fitted
        return float(fitted[0]), float(
            np.sqrt(inverse[0, 0] * (scatter @ scatter) / (near.sum() - 2))
        )

    def first(self, loss: float) -> tuple[float, float]:
        """The FLOPs at which the smoothed loss first is ``loss``, and the standard error of their logarithm."""
        grid = np.geomspace(self.flops[0], self.flops[-1], 400)
        values = np.array([self.smoothed(f)[0] for f in grid])
        below = np.flatnonzero(values <= loss)
        if not below.size or below[0] == 0:  # never, or before the curve begins
            return np.nan, np.nan
        i = below[0]
        share = (values[i - 1] - loss) / (values[i - 1] - values[i])
        slope = (self.smoothed(grid[i] * 1.1)[0] - self.smoothed(grid[i] / 1.1)[0]) / (
            2 * np.log(1.1)
        )
        found = float(grid[i - 1] * (grid[i] / grid[i - 1]) ** share)
        return found, abs(self.smoothed(found)[1] / slope) if np.isfinite(
            slope
        ) else np.nan


def read(name: str, loss: str = "validation", folder: Path = RESULTS) -> Curve:
    rows = [
        json.loads(line)
        for line in (folder / f"{name}.{FILES[loss]}.jsonl").read_text().splitlines()
    ]
    last = rows[-1]["stage"]
    rows = [row for row in rows if row["stage"] == last and row["step"] >= SETTLED]
    return Curve(
        *(
            np.array([row[key] for row in rows], float)
            for key in ("flops", "tokens", "loss")
        )
    )


def seeds(name: str, folder: Path = RESULTS) -> list[str]:
    """The seeds of a recipe of which records are kept; those of the sweep, SEED-lrRATE, are none."""
    files = folder.glob(f"{name}-*.validation.jsonl")
    return sorted(
        (
            s
            for f in files
            if (s := f.name.split(".")[0].removeprefix(f"{name}-")).isdigit()
        ),
        key=int,
    )


class Saving(NamedTuple):
    tokens: float
    mean: float
    low: float
    high: float
    seeds: int
    each: list[float]
    loss: float


def savings(
    scratch: Sequence[Curve], grown: Sequence[Curve], tokens: Sequence[float]
) -> Iterator[Saving]:
    """The saving of each pair at each number of tokens of the baseline, where all pairs have one."""
    for count in tokens:
        logs, errors, losses = [], [], []
        for base, run in zip(scratch, grown, strict=True):
            flops = float(np.interp(count, base.tokens, base.flops))
            loss, error = base.smoothed(flops)
            other, other_error = run.first(loss)
            slope = (base.smoothed(flops * 1.1)[0] - base.smoothed(flops / 1.1)[0]) / (
                2 * np.log(1.1)
            )
            logs.append(np.log(flops / other))
            errors.append(np.hypot(error / slope, other_error))
            losses.append(loss)
        if not np.all(np.isfinite(logs)):
            continue
        n, mean = len(logs), float(np.mean(logs))
        half = (
            T95[n] * np.std(logs, ddof=1) / np.sqrt(n)
            if n in T95
            else 1.96 * float(np.mean(errors))
        )
        low, middle, high = (
            float(np.expm1(v)) for v in (mean - half, mean, mean + half)
        )
        yield Saving(
            count,
            middle,
            low,
            high,
            n,
            [float(np.expm1(v)) for v in logs],
            float(np.mean(losses)),
        )


def parameters(family: str) -> int:
    """Non-embedding parameters of the target, from FLOPs per token: 6 (N + head)."""
    row = json.loads(
        (RESULTS / f"{family}_scratch-1.metrics.jsonl").read_text().splitlines()[-1]
    )
    return round(row["flops"] / row["tokens"] / 6) - 2048 * int(family.split("x")[1])


def compare(family: str, loss: str, figure: Path | None) -> None:
    n, found = parameters(family), {}
    for operator in ("stack", "interleave", "zero", "random", "learn"):
        pairs = [
            s for s in seeds(f"{family}_{operator}") if s in seeds(f"{family}_scratch")
        ]
        if not pairs:
            continue
        scratch, grown = (
            [read(f"{family}_{which}-{s}", loss) for s in pairs]
            for which in ("scratch", operator)
        )
        top = min(curve.tokens[-1] for curve in scratch)
        grid = np.linspace(scratch[0].tokens[0], top, 60)
        found[operator] = (scratch, grown, list(savings(scratch, grown, grid)))
        print(
            f"\n{family}_{operator} against {family}_scratch, seeds {', '.join(pairs)}; {loss} loss, smoothed"
        )
        interval = (
            "95%"
            if len(pairs) in T95
            else "noise within the runs alone, no interval over seeds"
        )
        print(
            f"{'tokens':>8} {'/ parameter':>11} {'loss':>7} {'saved':>7}   {interval}; each seed"
        )
        spaced = savings(scratch, grown, np.linspace(grid[0], top, POINTS + 1))
        for s in spaced:
            each = " ".join(f"{e:+.0%}" for e in s.each)
            print(
                f"{s.tokens / 1e6:7.2f}M {s.tokens / n:11.1f} {s.loss:7.4f} {s.mean:+7.0%}   "
                f"{s.low:+.0%} to {s.high:+.0%}; {each}"
            )
    if figure and found:
        draw(family, loss, n, found, figure)


def draw(family: str, loss: str, n: int, found: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    picture, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.4), layout="constrained"
    )
    colors = {
        "stack": "C0",
        "interleave": "C1",
        "zero": "C2",
        "random": "C4",
        "learn": "C5",
    }
    for curve in next(iter(found.values()))[0]:
        left.plot(curve.flops, curve.loss, color="0.35", lw=1, label="from scratch")
    for operator, (_, grown, saved) in found.items():
        for curve in grown:
            left.plot(
                curve.flops,
                curve.loss,
                color=colors[operator],
                lw=1,
                label=f"{operator}, base included",
            )
        x, low, mean, high = np.array(
            [(s.tokens / n, s.low, s.mean, s.high) for s in saved]
        ).T
        count = saved[0].seeds
        shown = "95%, Student's t" if count in T95 else "noise within runs"
        label = f"{operator}, {count} seed{'s' * (count > 1)}; band: {shown}"
        right.plot(x, 100 * mean, color=colors[operator], label=label)
        right.fill_between(
            x, 100 * low, 100 * high, color=colors[operator], alpha=0.2, lw=0
        )
        if count > 1:
            for i in range(count):
                right.plot(
                    x,
                    [100 * s.each[i] for s in saved],
                    color=colors[operator],
                    lw=0.5,
                    alpha=0.6,
                )
    left.set(
        xscale="log",
        xlabel="FLOPs, 6 N D",
        ylabel=f"{loss} loss",
        title=f"{family}: 6 -> 24 layers",
    )
    handles = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    left.legend(handles.values(), handles.keys(), frameon=False)
    right.axhline(0, color="0.35", lw=1)
    right.set(
        xlabel="the baseline's tokens per non-embedding parameter",
        ylabel="FLOPs(scratch) / FLOPs(grown) - 1, %",
    )
    right.set(title=f"saved at equal {loss} loss")
    right.legend(frameon=False)
    picture.savefig(file, dpi=150)


def sweep(family: str) -> None:
    """The learning rates that were tried: validation loss at the most FLOPs that all of them have."""
    for operator in ("scratch", "stack"):
        names = sorted(
            f.name.removesuffix(".validation.jsonl")
            for f in RESULTS.glob(f"{family}_{operator}-*-lr*.val*")
        )
        if not names:
            continue
        curves = {name: last_losses(name) for name in names}
        flops = min(f[-1] for f, _ in curves.values())
        print(f"{family}_{operator}: validation loss at {flops:.3g} FLOPs")
        for name, (f, loss) in sorted(
            curves.items(), key=lambda item: float(item[0].split("-lr")[1])
        ):
            print(f"  {name.split('-lr')[1]:>7}  {loss[f <= flops][-1]:.4f}")


def last_losses(name: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [
        json.loads(line)
        for line in (RESULTS / f"{name}.validation.jsonl").read_text().splitlines()
    ]
    rows = [row for row in rows if row["stage"] == rows[-1]["stage"]]
    return np.array([row["flops"] for row in rows]), np.array(
        [row["loss"] for row in rows]
    )


def keep(run: Path) -> None:
    """Records of all stages in their order, the recipe as run, and of its provenance what a reader needs."""
    stages = sorted(
        (s for s in run.glob("stage-*") if (s / "metrics.jsonl").exists()),
        key=lambda s: s.name,
    )
    for kind in FILES.values():
        text = "".join(
            (stage / f"{kind}.jsonl").read_text()
            for stage in stages
            if (stage / f"{kind}.jsonl").exists()
        )
        (RESULTS / f"{run.name}.{kind}.jsonl").write_text(text)
    shutil.copyfile(run / "recipe.toml", RESULTS / f"{run.name}.recipe")
    provenance = json.loads((run / "provenance.json").read_text())
    del provenance[
        "texts"
    ]  # whole files: of the recipe, which is kept as run, and of the packages
    (RESULTS / f"{run.name}.provenance.json").write_text(
        json.dumps(provenance, indent=1) + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="?", help="such as deep_24x32")
    parser.add_argument("--figure", type=Path, help="picture to write")
    parser.add_argument(
        "--loss", choices=FILES, default="validation", help="default: validation"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="tell the learning rates that were tried"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="run folders to keep",
    )
    arguments = parser.parse_args()
    for run in arguments.keep:
        keep(run)
    if arguments.family and arguments.sweep:
        sweep(arguments.family)
    elif arguments.family:
        compare(arguments.family, arguments.loss, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
