r"""What growing saved in deep_*: from the kept records, at equal validation loss, against tokens per parameter.

    python recipes/experiments/deep_figure.py deep_24x32 --figure recipes/figures/deep_24x32.png
    python recipes/experiments/deep_figure.py deep_24x32 --of stack interleave zero random learn
    python recipes/experiments/deep_figure.py deep_24x32 --of stack_d500K stack stack_d3M       # growth timing
    python recipes/experiments/deep_figure.py deep_24x32 --of stack_g2 stack stack_g8           # growth factor
    python recipes/experiments/deep_figure.py deep_24x32 --loss train   # no text is seen twice: held out, too
    python recipes/experiments/deep_figure.py deep_24x32 --rate 1.2e-2  # the runs at another rate than the recipe's
    python recipes/experiments/deep_figure.py deep_24x32 --long         # to 80 tokens per parameter
    python recipes/experiments/deep_figure.py deep_24x32 --sweep        # the learning rates that were tried
    python recipes/experiments/deep_figure.py deep_8x32 deep_16x32 deep_24x32 \
        --figure recipes/figures/deep_depth.png                         # what depth changes
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
import functools
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stackgrow.cli.options import quiet_at_closed_pipe
from stackgrow.recipe.load import load_recipe
from stackgrow.report.statistics import LEAST_SEEDS, student_t
from stackgrow.run_folder.folder import METRICS, VALIDATION, RunFolder
from stackgrow.run_folder.lines import read_records
from stackgrow.text import numbered

RESULTS = Path(__file__).parent / "results"
SPAN = 0.25  # of log FLOPs: from 1 / 1.28 to 1.28 times as many
FEWEST = 5  # records that a line is drawn through
SETTLED = 100  # steps of the target model: its warm-up
POINTS = 6  # in a table
FINE = 60  # in a picture
VOCABULARY = 2048
NOT_YET = "not yet"
NEVER = -1.0  # the saving of a grown run that never has the baseline's loss


class Way(NamedTuple):
    """One way to grow, as figures show it."""

    label: str
    color: str


WAYS = {  # as recipes are named: deep_24x32_WAY
    "stack": Way("stack", "C0"),
    "interleave": Way("interleave", "C1"),
    "zero": Way("zero", "C2"),
    "random": Way("random", "C4"),
    "learn": Way("learn (LiGO)", "C5"),
    "stack_d500K": Way("stack after 500K tokens", "C6"),
    "stack_d3M": Way("stack after 3M tokens", "C7"),
    "stack_g2": Way("stack, 12 -> 24 layers", "C8"),
    "stack_g8": Way("stack, 3 -> 24 layers", "C9"),
}
FILES = {"validation": VALIDATION, "train": METRICS}
KEPT = "The records of a run, without its checkpoints and the texts that its provenance names."


class Curve(NamedTuple):
    """The losses of one run's last stage, and its tokens, over FLOPs; those of the stages before are counted."""

    flops: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    def smoothed(self, flops: float) -> tuple[float, float]:
        """The loss there, and the standard error of it from the scatter around the line."""
        x = np.log(self.flops / flops)
        distance = np.abs(x)
        fewest = np.sort(distance)[min(FEWEST, len(x)) - 1]
        near = distance <= max(SPAN, fewest)
        design = np.stack([np.ones(near.sum()), x[near]], axis=1)
        inverse = np.linalg.inv(design.T @ design)
        fitted = inverse @ design.T @ self.loss[near]
        scatter = self.loss[near] - design @ fitted
        variance = (scatter @ scatter) / (near.sum() - 2)
        return float(fitted[0]), float(np.sqrt(inverse[0, 0] * variance))

    def slope(self, flops: float) -> float:
        """How the smoothed loss falls there with the logarithm of FLOPs."""
        step = 1.1
        above, _ = self.smoothed(flops * step)
        below, _ = self.smoothed(flops / step)
        return (above - below) / (2 * np.log(step))

    def first(self, loss: float) -> tuple[float, float]:
        """The FLOPs at which the smoothed loss first is ``loss``, and the standard error of their logarithm: infinite
        where it never is, NaN where it is before the curve begins."""
        grid = np.geomspace(self.flops[0], self.flops[-1], 400)
        values = np.array([self.smoothed(flops)[0] for flops in grid])
        below = np.flatnonzero(values <= loss)
        if not below.size:
            return np.inf, np.nan
        if below[0] == 0:
            return np.nan, np.nan
        i = below[0]
        share = (values[i - 1] - loss) / (values[i - 1] - values[i])
        found = float(grid[i - 1] * (grid[i] / grid[i - 1]) ** share)
        _, error = self.smoothed(found)
        return found, abs(error / self.slope(found))


class Saving(NamedTuple):
    """What was saved where the baseline has had so many ``tokens``; ``each``: by each seed, -1 where the grown run
    never has the baseline's loss. Where one never has, there is no mean over seeds: NaN."""

    tokens: float
    mean: float
    low: float
    high: float
    seeds: int
    each: list[float]
    loss: float

    @property
    def known(self) -> bool:
        """Whether every grown run came to the loss, and there is a mean."""
        return not np.isnan(self.mean)

    def interval(self) -> str:
        return f"{self.low:+.0%} to {self.high:+.0%}"

    def told_each(self) -> str:
        return " ".join(told_of_seed(saved) for saved in self.each)


class Compared(NamedTuple):
    """The runs of one way to grow and their baselines, seed by seed."""

    seeds: list[str]
    scratch: list[Curve]
    grown: list[Curve]

    def savings(self, points: int) -> list[Saving]:
        """At ``points`` numbers of tokens, evenly from the first settled loss to the end of the shortest baseline."""
        top = min(curve.tokens[-1] for curve in self.scratch)
        grid = np.linspace(self.scratch[0].tokens[0], top, points)
        return list(savings(self.scratch, self.grown, grid))


def records(run: str, loss: str) -> list[dict[str, Any]]:
    """Those of the last stage that has any."""
    of_stages = [
        read_records(stage.record_file(FILES[loss]))
        for stage in RunFolder(RESULTS / run).stages()
    ]
    return [rows for rows in of_stages if rows][-1]


@functools.cache  # runs from scratch are compared with each way to grow
def read(run: str, loss: str = "validation") -> Curve:
    rows = [row for row in records(run, loss) if row["step"] >= SETTLED]
    columns = []
    for key in ("flops", "tokens", "loss"):
        columns.append(np.array([row[key] for row in rows], float))
    flops, tokens, losses = columns
    return Curve(flops, tokens, losses)


def seeds(recipe: str, ending: str = "") -> list[str]:
    """The seeds of which records are kept, of runs as the recipe has them or with an ending: RECIPE-SEED-lrRATE at
    another learning rate, RECIPE-SEED-long of those that went on."""
    found = []
    for run in RESULTS.glob(f"{recipe}-*{ending}"):
        seed = run.name.removeprefix(f"{recipe}-").removesuffix(ending)
        if seed.isdigit():
            found.append(seed)
    return sorted(found, key=int)


def savings(
    scratch: Sequence[Curve], grown: Sequence[Curve], tokens: Sequence[float]
) -> Iterator[Saving]:
    """The saving of each pair at each number of tokens of the baseline, from where the curves of all grown runs begin
    on."""
    for count in tokens:
        logs, errors, losses = [], [], []
        for base, run in zip(scratch, grown, strict=True):
            flops = float(np.interp(count, base.tokens, base.flops))
            loss, error = base.smoothed(flops)
            other, other_error = run.first(loss)
            logs.append(np.log(flops / other) if np.isfinite(other) else -other)
            errors.append(np.hypot(error / base.slope(flops), other_error))
            losses.append(loss)
        if np.any(np.isnan(logs)):
            continue
        mean, half = np.nan, np.nan
        if np.all(np.isfinite(logs)):
            mean = float(np.mean(logs))
            half = 1.96 * float(np.mean(errors))
            if len(logs) >= LEAST_SEEDS:
                half = half_of_interval(logs)
        yield Saving(
            tokens=count,
            mean=float(np.expm1(mean)),
            low=float(np.expm1(mean - half)),
            high=float(np.expm1(mean + half)),
            seeds=len(logs),
            each=[float(np.expm1(value)) for value in logs],
            loss=float(np.mean(losses)),
        )


def half_of_interval(of_seeds: Sequence[float]) -> float:
    """Of 95%, by the spread between seeds."""
    count = len(of_seeds)
    spread = float(np.std(of_seeds, ddof=1))
    return float(student_t(count - 1)) * spread / np.sqrt(count)


def parameters(family: str) -> int:
    """Non-embedding parameters of the target, from FLOPs per token: 6 (N + head)."""
    any_run = next(RESULTS.glob(f"{family}_scratch-1*"))
    row = records(any_run.name, "train")[-1]
    width = int(family.split("x")[1])
    return round(row["flops"] / row["tokens"] / 6) - VOCABULARY * width


def compared(family: str, way: str, loss: str, ending: str = "") -> Compared | None:
    """The seeds of which both runs are kept; None where there is none."""
    baselines = seeds(f"{family}_scratch", ending)
    pairs = [seed for seed in seeds(f"{family}_{way}", ending) if seed in baselines]
    if not pairs:
        return None
    scratch = [read(f"{family}_scratch-{seed}{ending}", loss) for seed in pairs]
    grown = [read(f"{family}_{way}-{seed}{ending}", loss) for seed in pairs]
    return Compared(seeds=pairs, scratch=scratch, grown=grown)


def kind_of_interval(count: int) -> str:
    if count >= LEAST_SEEDS:
        return "95%, Student's t"
    return "noise within the runs alone, none over seeds"


def tell(family: str, runs_of_ways: dict[str, Compared], loss: str) -> None:
    """Prints what was saved, and the losses at the end, as tables in Markdown."""
    size = parameters(family)
    print()
    if len(runs_of_ways) == 1:
        [(way, runs)] = runs_of_ways.items()
        print(f"{family}, {WAYS[way].label}: saved at equal {loss} loss\n")
        print_table(each_seed(runs, size))
    else:
        print(f"{family}: saved at equal {loss} loss (95%, Student's t)\n")
        print_table(ways_beside_one_another(runs_of_ways, size))
    print(f"\n{loss} loss at the end, smoothed\n")
    print_table(ends(runs_of_ways))


def each_seed(runs: Compared, size: int) -> list[list[str]]:
    """What one way saved, seed by seed; ``size``: parameters of the target."""
    interval = kind_of_interval(len(runs.seeds))
    names = ", ".join(runs.seeds)
    seed_or_seeds = "seed" if len(runs.seeds) == 1 else "seeds"
    header = [
        "the baseline's tokens",
        "per parameter",
        "loss",
        "saved",
        interval,
        f"{seed_or_seeds} {names}",
    ]
    rows = [header]
    for saving in runs.savings(POINTS + 1):
        mean, between = "-", "-"
        if saving.known:
            mean, between = f"{saving.mean:+.0%}", saving.interval()
        rows.append(
            [
                f"{saving.tokens / 1e6:.2f}M",
                f"{saving.tokens / size:.1f}",
                f"{saving.loss:.3f}",
                mean,
                between,
                saving.told_each(),
            ]
        )
    return rows


def ways_beside_one_another(
    runs_of_ways: dict[str, Compared], size: int
) -> list[list[str]]:
    """The mean of each way over its seeds, with its interval; each seed where they are too few for one, or one of them
    never had the loss; NOT_YET where its target has not had its warm-up."""
    header = ["tokens per parameter"]
    cells: dict[float, dict[str, str]] = {}  # by the baseline's tokens, then by way
    for way, runs in runs_of_ways.items():
        header.append(f"{WAYS[way].label}, {numbered(len(runs.seeds), 'seed')}")
        for saving in runs.savings(POINTS + 1):
            cell = saving.told_each()
            if saving.known and saving.seeds >= LEAST_SEEDS:
                cell = f"{saving.mean:+.0%} ({saving.interval()})"
            cells.setdefault(saving.tokens, {})[way] = cell

    rows = [header]
    for tokens, of_ways in sorted(cells.items()):
        row = [f"{tokens / size:.1f}"]
        for way in runs_of_ways:
            row.append(of_ways.get(way, NOT_YET))
        rows.append(row)
    return rows


def ends(runs_of_ways: dict[str, Compared]) -> list[list[str]]:
    """The smoothed loss of each run at its end, and by how much that of its twin from scratch lies above it; all end
    with the same FLOPs."""
    losses: dict[str, dict[str, float]] = {"scratch": {}}
    for way, runs in runs_of_ways.items():
        losses[WAYS[way].label] = {}
        for seed, scratch, grown in zip(
            runs.seeds, runs.scratch, runs.grown, strict=True
        ):
            losses["scratch"][seed], _ = scratch.smoothed(scratch.flops[-1])
            losses[WAYS[way].label][seed], _ = grown.smoothed(grown.flops[-1])
    names = sorted(losses["scratch"], key=int)
    rows = [["", *(f"seed {name}" for name in names), "below scratch's, mean (95%)"]]
    for label, of_seeds in losses.items():
        cells = []
        for name in names:
            cells.append(f"{of_seeds[name]:.3f}" if name in of_seeds else "not run")
        below = [losses["scratch"][seed] - loss for seed, loss in of_seeds.items()]
        rows.append([label, *cells, "" if label == "scratch" else told_below(below)])
    return rows


def told_below(below: Sequence[float]) -> str:
    mean = float(np.mean(below))
    if len(below) < LEAST_SEEDS:
        return f"{mean:.3f}"
    half = half_of_interval(below)
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """In Markdown, as it stands in recipes/RESULTS.md."""
    header, *others = rows
    print(f"| {' | '.join(header)} |")
    print("|---" * len(header) + "|")
    for row in others:
        print(f"| {' | '.join(row)} |")


def told_of_seed(saved: float) -> str:
    return "never" if saved == NEVER else f"{saved:+.0%}"


def two_panels() -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    picture, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 3.4), layout="constrained"
    )
    return picture, left, right


def draw_savings(
    axes: Any, runs: Compared, size: int, color: str, label: str, thin_lines: bool
) -> None:
    """The mean over seeds with its band, and with ``thin_lines`` each seed, against tokens per parameter."""
    found = runs.savings(FINE)
    if not found:
        return
    x = [saving.tokens / size for saving in found]
    low = [100 * saving.low for saving in found]
    high = [100 * saving.high for saving in found]
    count = len(runs.seeds)
    text = f"{label}, {numbered(count, 'seed')}\nband: {kind_of_interval(count)}"
    axes.plot(x, [100 * saving.mean for saving in found], color=color, label=text)
    axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    if count > 1 and thin_lines:
        for i in range(count):
            seed = [
                100 * saving.each[i] if saving.each[i] != NEVER else np.nan
                for saving in found
            ]
            axes.plot(x, seed, color=color, lw=0.5, alpha=0.6)


def draw(family: str, loss: str, runs_of_ways: dict[str, Compared], file: Path) -> None:
    """Losses over FLOPs, and what was saved over tokens per parameter."""
    picture, left, right = two_panels()
    size = parameters(family)
    only_way = len(runs_of_ways) == 1
    labelled = set()

    def line(curve: Curve, color: str, label: str) -> None:
        left.plot(
            curve.flops,
            curve.loss,
            color=color,
            lw=1,
            label=None if label in labelled else label,
        )
        labelled.add(label)

    baselines: dict[str, Curve] = {}
    for runs in runs_of_ways.values():
        baselines.update(zip(runs.seeds, runs.scratch, strict=True))
    for curve in baselines.values():
        line(curve, "0.35", "from scratch")
    for way, runs in runs_of_ways.items():
        label, color = WAYS[way]
        for curve in runs.grown:
            line(curve, color, f"{label}, base included")
        draw_savings(right, runs, size, color, label, thin_lines=only_way)
    left.set(
        xscale="log",
        xlabel="FLOPs, 6 N D",
        ylabel=f"{loss} loss",
        title=f"{family}: growth in depth",
    )
    left.legend(frameon=False)
    finish_savings(right, loss)
    if not only_way:
        legend_below(picture, right)
    picture.savefig(file, dpi=150)


def draw_sizes(families: Sequence[str], loss: str, ending: str, file: Path) -> None:
    """What stacking saved at several sizes: over tokens per parameter, and over the baseline's tokens."""
    picture, left, right = two_panels()
    for number, family in enumerate(families):
        runs = compared(family, "stack", loss, ending)
        if runs is None:
            continue
        layers, width = family.removeprefix("deep_").split("x")
        label = f"{int(layers) // 4} -> {layers} layers x {width}"
        size, color = parameters(family), f"C{number}"
        draw_savings(left, runs, size, color, label, thin_lines=True)
        draw_savings(right, runs, 10**6, color, label, thin_lines=True)
    finish_savings(left, loss)
    finish_savings(right, loss)
    right.get_legend().remove()
    right.set(xlabel="the baseline's tokens, millions", ylabel="")
    legend_below(picture, left)
    picture.savefig(file, dpi=150)


def legend_below(picture: Any, axes: Any) -> None:
    """Puts the legend of ``axes`` under the picture, where it covers no curve."""
    axes.get_legend().remove()
    lines, labels = axes.get_legend_handles_labels()
    picture.legend(
        lines, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=6
    )


def finish_savings(axes: Any, loss: str) -> None:
    axes.axhline(0, color="0.35", lw=1)
    axes.set(
        xlabel="the baseline's tokens per non-embedding parameter",
        ylabel="FLOPs(scratch) / FLOPs(grown) - 1, %",
        title=f"saved at equal {loss} loss",
    )
    axes.legend(frameon=False, loc="upper right")  # curves fall


def sweep(family: str) -> None:
    """The learning rates that were tried with seed 1: validation loss at the most FLOPs that all runs have, and at the
    end of those that went on to it."""
    table: list[list[str]] = []
    for operator in ("scratch", "stack"):
        curves = curves_of_rates(f"{family}_{operator}-1")
        if not curves:
            print(f"{family}_{operator}: no records of it are kept", file=sys.stderr)
            return
        rates = sorted(curves)
        fewest = min(rows[-1][0] for rows in curves.values())
        most = max(rows[-1][0] for rows in curves.values())
        early, late = [operator, f"{fewest:.2e}"], ["", f"{most:.2e}, the end"]
        for rate in rates:
            losses = [loss for flops, loss in curves[rate] if flops <= fewest]
            early.append(f"{losses[-1]:.3f}")
            last_flops, last = curves[rate][-1]
            late.append(f"{last:.3f}" if last_flops > 0.99 * most else "not run")
        if not table:
            table.append(["", "FLOPs", *(f"rate {rate:g}" for rate in rates)])
        table += [early, late]
    print(f"\n{family}, seed 1: validation loss\n")
    print_table(table)


def curves_of_rates(run: str) -> dict[float, list[tuple[float, float]]]:
    """FLOPs and validation loss of a run as its recipe has it, and at other learning rates."""
    curves = {}
    for folder in [*RESULTS.glob(run), *RESULTS.glob(f"{run}-lr*")]:
        recipe = load_recipe(RunFolder(folder).recipe_file, trusted=True)
        rows = records(folder.name, "validation")
        curves[recipe.train.learning_rate] = [
            (row["flops"], row["loss"]) for row in rows
        ]
    return curves


def keep(run: RunFolder) -> None:
    """Copies the recipe as run, the records of every stage, and of the provenance what a reader needs."""
    kept = RunFolder(RESULTS / run.path.name)
    shutil.rmtree(kept.path, ignore_errors=True)
    kept.path.mkdir()
    shutil.copyfile(run.recipe_file, kept.recipe_file)
    # The texts are whole files: of the recipe, which is kept as run, and of the packages.
    provenance = run.provenance()
    del provenance["texts"]
    provenance["kept"] = KEPT
    kept.provenance_file.write_text(
        json.dumps(provenance, indent=1) + "\n", encoding="utf-8"
    )
    for stage in run.stages():
        for name in FILES.values():
            if not stage.record_file(name).exists():
                continue
            target = kept.stage(stage.name).record_file(name)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(stage.record_file(name), target)


@quiet_at_closed_pipe
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "families",
        nargs="*",
        help="such as deep_24x32; several: what their size changes",
    )
    parser.add_argument(
        "--of",
        nargs="+",
        choices=WAYS,
        default=["stack"],
        metavar="WAY",
        help=f"ways to grow: {', '.join(WAYS)} (default: stack)",
    )
    parser.add_argument("--figure", type=Path, help="picture to write")
    parser.add_argument(
        "--loss", choices=FILES, default="validation", help="default: validation"
    )
    parser.add_argument(
        "--rate", help="that the runs were made at, where it is not their recipe's"
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
    parser.add_argument(
        "--long",
        action="store_true",
        help="those that went on to 80 tokens per parameter",
    )
    arguments = parser.parse_args(argv)
    ending = "-long" if arguments.long else ""
    if arguments.rate:
        ending = f"-lr{arguments.rate}"
    for run in arguments.keep:
        keep(RunFolder(run))
    for family in arguments.families:
        if arguments.sweep:
            sweep(family)
            continue
        runs_of_ways = {}
        for way in arguments.of:
            runs = compared(family, way, arguments.loss, ending)
            if runs is None:
                print(f"{family}_{way}: no records of it are kept", file=sys.stderr)
                continue
            runs_of_ways[way] = runs
        if not runs_of_ways:
            continue
        tell(family, runs_of_ways, arguments.loss)
        if arguments.figure and len(arguments.families) == 1:
            draw(family, arguments.loss, runs_of_ways, arguments.figure)
    if arguments.figure and len(arguments.families) > 1:
        draw_sizes(arguments.families, arguments.loss, ending, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
