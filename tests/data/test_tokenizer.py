"""Tokenizers: every byte comes back, and training is deterministic."""

import inspect
from pathlib import Path

import pytest
import sentencepiece

from stackgrow.data import prepare, store
from stackgrow.data.tokenizer import Tokenizer, TokenizerError, train_tokenizer

SOURCES = [*(inspect.getsource(module) for module in (prepare, store, pytest)), "in 2024\n" * 500]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SOURCES, 700)


@pytest.mark.parametrize(
    "text",
    [
        *SOURCES,
        "",
        " ",
        "  leading and trailing  ",
        "\n\n\n\tif x:\n\t\treturn\n    four\r\n",
        "trailing newline\n",
        "12345 0x00ff",
        "é 日本 😀 \ufeff \x00 \u2585 ⁇",
        "a space sign ▁, two ▁▁ and ▁ spaces",
        "<s> </s> <unk> <0x0A>",
    ],
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    texts = [*SOURCES, "", "▁", " x"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_ids_and_pieces(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (700, 1, 2)
    assert len(tokenizer.encode("2024")) == 4, "digits are split"
    assert len(tokenizer.encode("        return")) < 4, "indentation is merged"


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(SOURCES, 700).model == tokenizer.model
    assert train_tokenizer(SOURCES, 701).sha256 != tokenizer.sha256


def test_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    path.write_bytes(tokenizer.model)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(SOURCES[0]) == tokenizer.encode(SOURCES[0])


def test_foreign_model_with_dummy_prefix_is_left_as_it_is(tmp_path: Path) -> None:
    """Encoding in parts around U+2581 would give such a model's parts spaces that the text does not have."""
    with (tmp_path / "m.model").open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SOURCES[0].splitlines()),
            model_writer=stream,
            vocab_size=500,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
    foreign = Tokenizer.load(tmp_path / "m.model")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert foreign.encode("a▁b") == plain.encode("a▁b")


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"x\.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(TokenizerError, match="too high"):
        train_tokenizer(["a few words"], 5000)
    with pytest.raises(TokenizerError, match="smaller"):
        train_tokenizer(["a few words"], 20)
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer([], 300)
