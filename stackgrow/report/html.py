"""report.html of one run or of several beside each other: a single file that needs nothing else, for screens of any
width, light and dark, and for paper."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from stackgrow import seal
from stackgrow.errors import MissingExtraError
from stackgrow.plan.stages import GrowStage, Plan, Stage, TrainStage
from stackgrow.report.compare import HEAD, SMOOTHING, Comparison, compare, evaluation_rows, speed_up_rows, verdict
from stackgrow.report.curves import DEFINITION
from stackgrow.report.figure import PANELS, panel_svg
from stackgrow.report.plan_table import compact_map
from stackgrow.run_folder.folder import RunFolder
from stackgrow.run_folder.found import plan_of_run
from stackgrow.run_folder.lines import read_records
from stackgrow.text import clock, human, short

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --faint: #59636e; --line: #d0d7de; --soft: #f3f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14171a; --faint: #9aa4af; --line: #3a424b; --soft: #20252a } }
* { box-sizing: border-box }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
p.faint, figcaption, th { color: var(--faint); font-weight: normal } figcaption, table, pre { font-size: .85rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
table.facts td { text-align: left; vertical-align: top }
table.facts td + td { white-space: normal }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem }
figure { margin: .5rem 0 } svg { max-width: 100%; height: auto; display: block }
.timeline { display: flex; flex-wrap: wrap; gap: 3px; align-items: stretch }
.timeline div { padding: .4rem .6rem; background: var(--soft); border-top: 4px solid #2f7ed8; font-size: .85rem }
.timeline div.grow { border-top-color: #e07b1f; flex-grow: 0 }
pre { background: var(--soft); padding: .8rem; white-space: pre-wrap }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --faint: #444; --line: #bbb; --soft: #f3f5f7 }
  body { font-size: 9pt; padding: 0 } figure, tr { break-inside: avoid } h2, h3 { break-after: avoid }
  .wide { overflow-x: visible }
  th, td { padding: .15rem .35rem } }
"""


def write_report(runs: Sequence[Path], target: Path) -> None:
    """Writes the report of ``runs``, the first being the baseline of the others, to file ``target``.

    Raises:
        RunError: a folder that is no run or without records, or matplotlib is not installed.
        RecipeError: a run's recipe.toml cannot be read.
    """
    comparison = compare(runs)
    title = " and ".join(curve.name for curve in comparison.curves)
    parts = [f"<h1>{escape(title)}</h1>"]
    if len(runs) == 1:
        parts += [*_overview(runs[0]), *_together(comparison), *_identity(runs[0])]
    else:
        parts += _together(comparison)
        for run in runs:
            parts += [f"<h2>{escape(run.absolute().name)}</h2>", *_overview(run), *_identity(run)]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    text = (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )
    seal.write_text(target, text)


def finish_report(run: Path) -> str:
    """Writes the report of a run that has just ended, where matplotlib is there; returns a line that says where it is.
    A failure is logged: the run has succeeded."""
    target = RunFolder(run).report_file
    try:
        write_report([run], target)
    except MissingExtraError as error:
        return f"report       none: {error}"
    except Exception:
        logging.getLogger(__name__).exception("the report of %s cannot be written", run)
        return "report       none: see the message above"
    return f"report       {short(target)}"


def _together(comparison: Comparison) -> Iterator[str]:
    """The curves, and for several runs the speed-ups over the first; the benchmarks."""
    several = len(comparison.curves) > 1
    if several:
        yield f"<h2>Against {escape(comparison.baseline.name)}</h2>"
        yield f'<p class="faint">{escape(DEFINITION)}</p>'
    for curve in comparison.curves[1:]:
        yield f"<h3>{escape(curve.name)}</h3><p>{escape(verdict(comparison, curve))}</p>"
        if rows := speed_up_rows(comparison.speed_ups.get(curve.name, [])):
            yield _table([HEAD, *rows])
    panels = PANELS if any(comparison.speed_ups.values()) else PANELS[:2]
    pictures = "".join(f"<figure>{panel_svg(comparison, panel)}</figure>" for panel in panels)
    caption = (
        f"{SMOOTHING[comparison.loss]}; dashed: stages before the target model's; dots: where a grown stage begins"
    )
    yield f'<h2>Loss</h2><div class="panels">{pictures}</div><p class="faint">{escape(caption)}</p>'
    if comparison.evaluations:
        transposed = list(zip(*evaluation_rows(comparison.evaluations), strict=True))
        yield f"<h2>Benchmarks</h2>{_table(transposed)}"


def _overview(run: Path) -> Iterator[str]:
    """What was trained, what a reader should know of it, and how it grew."""
    plan = plan_of_run(run)
    yield f'<p class="faint">{escape(_summary(plan))}</p>'
    if found := list(_warnings(run, plan, RunFolder(run).provenance())):
        items = "".join(f"<li>{escape(warning)}</li>" for warning in found)
        yield f"<h3>To be noted</h3><ul>{items}</ul>"
    yield f'<h3>Stages</h3><div class="timeline">{"".join(map(_block, plan.stages))}</div>'
    yield _table([STAGE_HEAD, *(_stage_row(run, stage) for stage in plan.train_stages)])
    for stage in plan.grow_stages:
        if stage.layer_map:
            yield f"<h3>{escape(stage.name)}: {escape(stage.change)}</h3>{_map_figure(stage)}"


def _identity(run: Path) -> Iterator[str]:
    """What ran, on what, from what."""
    facts = _facts(RunFolder(run).provenance())
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts)
    yield f'<h3>Provenance</h3><div class="wide"><table class="facts">{rows}</table></div>'
    yield f"<h3>Recipe</h3><pre>{escape((run / 'recipe.toml').read_text())}</pre>"


def _summary(plan: Plan) -> str:
    model, last = plan.recipe.model, plan.train_stages[-1]
    grown = f", {plan.base_share:.1%} of them before the last growth" if len(plan.train_stages) > 1 else ""
    return (
        f"{human(model.parameters())} parameters ({last.model.n_layers} layers of width {model.dim}), "
        f"{human(plan.tokens)} tokens, {plan.flops:.3g} FLOPs (6 N D){grown}"
    )


def _warnings(run: Path, plan: Plan, provenance: dict[str, Any]) -> Iterator[str]:
    """What a reader of the results should know."""
    unfinished = [stage.name for stage in plan.stages if not RunFolder(run).stage(stage.name).is_done()]
    if unfinished:
        yield f"not finished: {', '.join(unfinished)}"
    sessions = provenance.get("sessions", [])
    if len(sessions) > 1:
        worlds = ", ".join(str(s.get("world_size")) for s in sessions)
        yield f"{len(sessions)} sessions, on {worlds} ranks"
    if len({s.get("code", {}).get("commit") for s in sessions}) > 1:
        yield "the sessions ran different commits of stackgrow"
    if any("dirty_sha256" in s.get("code", {}) for s in sessions):
        yield "the code had changes that are in no commit"
    moved_aside = [path for stage in RunFolder(run).stages() for path in sorted(stage.quarantine.glob("*"))]
    for path in moved_aside:
        yield f"set aside as incomplete or damaged: {path.relative_to(run)}"
    yield from plan.notes


def _block(stage: Stage) -> str:
    if isinstance(stage, GrowStage):
        return f'<div class="grow">{escape(stage.operator)}<br>{escape(stage.change)}</div>'
    what = "learns maps, " if stage.learns_maps else ""
    grow = f"flex-grow: {stage.flops:.6g}"
    return f'<div style="{grow}">{what}{stage.model.n_layers} layers<br>{human(stage.tokens)} tokens</div>'


STAGE_HEAD = ("stage", "parameters", "tokens", "steps", "FLOPs", "loss", "validation", "tok/s", "time")


def _stage_row(run: Path, stage: TrainStage) -> tuple[str, ...]:
    metrics, validation = (read_records(run / stage.name / f"{name}.jsonl") for name in ("metrics", "validation"))
    done = RunFolder(run).stage(stage.name).done() or {}
    spans = f"{validation[0]['loss']:.4f} to {validation[-1]['loss']:.4f}" if validation else "-"
    rates = sorted(record["tps"] for record in metrics)
    return (
        stage.name, human(stage.model.parameters()), human(stage.tokens), str(stage.steps), f"{stage.flops:.3g}",
        f"{metrics[-1]['loss']:.4f}" if metrics else "-", spans,
        human(rates[len(rates) // 2]) if rates else "-", clock(done["seconds"]) if done else "-",
    )  # fmt: skip


def _map_figure(stage: GrowStage) -> str:
    """Source and target layers, each target layer in the colour of the one that it is made from."""
    assert stage.layer_map is not None
    rows = [list(range(stage.source.n_layers)), list(stage.layer_map)]
    width = min(40.0, 620 / max(map(len, rows)))
    cells = "".join(
        _cell(i * width, 42 * y, width, layer, stage) for y, row in enumerate(rows) for i, layer in enumerate(row)
    )
    size = f'width="{width * max(map(len, rows)):.0f}" viewBox="0 0 {width * max(map(len, rows)):.0f} 70"'
    svg = f'<svg {size} role="img" aria-label="layer map">{cells}</svg>'
    text = f"each target layer (below) with its source layer: {compact_map(stage.layer_map)}"
    return f"<figure>{svg}<figcaption>{escape(text)}</figcaption></figure>"


def _cell(x: float, y: float, width: float, layer: int, stage: GrowStage) -> str:
    hue = 210 + 300 * layer / max(stage.source.n_layers, 2)
    box = f'<rect x="{x:.2f}" y="{y}" width="{width - 1:.2f}" height="28" rx="3" fill="hsl({hue:.0f} 55% 45%)"/>'
    place = f'x="{x + width / 2:.2f}" y="{y + 19}" font-size="11" fill="#fff" text-anchor="middle"'
    return f"{box}<text {place}>{layer}</text>" if width >= 14 else box


def _facts(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What identifies the run and where it ran, without names of machines and folders."""
    yield "recipe", f"SHA-256 {provenance.get('recipe_hash', 'unknown')}"
    yield "data", f"SHA-256 {provenance.get('data', {}).get('manifest_hash', 'unknown')}"
    for number, session in enumerate(provenance.get("sessions", []), 1):
        code, hardware = session.get("code", {}), session.get("hardware", {})
        devices = hardware.get("gpus") or [f"{hardware.get('cpus')} x {hardware.get('cpu', hardware.get('machine'))}"]
        packages = ", ".join(f"{name} {version}" for name, version in session.get("packages", {}).items())
        kinds = ", ".join(
            f"{devices.count(name)} x {name}" if len(devices) > 1 else name for name in dict.fromkeys(devices)
        )
        ranks = f"{kinds}; ranks: {session.get('world_size')}"
        yield (
            f"session {number}",
            f"{session.get('started')}; {ranks}; commit {code.get('commit', 'unknown')}; {packages}",
        )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; wider tables than the page scroll by themselves."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows[1:])
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
