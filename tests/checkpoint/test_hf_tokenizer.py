"""Exported tokenizers against transformers' own loading of them, and what generation and fine-tuning are told.

STACKGROW_TRANSFORMERS_4=/path/to/python   one whose transformers is 4.57: the ids are compared in that one, too
STACKGROW_LLAMA_CPP=/path/to/python        one that has gpt4all, gguf, sentencepiece and safetensors: llama.cpp generates
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from stackgrow.checkpoint.dcp import CheckpointError
from stackgrow.checkpoint.hf import export_hf
from stackgrow.checkpoint.hf_tokenizer import HARD_TEXTS, UNDERLINE, StoredTokenizer
from stackgrow.data.tokenizer import (
    HfTokenizer,
    SentencePiece,
    Tokenizer,
    train_tokenizer,
)
from stackgrow.recipe.keys import Model

transformers = pytest.importorskip("transformers")

MODEL = Model(
    family="llama2", dim=16, n_layers=1, n_heads=2, ffn_dim=24, vocab_size=300
)
TRANSFORMERS_4 = os.environ.get("STACKGROW_TRANSFORMERS_4", "")
LLAMA_CPP = os.environ.get("STACKGROW_LLAMA_CPP", "")
CORPUS = [Path(json.__file__).read_text(), *HARD_TEXTS.values()]


def trained(texts: list[str]) -> Tokenizer:
    return train_tokenizer(texts, 600)


def dummy_prefix(texts: list[str]) -> Tokenizer:
    """As Llama 2's own, which puts a space before every text."""
    return sentence_piece(
        texts, "bpe", remove_extra_whitespaces=False, normalization_rule_name="identity"
    )


def normalised(texts: list[str]) -> Tokenizer:
    """As SentencePiece has it where nothing is said: normalised, and runs of spaces cut."""
    return sentence_piece(texts, "bpe")


def unigram(texts: list[str]) -> Tokenizer:
    return sentence_piece(
        texts,
        "unigram",
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
    )


def sentence_piece(texts: list[str], kind: str, **options: Any) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type=kind, vocab_size=600, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return SentencePiece(model.getvalue())


def byte_level(texts: list[str]) -> Tokenizer:
    """A tokenizer.json without a template that puts BOS before a text."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = {"special_tokens": ["<unk>", "<s>", "</s>"], "initial_alphabet": alphabet}
    model.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(vocab_size=600, show_progress=False, **special),
    )
    return HfTokenizer(model.to_str().encode())


def mistral(texts: list[str]) -> Tokenizer:
    """Of Llama 2's kind and size."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the files of mistral-common")
    file = Path(spec.submodule_search_locations[0], "data", "tokenizer.model.v1")
    return SentencePiece(file.read_bytes())


KINDS = {
    make.__name__: make
    for make in (trained, dummy_prefix, normalised, unigram, byte_level, mistral)
}


def exported(folder: Path, stored: StoredTokenizer, **options: Any) -> Any:
    """A model of random weights with that tokenizer, in ``folder / "hf"``."""
    model = dataclasses.replace(MODEL, vocab_size=stored.vocab_size)
    state = {name: torch.zeros(shape) for name, shape in model.tensors().items()}
    dcp.save(state, checkpoint_id=folder / "step-1", no_dist=True)
    return export_hf(
        folder / "step-1",
        folder / "hf",
        model,
        tokenizer=stored,
        card="# Mine\n",
        **options,
    ).tokenizer


IDS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = json.load(open(sys.argv[2], encoding="utf-8"))
ids = [tokenizer.encode(text) for text in texts]
print(json.dumps({"ids": ids, "decoded": [tokenizer.decode(i, skip_special_tokens=True) for i in ids]}))
"""


def in_transformers_4(folder: Path, texts: list[str]) -> dict[str, Any]:
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    command = [
        TRANSFORMERS_4,
        "-c",
        IDS,
        str(folder / "hf"),
        str(folder / "texts.json"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_ids_of_training(tmp_path: Path, kind: str) -> None:
    tokenizer = KINDS[kind](CORPUS)
    written = exported(
        tmp_path, StoredTokenizer(tokenizer, samples=(CORPUS[0],)), seq_len=64
    )
    assert set(written.differing) <= {UNDERLINE}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = [*CORPUS, ""]
    ids = {text: [tokenizer.bos_id, *tokenizer.encode(text)] for text in texts}
    for text in texts:
        assert theirs.encode(text) == ids[text], text
        assert theirs.decode(ids[text][1:]) == tokenizer.decode(ids[text][1:]), text
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert [again.encode(text) for text in texts] == list(ids.values())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.max_position_embeddings == theirs.model_max_length == 64
    if TRANSFORMERS_4:
        assert in_transformers_4(tmp_path, texts)["ids"] == list(ids.values())


def test_there_are_24_kinds_of_hard_texts_and_each_is_compared(tmp_path: Path) -> None:
    assert len(HARD_TEXTS) == 24
    written = exported(tmp_path, StoredTokenizer(trained(CORPUS), samples=("a", "b")))
    assert written.texts == 27
    assert written.differing == (UNDERLINE,)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("# Mine\n")
    assert (
        "tokenizer.json gives the ids of the tokenizer of training on 26 of 27 sample texts."
        in card
    )
    assert f"It differs on: {UNDERLINE}." in card
    assert "\u2581 (U+2581) itself, which SentencePiece writes for a space" in card


def test_a_tokenizer_that_comes_out_otherwise_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is with what was written, not with what was meant."""
    from stackgrow.checkpoint import hf_tokenizer

    monkeypatch.setattr(hf_tokenizer, "_merges", lambda proto: [])
    written = exported(tmp_path, StoredTokenizer(trained(CORPUS)))
    assert "prose" in written.differing
    assert "prose" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize(
    ("document_ends", "end"), [("bos", "<s>"), ("both", "</s>"), ("eos", "</s>")]
)
def test_generation_stops_where_documents_end(
    tmp_path: Path, document_ends: str, end: str
) -> None:
    """In a store without EOS at the BOS of the next document."""
    tokenizer = trained(CORPUS)
    if document_ends == "eos":
        tokenizer.bos_id = tokenizer.eos_id  # as store_tokenizer has it of such a store
    exported(tmp_path, StoredTokenizer(tokenizer, document_ends))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.eos_token, theirs.pad_token) == (end, "<unk>")
    ends = [2] if document_ends == "eos" else [2, 1]
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == (ends if len(ends) > 1 else ends[0])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == config.eos_token_id
    assert model.generation_config.pad_token_id == 0
    with (
        torch.no_grad()
    ):  # whatever stands before, the next token is the one that ends a document
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[theirs.eos_token_id].fill_(1.0)
    prompt = theirs("import json", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]
    assert made[prompt["input_ids"].shape[1] :].tolist() == [theirs.eos_token_id]


@pytest.mark.skipif(
    not LLAMA_CPP, reason="STACKGROW_LLAMA_CPP names no Python with llama.cpp"
)
@pytest.mark.parametrize(
    ("document_ends", "end", "other"), [("bos", 1, 2), ("eos", 2, 1)]
)
def test_llama_cpp_stops_where_documents_end(
    tmp_path: Path, document_ends: str, end: int, other: int
) -> None:
    """By what its own converter reads from an export; told that another token ends a text, it goes on."""
    tokenizer = trained(CORPUS)
    if document_ends == "eos":
        tokenizer.bos_id = tokenizer.eos_id
    exported(tmp_path, StoredTokenizer(tokenizer, document_ends))
    folder = tmp_path / "hf"
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        weights[name].fill_(1.0)
    weights["lm_head.weight"][end].fill_(1.0)
    save_file(weights, file, metadata={"format": "pt"})
    script = Path(__file__).with_name("llama_cpp.py")
    command = [LLAMA_CPP, str(script), str(folder), "import json"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(made.stdout) == []
    command.append(str(other))
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(made.stdout) == [end] * 20


def test_a_batch_is_padded_or_the_card_says_why_not(tmp_path: Path) -> None:
    """A batch for fine-tuning; of a tokenizer without any such token the card says so."""
    exported(tmp_path, StoredTokenizer(byte_level(CORPUS)))
    assert (
        "There is no token for padding" in (tmp_path / "hf" / "README.md").read_text()
    )
    exported(tmp_path / "own", StoredTokenizer(trained(CORPUS)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "own" / "hf")
    batch = theirs(["a", "import json"], padding=True)
    assert 0 in batch["input_ids"][0]


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """A larger vocabulary than the tokenizer's, padded to a multiple of 64, is not."""
    stored = StoredTokenizer(train_tokenizer(CORPUS, 500))
    for vocab_size in (499, 512):
        model = dataclasses.replace(MODEL, vocab_size=vocab_size)
        state = {name: torch.zeros(shape) for name, shape in model.tensors().items()}
        dcp.save(state, checkpoint_id=tmp_path / str(vocab_size), no_dist=True)
    with pytest.raises(
        CheckpointError, match="the tokenizer has 500 tokens, the model 499"
    ):
        export_hf(
            tmp_path / "499",
            tmp_path / "hf",
            dataclasses.replace(MODEL, vocab_size=499),
            tokenizer=stored,
        )
    export_hf(
        tmp_path / "512",
        tmp_path / "hf",
        dataclasses.replace(MODEL, vocab_size=512),
        tokenizer=stored,
    )
