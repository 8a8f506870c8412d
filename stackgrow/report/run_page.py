"""What the page says of one run, as plain values for the template."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from stackgrow.plan.stages import GrowStage, Plan, Stage, TrainStage
from stackgrow.report.figure import series_svg
from stackgrow.report.methods import FROM_SCRATCH, method_of
from stackgrow.report.plan_table import compact_map
from stackgrow.report.records import read_columns
from stackgrow.run_folder.folder import RunFolder, StageFolder
from stackgrow.run_folder.found import plan_of_run
from stackgrow.run_folder.sealed_records import edited_records
from stackgrow.text import clock, human

STAGE_HEAD = (
    "stage",
    "parameters",
    "tokens",
    "steps",
    "FLOPs",
    "loss",
    "validation",
    "tok/s",
    "time",
)
MAP_WIDTH = 620.0  # pixels
NUMBERED_FROM = 14  # pixels: narrower cells have no room for a layer's number


@dataclass(frozen=True)
class Block:
    """A stage in the timeline: as wide as its FLOPs; a growth, which has none, as wide as its words."""

    above: str
    below: str
    share: float | None


@dataclass(frozen=True)
class Cell:
    """A layer in the picture of a layer map; ``hue``: of its source layer."""

    x: float
    middle: float
    y: int
    width: float
    hue: int
    layer: int


@dataclass(frozen=True)
class LayerMap:
    stage: str
    change: str
    groups: str
    width: int
    numbered: bool
    cells: list[Cell]


@dataclass(frozen=True)
class RecipeLine:
    text: str
    edited: bool


@dataclass(frozen=True)
class RunPage:
    """Everything that the page says of one run; ``stages`` are rows under a head, ``pictures`` <svg> elements."""

    name: str
    status: str
    verdict: str
    size: str
    warnings: list[str]
    blocks: list[Block]
    stages: list[tuple[str, ...]]
    layer_maps: list[LayerMap]
    pictures: list[Markup]
    facts: list[tuple[str, str]]
    recipe: list[RecipeLine]
    edited: bool


def run_page(run: Path) -> RunPage:
    """What is known of the run in folder ``run``."""
    plan = plan_of_run(run)
    folder = RunFolder(run)
    provenance = folder.stated_provenance()
    recipe = list(_recipe_lines(folder, _overridden(provenance)))
    rows = [_stage_row(folder.stage(stage.name), stage) for stage in plan.train_stages]
    maps = [_layer_map(stage) for stage in plan.grow_stages if stage.layer_map]
    return RunPage(
        name=run.absolute().name,
        status=_status(folder, plan, provenance),
        verdict=_verdict(folder, plan),
        size=_size(plan),
        warnings=list(_warnings(folder, plan, provenance)),
        blocks=[_block(stage) for stage in plan.stages],
        stages=[STAGE_HEAD, *rows],
        layer_maps=maps,
        pictures=list(_pictures(folder, plan)),
        facts=list(_facts(provenance)),
        recipe=recipe,
        edited=any(line.edited for line in recipe),
    )


def sessions_of(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """The sessions that are entries; a stranger's file may hold anything."""
    sessions = provenance.get("sessions")
    if not isinstance(sessions, list):
        return []
    return [session for session in sessions if isinstance(session, dict)]


def table_of(entry: dict[str, Any], name: str) -> dict[str, Any]:
    """The table ``name`` of an entry; {} where it is none."""
    value = entry.get(name)
    return value if isinstance(value, dict) else {}


def _status(folder: RunFolder, plan: Plan, provenance: dict[str, Any]) -> str:
    """Whether the run is finished, since when, and its seed."""
    sessions = sessions_of(provenance)
    ended = table_of(sessions[-1], "ended") if sessions else {}
    date = str(
        ended.get("at") or (sessions[-1].get("started") if sessions else "")
    ).replace("T", " ")[:16]
    if folder.holds_records_only():
        status = "records of a run, kept without it"
    elif all(folder.stage(stage.name).is_done() for stage in plan.stages):
        status = f"finished {date}".strip()
    elif ended:
        status = f"not finished: {ended.get('how')}, {date}"
    else:
        status = (
            f"not finished: running, or killed; begun {date or 'at an unknown time'}"
        )
    return f"{status}; seed {plan.recipe.seed}; recipe {plan.recipe.name}"


def _verdict(folder: RunFolder, plan: Plan) -> str:
    """One sentence on where the run came to."""
    method = method_of(plan)
    last = plan.train_stages[-1]
    origin = FROM_SCRATCH if method == FROM_SCRATCH else f"grown by {method}"
    model = f"{human(plan.recipe.model.parameters())} parameters, {origin}"
    stage = folder.stage(last.name)
    validation = read_columns(stage.validation_file, ("tokens", "loss"))
    training = read_columns(stage.metrics_file, ("tokens", "loss"))
    for kind, (tokens, loss) in (("validation", validation), ("training", training)):
        if len(loss):
            return f"{model}: {kind} loss {loss[-1]:.4f} after {human(tokens[-1])} of {human(plan.tokens)} tokens."
    return f"{model}: the target model has no records yet."


def _size(plan: Plan) -> str:
    model = plan.recipe.model
    last = plan.train_stages[-1]
    text = (
        f"{last.model.n_layers} layers of width {model.dim}, {human(plan.tokens)} tokens planned, "
        f"{plan.flops:.3g} FLOPs (6 N D, N without the input embedding)"
    )
    if len(plan.train_stages) > 1:
        text += f", {plan.base_share:.1%} of them before the last growth"
    return text


def _warnings(
    folder: RunFolder, plan: Plan, provenance: dict[str, Any]
) -> Iterator[str]:
    """What a reader of the results should know."""
    kept = provenance.get(
        "kept"
    )  # what is known and what is not of records that were kept without their run
    if isinstance(kept, str):
        yield kept
    for line in edited_records(folder):
        yield f"{line} (stackgrow audit)"
    unfinished = [
        stage.name for stage in plan.stages if not folder.stage(stage.name).is_done()
    ]
    if unfinished and not kept:
        yield f"not finished: {', '.join(unfinished)}"
    sessions = sessions_of(provenance)
    if len(sessions) > 1:
        worlds = ", ".join(str(session.get("world_size")) for session in sessions)
        yield f"{len(sessions)} sessions, on {worlds} ranks"
    codes = [table_of(session, "code") for session in sessions]
    if len({str(code.get("commit")) for code in codes}) > 1:
        yield "the sessions ran different commits of stackgrow"
    if any("dirty_sha256" in code for code in codes):
        yield "the code had changes that are in no commit"
    for stage in folder.stages():
        for path in stage.set_aside():
            yield f"set aside as incomplete or damaged: {path.relative_to(folder.path)}"
    yield from plan.notes


def _block(stage: Stage) -> Block:
    if isinstance(stage, GrowStage):
        return Block(stage.operator, stage.change, share=None)
    learns = "learns maps, " if stage.learns_maps else ""
    above = f"{learns}{stage.model.n_layers} layers"
    return Block(
        above, f"{human(stage.tokens)} tokens", share=float(f"{stage.flops:.6g}")
    )


def _stage_row(folder: StageFolder, stage: TrainStage) -> tuple[str, ...]:
    (losses,) = read_columns(folder.metrics_file, ("loss",))
    (rates,) = read_columns(folder.metrics_file, ("tps",))
    (validation,) = read_columns(folder.validation_file, ("loss",))
    done = folder.done()
    return (
        stage.name,
        human(stage.model.parameters()),
        human(stage.tokens),
        str(stage.steps),
        f"{stage.flops:.3g}",
        f"{losses[-1]:.4f}" if len(losses) else "-",
        f"{validation[0]:.4f} to {validation[-1]:.4f}" if len(validation) else "-",
        human(np.median(rates)) if len(rates) else "-",
        clock(done["seconds"])
        if done and isinstance(done.get("seconds"), int | float)
        else "-",
    )


def _layer_map(stage: GrowStage) -> LayerMap:
    """Source layers above target layers, each target layer in the colour of the one that it is made from."""
    assert stage.layer_map is not None
    rows = [list(range(stage.source.n_layers)), list(stage.layer_map)]

    # As wide as the page allows, with the longer of the two rows in it.
    longest = max(len(row) for row in rows)
    width = min(40.0, MAP_WIDTH / longest)
    cells = []
    for y, row in zip((0, 42), rows, strict=True):  # pixels from the top
        for position, layer in enumerate(row):
            cell = Cell(
                x=round(position * width, 2),
                middle=round((position + 0.5) * width, 2),
                y=y,
                width=round(width - 1, 2),
                hue=round(210 + 300 * layer / max(stage.source.n_layers, 2)),
                layer=layer,
            )
            cells.append(cell)
    return LayerMap(
        stage.name,
        stage.change,
        compact_map(stage.layer_map),
        width=round(width * longest),
        numbered=width >= NUMBERED_FROM,
        cells=cells,
    )


def _pictures(folder: RunFolder, plan: Plan) -> Iterator[Markup]:
    """What is recorded beside the training loss, over tokens; what was not recorded is left out."""
    for name, label in (
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("tps", "tokens per second"),
    ):
        lines = []
        for stage in plan.train_stages:
            tokens, values = read_columns(
                folder.stage(stage.name).metrics_file, ("tokens", name)
            )
            if len(values):
                lines.append((tokens, values))
        if lines:
            positive = all((values > 0).all() for _, values in lines)
            yield Markup(
                series_svg(
                    lines, label, logarithmic_values=name == "grad_norm" and positive
                )
            )


def _facts(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What identifies the run and where it ran, without names of machines and folders."""
    yield "recipe", f"SHA-256 {provenance.get('recipe_hash', 'unknown')}"
    yield (
        "data",
        f"SHA-256 {table_of(provenance, 'data').get('manifest_hash', 'unknown')}",
    )
    for number, session in enumerate(sessions_of(provenance), start=1):
        commit = table_of(session, "code").get("commit", "unknown")
        packages = ", ".join(
            f"{name} {version}"
            for name, version in table_of(session, "packages").items()
        )
        devices = _devices(table_of(session, "hardware"))
        ranks = f"ranks: {session.get('world_size')}"
        yield (
            f"session {number}",
            f"{session.get('started')}; {devices}; {ranks}; commit {commit}; {packages}",
        )


def _devices(hardware: dict[str, Any]) -> str:
    """``8 x NVIDIA H100``, or the processors of a machine without GPUs."""
    gpus = hardware.get("gpus")
    if not isinstance(gpus, list) or not gpus:
        return (
            f"{hardware.get('cpus')} x {hardware.get('cpu', hardware.get('machine'))}"
        )
    names = [str(name) for name in gpus]
    if len(names) == 1:
        return names[0]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _overridden(provenance: dict[str, Any]) -> set[str]:
    """The keys that any session set on the command line."""
    keys = set()
    for session in sessions_of(provenance):
        overrides = session.get("overrides")
        for override in overrides if isinstance(overrides, list) else []:
            key, _, _ = str(override).partition("=")
            keys.add(key.strip())
    return keys


def _recipe_lines(folder: RunFolder, overridden: set[str]) -> Iterator[RecipeLine]:
    """The resolved recipe, of which each line that sets a key in ``overridden`` counts as edited."""
    # The table that a line stands in, and how many there were so far of [[growth]] and others that are repeated.
    table = ""
    counts: dict[str, int] = {}
    for line in folder.recipe_file.read_text(encoding="utf-8").splitlines():
        heading = re.fullmatch(r"\[+([^\[\]]+)\]+", line)
        if heading:
            table = heading[1]
            if line.startswith("[["):
                counts[table] = counts.get(table, 0) + 1

        # The key's name as a user gives it to --set: growth[0].factor, train.warmup, seed.
        parent, _, rest = table.partition(".")
        if parent in counts:  # a table inside of the last [[growth]] too
            dotted = f"{parent}[{counts[parent] - 1}]" + (f".{rest}" if rest else "")
        else:
            dotted = table
        key = line.partition(" = ")[0]
        edited = not heading and (f"{dotted}.{key}" if dotted else key) in overridden
        yield RecipeLine(line, edited)
