"""What an undisturbed run leaves behind, and what it shows."""

import itertools
import json
import math
from pathlib import Path

import pytest
from launch import BASE, GROW, TARGET, Workplace, losses, records, stage_of, weights

from stackgrow import seal
from stackgrow.report.isoflop import read_run
from stackgrow.run_folder.folder import (
    LEDGER,
    PROVENANCE,
    RECIPE,
    REPORT,
    VALIDATION,
    RunFolder,
)

KEYS = {
    "stage",
    "step",
    "position",
    "tokens",
    "flops",
    "loss",
    "grad_norm",
    "lr",
    "tps",
}


def test_metrics_count_tokens_positions_and_flops_without_a_gap(
    reference: Path,
) -> None:
    rows = list(records(reference).values())
    assert [(r["stage"], r["step"]) for r in rows] == [
        (s, i) for s in (BASE, TARGET) for i in range(1, 21)
    ]
    assert all(r.keys() >= KEYS for r in rows)
    assert [r["position"] for r in rows] == [16 * i for i in range(1, 41)]
    assert [r["tokens"] for r in rows] == [1024 * i for i in range(1, 41)]
    steps = [b["flops"] - a["flops"] for a, b in itertools.pairwise(rows)]
    assert all(math.isclose(s, steps[0]) for s in steps[:19])
    assert all(s > steps[0] for s in steps[19:]), "a step of the grown model costs more"


def test_validation_at_start_and_end_of_every_stage_and_falling(
    reference: Path,
) -> None:
    seen = losses(reference, VALIDATION)
    assert [k for k in seen if k[0] == BASE] == [(BASE, i) for i in (0, 5, 10, 15, 20)]
    assert [k for k in seen if k[0] == TARGET] == [
        (TARGET, i) for i in (0, 5, 10, 15, 20)
    ]
    for stage in (BASE, TARGET):
        assert seen[stage, 20] < seen[stage, 0] - 0.1


def test_grown_stage_starts_from_the_grown_weights(reference: Path) -> None:
    growth = json.loads(
        stage_of(reference, GROW).growth_file.read_text(encoding="utf-8")
    )
    base = weights(stage_of(reference, BASE).checkpoint(20))
    grown = weights(stage_of(reference, GROW).checkpoints)
    assert growth["layer_map"] == [0, 1, 0, 1]
    for layer, source in enumerate([0, 1, 0, 1]):
        for name in ("attention.wq", "feed_forward.w2", "ffn_norm"):
            assert (
                grown[f"layers.{layer}.{name}.weight"]
                == base[f"layers.{source}.{name}.weight"]
            )
    assert (
        grown["layers.0.attention.wq.weight"] != grown["layers.1.attention.wq.weight"]
    )
    assert growth["bytes_written"] < 20_000


def test_growth_links_the_base_checkpoint_and_moves_no_weights(reference: Path) -> None:
    for name in json.loads(
        stage_of(reference, GROW).growth_file.read_text(encoding="utf-8")
    )["linked_files"]:
        source = stage_of(reference, BASE).checkpoint(20) / name
        assert (stage_of(reference, GROW).checkpoints / name).samefile(source)


def test_done_names_the_stage_its_parent_and_its_result(reference: Path) -> None:
    done = {
        s: json.loads(stage_of(reference, s).done_file.read_text(encoding="utf-8"))
        for s in (BASE, GROW, TARGET)
    }
    assert done[BASE]["parent_hash"] is None
    assert done[GROW]["parent_hash"] == done[BASE]["stage_hash"]
    assert done[TARGET]["parent_hash"] == done[GROW]["stage_hash"]
    final = reference / TARGET / done[TARGET]["checkpoint"]
    manifest = seal.read_seal(final)
    assert manifest is not None
    assert manifest["position"] == 640
    assert not seal.damage(final, manifest)


def test_ledger_adds_up_to_the_budget(reference: Path) -> None:
    ledger = json.loads(RunFolder(reference).ledger_file.read_text(encoding="utf-8"))
    assert (
        sum(s["tokens"] for s in ledger["stages"])
        == ledger["total"]["tokens"]
        == 40 * 1024
    )
    assert ledger["budget_tokens"] == 40 * 1024
    assert ledger["data"]["store"]["tokens"] == 40 * 1024
    last = list(records(reference).values())[-1]
    assert last["data"] == ledger["data"], (
        "what each store gave, per epoch, is logged as it goes"
    )


def test_boundary_checkpoint_is_full_and_kept(reference: Path) -> None:
    from stackgrow.checkpoint.dcp import read_metadata

    checkpoints = {p.name for p in stage_of(reference, BASE).checkpoints.iterdir()}
    assert checkpoints == {"step-16", "step-20"}, (
        "keep = 2, and the boundary is one of them"
    )
    names = read_metadata(stage_of(reference, BASE).checkpoint(20)).state_dict_metadata
    assert {"train_state.step", "dataloader.position"} <= names.keys()
    assert any(
        n.startswith("optimizer.state.layers.1.") and n.endswith("exp_avg_sq")
        for n in names
    )


def test_terminal_output_tells_progress_growth_and_where_things_lie(
    reference: Path,
) -> None:
    output = (reference.parent / "reference.txt").read_text(encoding="utf-8")
    assert "stage-0-train-2L  step 20/20 (100%)" in output
    assert "ETA" in output
    assert "stack 2 -> 4 layers" in output
    assert "data         store: 41K tokens, 0." in output
    assert "Traceback" not in output
    assert "Warning" not in output
    for name in (
        RECIPE,
        PROVENANCE,
        LEDGER,
        "tensorboard --logdir",
        REPORT,
    ):
        assert name in output
    assert list(reference.glob("stage-*/tb/**/events.out.tfevents.*"))
    assert "stage-1-grow: 2 -&gt; 4 layers" in RunFolder(
        reference
    ).report_file.read_text(encoding="utf-8")


def test_second_call_does_nothing(workplace: Workplace, reference: Path) -> None:
    before = {
        p: p.stat().st_mtime_ns for p in reference.glob("stage-*/**/*") if p.is_file()
    }
    output = workplace.run("run.folder=reference")
    assert output.count("done before") == 3
    assert {
        p: p.stat().st_mtime_ns for p in reference.glob("stage-*/**/*") if p.is_file()
    } == before


def test_a_run_is_a_point_of_a_sweep(reference: Path) -> None:
    """What tools/fit_guidelines.py takes from a run: its timing or factor, and C = 6 N D, base included."""
    timing, factor = (
        read_run(reference, variable) for variable in ("timing", "factor")
    )
    assert (timing.at, factor.at) == (20 * 1024, 2)
    spent = json.loads(RunFolder(reference).ledger_file.read_text(encoding="utf-8"))[
        "total"
    ]["flops"]
    assert timing.flops[-1] == pytest.approx(
        spent * timing.parameters / (timing.parameters + 512 * 64)  # N without the head
    )
    assert timing.loss[-1] < timing.loss[0]
