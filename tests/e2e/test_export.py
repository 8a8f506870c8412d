"""A real run, exported as a user would export it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from launch import Workplace, losses

from stackgrow import seal
from stackgrow.checkpoint.hf import import_hf
from stackgrow.data.store import TokenStore
from stackgrow.data.tokenizer import Tokenizer
from stackgrow.recipe.load import load_recipe
from stackgrow.recipe.write import recipe_hash
from stackgrow.run_folder.folder import DONE, VALIDATION, RunFolder

transformers = pytest.importorskip("transformers")

BASE, GROW, TARGET = "stage-0-train-2L", "stage-1-grow", "stage-2-train-4L"


def export(workplace: Workplace, *arguments: object, code: int = 0) -> str:
    returned, output = workplace.tool("export_hf", *arguments)
    assert returned == code, output
    assert "Traceback" not in output
    return output


def validation_loss(folder: Path, store: TokenStore) -> float:
    """Of the run's 11 held-out sequences, through transformers."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = torch.tensor(
        [store.tokens(64 * i, 64 * i + 65).tolist() for i in range(11)]
    )
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), windows[:, 1:].flatten()
    ).item()


def test_exported_run_has_the_losses_that_it_had_in_training(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    """The last stage by default, and any other; the same tokenizer, and the history on the card."""
    store = TokenStore.open(workplace.folder / "store", split="validation")
    logged = losses(reference, VALIDATION)
    assert "parameters in float32 from" in export(
        workplace, "reference", tmp_path / "last"
    )
    assert validation_loss(tmp_path / "last", store) == pytest.approx(
        logged[TARGET, 20], rel=1e-5
    )
    export(workplace, "reference", tmp_path / "base", "--stage", BASE, "--step", 16)
    assert validation_loss(tmp_path / "base", store) > logged[BASE, 20] + 1e-3
    export(workplace, RunFolder(reference).stage(GROW).checkpoints, tmp_path / "grown")
    assert validation_loss(tmp_path / "grown", store) == pytest.approx(
        logged[TARGET, 0], rel=1e-5
    )

    text = "import json\n\ndef f(x):\n    return x"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "last")
    ours = Tokenizer.load(workplace.folder / "store" / store.manifest.tokenizer)
    assert theirs.encode(text) == [ours.bos_id, *ours.encode(text)]
    assert theirs.model_max_length == 64

    card = (tmp_path / "last" / "README.md").read_text()
    assert "ids of the tokenizer of training on 40 of 41 sample texts" in card, (
        "25 that are hard, 16 of the store"
    )
    recipe = load_recipe(RunFolder(reference).recipe_file, trusted=True)
    for part in (
        f"checkpoint: {TARGET}/checkpoint/step-20", recipe_hash(recipe),
        "1. Trained 2 layers", "20.5K tokens (20 of 20 steps of 1.02K)", "2. Grown by `stack`: 2 -> 4 layers",
        "source layer of each layer: 0 1 0 1", "3. Trained 4 layers", "pre-trained on 41K tokens",
    ):  # fmt: skip
        assert part in card, part
    assert "(16 of 20 steps of 1.02K)" in (tmp_path / "base" / "README.md").read_text()
    assert str(workplace.folder) not in card, (
        "a card is published: no paths of this machine"
    )


def test_imported_export_has_the_weights_of_the_run(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    export(workplace, "reference", tmp_path / "hf")
    model = import_hf(tmp_path / "hf", tmp_path / "back")
    run = load_recipe(RunFolder(reference).recipe_file, trusted=True)
    assert dataclasses.replace(model, init=run.model.init) == run.model
    mine, back = (
        seal.read_seal(RunFolder(reference).stage(TARGET).checkpoint(20)),
        seal.read_seal(tmp_path / "back"),
    )
    assert mine is not None
    assert back is not None
    assert mine["tensors"] == back["tensors"]
    assert "in bfloat16" in export(
        workplace, tmp_path / "back", tmp_path / "again", "--dtype", "bfloat16"
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "hf" / name
        ).read_bytes()


def test_what_cannot_be_exported_is_told(
    workplace: Workplace, reference: Path, tmp_path: Path
) -> None:
    cases = {
        "is not among the run's models": ("reference", "--stage", "stage-9"),
        "has not the checkpoint asked for; it has those of steps [16, 20]": (
            "reference",
            "--stage",
            BASE,
            "--step",
            "3",
        ),
        "has not the checkpoint asked for": (
            "reference",
            "--stage",
            GROW,
            "--step",
            "3",
        ),
        "neither a run, nor a checkpoint": ("store",),
    }
    for message, (source, *options) in cases.items():
        assert message in export(workplace, source, tmp_path / "hf", *options, code=65)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(reference, unfinished, ignore=shutil.ignore_patterns(DONE))
    assert "none is finished" in export(workplace, unfinished, tmp_path / "hf", code=65)
    record = json.loads(RunFolder(unfinished).provenance_file.read_text())
    record["data"]["manifest_hash"] = "0" * 64
    RunFolder(unfinished).provenance_file.write_text(json.dumps(record))
    told = export(workplace, unfinished, tmp_path / "hf", "--stage", BASE, code=65)
    assert "is not the token store that" in told
    assert not (tmp_path / "hf").exists()


def test_checkpoint_taken_while_a_mask_rises_exports_what_it_computes(
    workplace: Workplace, tmp_path: Path
) -> None:
    store = TokenStore.open(workplace.folder / "store", split="validation")
    run, sets = (
        tmp_path / "run",
        [
            "growth[0].operator=random",
            "growth[0].ramp=10 steps",
            "validation.interval=4steps",
        ],
    )
    workplace.run("budget.tokens=30Ki", *sets, "checkpoint.keep=9", f"run.folder={run}")
    logged = losses(run, VALIDATION)
    for step in (4, 10):
        export(workplace, run, tmp_path / f"hf-{step}", "--step", step)
        assert validation_loss(tmp_path / f"hf-{step}", store) == pytest.approx(
            logged[TARGET, step], rel=1e-5
        )
    export(workplace, RunFolder(run).stage(GROW).checkpoints, tmp_path / "grown")
    assert validation_loss(tmp_path / "grown", store) == pytest.approx(
        logged[TARGET, 0], rel=1e-5
    )
