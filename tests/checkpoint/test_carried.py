"""Hugging Face in, growth, Hugging Face out: what is no weight comes through, too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stackgrow import seal
from stackgrow.checkpoint.carried import FILES, base_model_name
from stackgrow.checkpoint.export import export_run
from stackgrow.checkpoint.hf import import_hf
from stackgrow.checkpoint.standalone import Ranks, grow_folder
from stackgrow.plan.stages import GrowStage
from stackgrow.recipe.keys import Model

transformers = pytest.importorskip("transformers")


def pretrained(folder: Path, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=300,
        max_position_embeddings=777, bos_token_id=5, eos_token_id=[6, 7],
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    for name in FILES:
        if name != "generation_config.json":
            (folder / name).write_text(json.dumps({"of": name}), encoding="utf-8")
    return model


def doubled(source: Path, target: Path) -> None:
    def stage_of(model: Model) -> GrowStage:
        layer_map = tuple(range(model.n_layers)) * 2
        return GrowStage(
            0,
            model,
            replace(model, n_layers=2 * model.n_layers),
            "stack",
            layer_map,
            0.0,
            0,
        )

    grow_folder(source, target, stage_of, given={}, ranks=Ranks(), tell=lambda _: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_from_elsewhere_is_exported_after_two_growths(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source = tmp_path / "models--owner--Tiny_Llama" / "snapshots" / "0123"
    theirs = pretrained(source, dtype)
    doubled(source, tmp_path / "grown")
    manifest = seal.read_seal(tmp_path / "grown")
    assert manifest is not None
    assert not seal.damage(tmp_path / "grown", manifest)
    doubled(tmp_path / "grown", tmp_path / "again")
    told = export_run(tmp_path / "again", tmp_path / "hf")
    assert f"in {str(dtype).removeprefix('torch.')} from" in told
    assert "tokenizer" not in told

    hf = tmp_path / "hf"
    for name in FILES:
        assert (hf / name).read_bytes() == (source / name).read_bytes(), name
    config = transformers.AutoConfig.from_pretrained(hf)
    assert (config.num_hidden_layers, config.dtype) == (8, dtype)
    assert (
        config.max_position_embeddings,
        config.bos_token_id,
        config.eos_token_id,
    ) == (777, 5, [6, 7])
    (file,) = hf.glob("*.safetensors")
    grown = load_file(file)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(grown[name], weight), f"{name} is not the same, bit for bit"
    assert torch.equal(
        grown["model.layers.7.mlp.up_proj.weight"],
        grown["model.layers.1.mlp.up_proj.weight"],
    )

    card = (hf / "README.md").read_text()
    assert "\nbase_model: owner/Tiny_Llama\n" in card
    assert (
        "1. Grown by `stack`: 2 -> 4 layers; source layer of each layer: 0 1 0 1."
        in card
    )
    assert (
        "2. Grown by `stack`: 4 -> 8 layers; source layer of each layer: 0 1 2 3 0 1 2 3."
        in card
    )
    assert str(tmp_path) not in card, "a card is published: no paths of this machine"


def test_another_dtype_is_taken_where_it_is_asked_for(tmp_path: Path) -> None:
    pretrained(tmp_path / "source", torch.bfloat16)
    import_hf(tmp_path / "source", tmp_path / "imported")
    export_run(tmp_path / "imported", tmp_path / "hf", dtype="float32")
    assert (
        transformers.AutoConfig.from_pretrained(tmp_path / "hf").dtype == torch.float32
    )
    assert "the base model" in (tmp_path / "hf" / "README.md").read_text()


def test_a_source_without_tokenizer_is_told_with_the_remedy(tmp_path: Path) -> None:
    pretrained(tmp_path / "source", torch.float32)
    for name in FILES:
        (tmp_path / "source" / name).unlink()
    import_hf(tmp_path / "source", tmp_path / "imported")
    told = export_run(tmp_path / "imported", tmp_path / "hf")
    assert told.endswith(
        "no tokenizer, since none came with the source: copy the files of the base model's into it"
    )


def test_names_of_base_models(tmp_path: Path) -> None:
    assert (
        base_model_name(Path("/cache/models--owner--name/snapshots/1"), {})
        == "owner/name"
    )
    assert (
        base_model_name(tmp_path / "mine", {"_name_or_path": "owner/model"})
        == "owner/model"
    )
    assert (
        base_model_name(tmp_path / "mine", {"_name_or_path": "/home/me/model"})
        == "mine"
    )
    assert base_model_name(tmp_path / "mine", {}) == "mine"
