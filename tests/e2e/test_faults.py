"""Faults at chosen points of a short run (faulty.py): what was promised holds, and the run ends as an undisturbed one."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk import faults
from launch import (
    BASE,
    FAULTY,
    GROW,
    TARGET,
    Workplace,
    assert_audited,
    environment,
    losses,
    records,
    stage_of,
    weights,
)
from warm import WITHOUT_MATPLOTLIB, Warm

from stackgrow import seal
from stackgrow.run_folder.folder import DONE, LEDGER, VALIDATION, RunFolder

# 9 base steps, growth, 9 target steps; checkpoints at 3, 6 and 9, the two newest kept.
SHORT = [
    "budget.tokens=18Ki",
    "growth[0].timing=9Ki",
    "checkpoint.interval=3 steps",
    "validation.interval=4 steps",
]
COMPUTED = ["growth[0].operator=zero"]  # a growth that writes what it computes


def run(
    workplace: Workplace,
    place: Path,
    *sets: str,
    code: int = 0,
    ranks: int = 0,
    **env: str,
) -> str:
    arguments = workplace.arguments(*SHORT, f"run.folder={place}", *sets)
    process = Warm(
        FAULTY,
        arguments,
        workplace.folder,
        {**environment(), WITHOUT_MATPLOTLIB: "1", **env},
        ranks,
    )
    returned, output = process.wait(120), process.output()
    assert returned == code, output
    assert code < 0 or "Traceback" not in output, output
    return output


def assert_same(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert losses(one, VALIDATION) == losses(other, VALIDATION)
    assert weights(stage_of(one, TARGET).checkpoint(9)) == weights(
        stage_of(other, TARGET).checkpoint(9)
    )


@pytest.fixture(scope="module")
def short(workplace: Workplace) -> Path:
    """The undisturbed short run; what training draws from is in short.txt."""
    place = workplace.folder / "short"
    (workplace.folder / "short.txt").write_text(run(workplace, place, RNG="1"))
    return place


@pytest.fixture(scope="module")
def short_computed(workplace: Workplace) -> Path:
    run(workplace, workplace.folder / "short_computed", *COMPUTED)
    return workplace.folder / "short_computed"


def test_every_fault_point_is_a_function_that_is_there_and_used_by_a_test() -> None:
    from faulty import PHASES, POINTS

    for owner, name, place in POINTS.values():
        assert callable(getattr(owner, name)), f"{owner.__name__}.{name}"
        assert place in ("<", ">")
    for owner, name in PHASES.values():
        assert callable(getattr(owner, name)), f"{owner.__name__}.{name}"
    tests = "".join(
        file.read_text(encoding="utf-8")
        for file in sorted(Path(__file__).parent.glob("test_*.py"))
    )
    unused = [
        point
        for point in POINTS
        if not re.search(rf"\b{re.escape(point)} [0-9]", tests)
    ]
    assert unused == []


def test_training_draws_from_no_global_generator(short: Path) -> None:
    """So there is no generator state that a checkpoint would have to hold."""
    output = (short.parent / "short.txt").read_text(encoding="utf-8")
    for stage in (BASE, TARGET):
        assert f"{stage}: generators untouched" in output


FIRST_SAVE = [
    "save.data 1",
    "save.metadata 1",
    "save.rename 1",
    "save.committed 1",
    "seal.hashed 1",
    "seal.sealed 1",
]
LATER_SAVE = [
    "save.data 2",
    "save.rename 1",
    "save.committed 1",
    "seal.hashed 1",
    "purge.unsealed 1",
    "done 1",
]
GROWTH = [
    "grow.begin 1",
    "grow.computed 2",
    "grow.written 1",
    "grow.committed 1",
    "grow.sealed 1",
]


@pytest.mark.parametrize(
    "points", [FIRST_SAVE, LATER_SAVE], ids=["first save", "later save"]
)
def test_killed_at_every_point_of_a_save(
    workplace: Workplace, short: Path, tmp_path: Path, points: list[str]
) -> None:
    place, sealed = tmp_path / "run", []
    for point in points:
        run(workplace, place, code=-9, FAULT=f"kill {point}")
        steps = stage_of(place, BASE).sealed_steps()
        sealed.append(steps[-1] if steps else 0)
        for step in steps:
            folder = stage_of(place, BASE).checkpoint(step)
            assert not seal.damage(folder, seal.read_seal(folder) or {}), (
                "what is sealed is whole"
            )
    assert sealed == (
        [0, 0, 0, 0, 0, 3] if points == FIRST_SAVE else [3, 3, 3, 3, 9, 9]
    )
    run(workplace, place)
    assert_same(place, short)
    moved = {p.name for p in stage_of(place, BASE).quarantine.iterdir()}
    assert (
        {"step-3.0", "step-3.4"} <= moved
        if points == FIRST_SAVE
        else {"step-6.0", "step-6.3"} <= moved
    )


def test_killed_at_every_point_of_a_growth(
    workplace: Workplace, short_computed: Path, tmp_path: Path
) -> None:
    place = tmp_path / "run"
    for point in GROWTH:
        run(workplace, place, *COMPUTED, code=-9, FAULT=f"kill {point}")
        source = stage_of(place, BASE).checkpoint(9)
        assert not seal.damage(source, seal.read_seal(source) or {}), (
            "the source is as it was"
        )
    run(workplace, place, *COMPUTED)
    assert_same(place, short_computed)
    grown = [stage_of(r, GROW).checkpoints for r in (place, short_computed)]
    files = [
        {
            n: f["sha256"]
            for n, f in (seal.read_seal(g) or {})["files"].items()
            if n != ".metadata"
        }
        for g in grown
    ]
    assert files[0] == files[1], "byte for byte"


def test_sigterm_saves_and_ends_with_75(
    workplace: Workplace, short_computed: Path, tmp_path: Path
) -> None:
    """In a step, in validation, in a growth, while loading the grown weights, in a save: one run stopped five times."""
    place = tmp_path / "run"
    for point, where in (
        ("train.step 5", f"{BASE}, step 5"),
        ("validate 1", f"{BASE}, step 9"),  # asked after step 8, before its end
        ("grow.computed 1", f"growing {GROW}"),
        ("load 1", f"{TARGET}, loading"),
        ("seal.hashed 1", f"{TARGET}, step 4"),
    ):
        output = run(workplace, place, *COMPUTED, code=75, FAULT=f"term {point}")
        assert (
            "stopped by SIGTERM; what was done is saved, and the same command goes on from here"
            in output
        )
        if where not in (
            f"{BASE}, step 9",
            f"growing {GROW}",
        ):  # noticed there, or where the next stage begins
            assert f"{where}: stopped by SIGTERM" in output
        if "step" in where:
            stage, step = where.split(", step ")
            assert stage_of(place, stage).sealed_steps()[-1] == int(step)
    run(workplace, place, *COMPUTED)
    assert_same(place, short_computed)


def test_records_edited_between_two_sessions_are_never_sealed(
    workplace: Workplace, short: Path, tmp_path: Path
) -> None:
    """The file is named, nothing is overwritten, and once it is restored the run ends as an undisturbed one."""
    place = tmp_path / "run"
    run(workplace, place, code=75, FAULT="term train.step 7")
    for file in (
        stage_of(place, BASE).metrics_file,
        stage_of(place, BASE).validation_file,
    ):
        content = file.read_bytes()
        file.write_bytes(content.replace(b'"loss": ', b'"loss": 1', 1))
        output = run(workplace, place, code=65)
        assert (
            f"{file} is not what it was when the checkpoint was sealed that training goes on from"
            in output
        )
        file.write_bytes(content)
    run(workplace, place)
    assert_same(place, short)
    assert_audited(place)


def test_a_request_to_one_rank_stops_all(workplace: Workplace, tmp_path: Path) -> None:
    place = tmp_path / "run"
    output = run(
        workplace, place, code=75, ranks=2, FAULT="term train.step 5", FAULT_RANK="1"
    )
    assert output.count(f"{BASE}, step 5: stopped by") == 1, "told once"
    assert stage_of(place, BASE).sealed_steps() == [3, 5]


def test_a_killed_reader_of_data_is_told_and_the_run_goes_on(
    workplace: Workplace, short: Path, tmp_path: Path
) -> None:
    """As by the kernel when memory runs out."""
    place = tmp_path / "run"
    output = run(
        workplace, place, "data.workers=1", code=70, FAULT="reader train.step 5"
    )
    assert (
        "a process that reads data was ended from outside, as it is when memory runs out"
        in output
    )
    run(workplace, place, "data.workers=1")
    assert_same(place, short)


def test_a_rank_that_hangs_is_named(workplace: Workplace, tmp_path: Path) -> None:
    arguments = workplace.arguments(
        *SHORT, f"run.folder={tmp_path}/run", "run.train_timeout=10"
    )
    env = {**environment(), "FAULT": "stop train.step 5", "FAULT_RANK": "1"}
    process = Warm(FAULTY, arguments, workplace.folder, env, ranks=2)
    process.processes[0].join(120)
    code = process.processes[0].exitcode
    process.kill()
    assert code == 70, process.output()
    assert (
        f"{BASE}, step 5: rank 0 waited in vain for another rank; silent: 1."
        in process.output()
    )


def test_growing_may_take_longer_than_a_step(
    workplace: Workplace, tmp_path: Path
) -> None:
    """One rank joins what all have written, and seals it, while the other waits."""
    sets = [*COMPUTED, "run.train_timeout=10"]
    run(workplace, tmp_path / "run", *sets, ranks=2, FAULT="sleep grow.written 1")


def test_a_batch_that_is_not_finite_is_left_out_and_a_resume_knows(
    workplace: Workplace, tmp_path: Path
) -> None:
    whole, resumed, skip = (
        tmp_path / "whole",
        tmp_path / "resumed",
        "train.on_nonfinite=skip",
    )
    output = run(workplace, whole, skip, FAULT="nan train.backward 5")
    assert (
        f"{BASE}: loss or gradient is not finite at step 5 (loss nan): its update is left out"
        in output
    )
    run(
        workplace,
        resumed,
        skip,
        code=75,
        FAULT="nan train.backward 5;term train.step 8",
    )
    run(workplace, resumed, skip)
    rows = [records(place) for place in (whole, resumed)]
    assert repr([r["loss"] for r in rows[0].values()]) == repr(
        [r["loss"] for r in rows[1].values()]
    )
    assert rows[0][BASE, 5]["event"] == "nonfinite"
    assert rows[0][BASE, 6]["position"] == rows[0][BASE, 5]["position"] + 16, (
        "the data go on"
    )
    assert weights(stage_of(whole, TARGET).checkpoint(9)) == weights(
        stage_of(resumed, TARGET).checkpoint(9)
    )


def test_no_update_before_the_first_checkpoint(
    workplace: Workplace, tmp_path: Path
) -> None:
    """It has AdamW's state all the same, and can be gone on from."""
    place, skip = tmp_path / "run", "train.on_nonfinite=skip"
    run(workplace, place, skip, code=75, FAULT="nan train.backward 1;term train.step 1")
    assert stage_of(place, BASE).sealed_steps() == [1]
    run(workplace, place, skip)
    assert records(place)[BASE, 1]["event"] == "nonfinite"


def test_weights_that_are_not_finite_are_never_saved(
    workplace: Workplace, tmp_path: Path
) -> None:
    output = run(workplace, tmp_path / "run", code=76, FAULT="poison save 6")
    assert f"{BASE}: weights are not finite at step 6" in output
    assert stage_of(tmp_path / "run", BASE).sealed_steps() == [3]


def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoint_before(
    workplace: Workplace, tmp_path: Path
) -> None:
    """On one rank of two; both end, and nothing that is not sealed is left to fill the disk."""
    place = tmp_path / "run"
    output = run(
        workplace, place, code=74, ranks=2, FAULT="full save.data 2", FAULT_RANK="1"
    )
    assert (
        "step-6 could not be written (OSError: [Errno 28] No space left on device"
        in output
    )
    assert [p.name for p in stage_of(place, BASE).checkpoints.iterdir()] == ["step-3"]
    folder = stage_of(place, BASE).checkpoint(3)
    assert not seal.damage(folder, seal.read_seal(folder) or {})


@pytest.mark.parametrize("damage", ["unreadable", "token"])
def test_a_store_that_cannot_be_read_or_holds_no_token_is_named(
    workplace: Workplace, tmp_path: Path, damage: str
) -> None:
    store = tmp_path / "store"
    shutil.copytree(workplace.folder / "store", store)
    (shard,) = store.glob("train-*.npy")
    if damage == "token":
        content = bytearray(shard.read_bytes())
        content[-400_000:] = b"\xff" * 400_000
        shard.write_bytes(content)
    else:
        shard.unlink()
        os.mkfifo(shard)
    output = run(
        workplace,
        tmp_path / "run",
        f"data.path={store}",
        code=65 if damage == "token" else 2,
    )
    assert (
        "beyond the vocabulary of 512" in output
        if damage == "token"
        else f"{shard}" in output
    )


def test_a_file_that_cannot_grow(
    workplace: Workplace, short: Path, tmp_path: Path
) -> None:
    """The kernel's own refusal, out of torch's writer."""
    output = run(workplace, tmp_path / "run", code=74, FILE_LIMIT="200000")
    assert "step-3 could not be written" in output
    assert not list(tmp_path.glob("run/*/checkpoint/*"))


@pytest.mark.parametrize(
    "point", ["log 5", "seal.hashed 2", "grow.computed 2", "done 1"]
)
def test_a_full_disk_elsewhere(
    workplace: Workplace, short_computed: Path, tmp_path: Path, point: str
) -> None:
    """In metrics.jsonl, in a seal, in a growth, in DONE."""
    place = tmp_path / "run"
    output = run(workplace, place, *COMPUTED, code=74, FAULT=f"full {point}")
    assert (
        f"disk full: {point.split()[0]}: No space left on device; make room, then give the same command again"
        in output
    )
    run(workplace, place, *COMPUTED)
    assert_same(place, short_computed)


@pytest.mark.parametrize("sets", [[], COMPUTED], ids=["linked", "computed"])
def test_nothing_is_relied_upon_that_a_power_cut_would_take(
    workplace: Workplace, tmp_path: Path, sets: list[str]
) -> None:
    """Every file was synced before it got its name or was sealed, and every name before another file builds on it."""
    place, log = tmp_path / "run", tmp_path / "disk.txt"
    run(workplace, place, *sets, code=75, FAULT="term train.step 5", DISK_LOG=str(log))
    run(workplace, place, *sets, DISK_LOG=str(log))
    assert faults(log, place) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB: less than a checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.getuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        ).returncode
    ):
        pytest.skip("only root can mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_checkpoint_that_does_not_fit_is_not_begun(
    workplace: Workplace, tiny_disk: Path
) -> None:
    output = run(workplace, tiny_disk / "run", code=74)
    assert f"{BASE}: disk full, the checkpoint of step 3 needs 0.00" in output
    assert "GB are free in" in output
    assert not list(tiny_disk.glob("run/*/checkpoint/*"))


def test_a_folder_that_cannot_be_made(workplace: Workplace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        output = run(workplace, place, code=74)
        assert f"{place}" in output
        assert "then give the same command again" in output


def test_a_moved_run_and_clocks_that_go_backwards(
    workplace: Workplace, short: Path, tmp_path: Path
) -> None:
    """Nothing in a run names its place, and nothing is ordered by time."""
    place = tmp_path / "elsewhere"
    shutil.copytree(short, place, ignore=shutil.ignore_patterns(TARGET, LEDGER))
    shutil.copytree(
        short / TARGET, place / TARGET, ignore=shutil.ignore_patterns(DONE, "step-9")
    )
    for file in place.rglob("*"):
        os.utime(
            file, (4070908800, 4070908800) if "step-6" in str(file) else (0, 0)
        )  # 2099 and 1970
    run(workplace, place)
    assert_same(place, short)


def test_other_versions_are_refused_until_they_are_accepted(
    workplace: Workplace, short: Path, tmp_path: Path
) -> None:
    """Another minor version of torch is refused until it is accepted, and told then; both are on record."""
    place = tmp_path / "run"
    shutil.copytree(short, place, ignore=shutil.ignore_patterns(LEDGER, DONE, "step-9"))
    record = json.loads(RunFolder(place).provenance_file.read_text(encoding="utf-8"))
    record["sessions"][-1]["packages"]["torch"] = "1.9.0"
    RunFolder(place).provenance_file.write_text(json.dumps(record))
    output = run(workplace, place, code=65)
    assert "was run with other versions: torch 1.9.0 -> " in output
    assert "--set run.accept_versions=true" in output
    output = run(workplace, place, "run.accept_versions=true")
    assert "Other versions than in the session before: torch 1.9.0 -> " in output
    sessions = json.loads(RunFolder(place).provenance_file.read_text(encoding="utf-8"))[
        "sessions"
    ]
    assert len({s["packages"]["torch"] for s in sessions}) == len(sessions) == 2
