"""Tokenizers: every byte comes back, and training is deterministic."""

import importlib.util
import inspect
import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from stackgrow.data import prepare, store
from stackgrow.data import tokenizer as tokenizer_module
from stackgrow.data.tokenizer import Tokenizer, TokenizerError, train_tokenizer

SOURCES = [
    *(inspect.getsource(module) for module in (prepare, store, pytest)),
    "in 2024\n" * 500,
]


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
def test_every_text_comes_back_from_its_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_texts_are_encoded_alike_together_and_alone(tokenizer: Tokenizer) -> None:
    texts = [*SOURCES, "", "▁", " x"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_trained_tokenizer_has_the_usual_ids_and_splits_digits(
    tokenizer: Tokenizer,
) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (700, 1, 2)
    assert len(tokenizer.encode("2024")) == 4, "digits are split"
    assert len(tokenizer.encode("        return")) < 4, "indentation is merged"


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(SOURCES, 700).model == tokenizer.model
    assert train_tokenizer(SOURCES, 701).sha256 != tokenizer.sha256


def test_a_loaded_tokenizer_is_the_saved_one(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
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


def test_what_is_no_tokenizer_or_cannot_be_trained_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match=r"x\.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(TokenizerError, match="too high"):
        train_tokenizer(["a few words"], 5000)
    with pytest.raises(TokenizerError, match="smaller"):
        train_tokenizer(["a few words"], 20)
    with pytest.raises(TokenizerError, match="no text"):
        train_tokenizer([], 300)


def byte_level(bos: str = "<|begin_of_text|>", template: bool = True) -> bytes:
    """A small tokenizer.json as Llama 3's is: byte-level BPE, BOS put before every text by a template."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    special = [bos, "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    model.train_from_iterator(SOURCES, trainer)
    if template:
        model.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, 0)]
        )
    return model.to_str().encode()


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    path.write_bytes(byte_level())
    return Tokenizer.load(path)


def test_a_tokenizer_json_encodes_special_tokens_as_text(hf: Tokenizer) -> None:
    assert (hf.vocab_size, hf.bos_id, hf.eos_id, hf.file) == (
        600,
        0,
        1,
        "tokenizer.json",
    )
    for text in [
        *SOURCES,
        "",
        "é 日本 😀",
        "<|begin_of_text|> spelled out <|end_of_text|>",
    ]:
        ids = hf.encode(text)
        assert hf.decode(ids) == text
        assert not {hf.bos_id, hf.eos_id} & set(ids), (
            "special tokens in a text are text"
        )


def test_bos_of_a_tokenizer_json_without_a_template(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_level(bos="<s>", template=False))
    assert Tokenizer.load(path).bos_id == 0
    path.write_bytes(byte_level(bos="[FIRST]", template=False))
    with pytest.raises(TokenizerError, match="no BOS token"):
        Tokenizer.load(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("bos", "named"),
    [
        ("<｜begin▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),  # DeepSeek's
        ("<BOS_TOKEN>", {"content": "<BOS_TOKEN>", "special": True}),  # Cohere's
        ("<|startoftext|>", "<|startoftext|>"),  # gpt-oss's
    ],
)
def test_bos_and_eos_are_what_the_folder_of_a_tokenizer_names(
    tmp_path: Path, bos: str, named: object
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level(bos=bos, template=False))
    with pytest.raises(TokenizerError, match="--bos"):
        Tokenizer.load(tmp_path)
    eos = "Ġthe"  # any token that is no EOS by name
    config = {"bos_token": named, "eos_token": eos, "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config), encoding="utf-8"
    )
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = Tokenizer.load(path)
        assert tokenizer.bos_id == 0
        assert tokenizer.eos_id == tokenizers.Tokenizer.from_file(
            str(tmp_path / "tokenizer.json")
        ).token_to_id(eos)
    assert Tokenizer.load(tmp_path, bos="<|end_of_text|>").bos_id == 1
    with pytest.raises(TokenizerError, match='has no token "<none>"'):
        Tokenizer.load(tmp_path, bos="<none>")
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(tmp_path)


def test_folder_of_a_real_sentencepiece_model(tmp_path: Path) -> None:
    """mistral-common's of 32,000 pieces, as Llama 2's: it adds a space, and says its BOS and EOS itself."""
    data = Path(importlib.util.find_spec("mistral_common").origin).parent / "data"  # type: ignore[union-attr, arg-type]
    shutil.copy(data / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.adds_prefix
    assert tokenizer.encode("Hello  world.") == tokenizer._model.encode("Hello  world.")  # type: ignore[attr-defined]
    assert Tokenizer.load(tmp_path, bos="</s>").bos_id == 2
    with pytest.raises(TokenizerError, match='has no token "<none>"'):
        Tokenizer.load(tmp_path, bos="<none>")
    with pytest.raises(TokenizerError, match="has neither"):
        Tokenizer.load(data)


def with_prefix() -> Tokenizer:
    """As Llama 2's: a space before every text."""
    model = io.BytesIO()
    options = {
        "vocab_size": 600,
        "model_type": "bpe",
        "byte_fallback": True,
        "minloglevel": 2,
    }
    exact = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "max_sentence_length": 2**30,
    }
    lines = iter("\n".join(SOURCES).splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **options, **exact
    )
    return tokenizer_module.SentencePiece(model.getvalue())


@pytest.mark.parametrize("kind", ["trained", "prefix", "json"])
def test_parts_of_a_long_text_are_its_tokens(
    tokenizer: Tokenizer, hf: Tokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut wherever a word ends: the tokens do not show it. Without such a place, bytes are still all there."""
    subject = {"trained": tokenizer, "prefix": with_prefix(), "json": hf}[kind]
    # Words in every line: a stretch of code may hold no two that a space parts, and is then cut anywhere.
    text = SOURCES[0].replace("\n", "  # and some words\n") * 3
    whole = subject.encode(text)
    for long in (400, 4096):
        monkeypatch.setattr(tokenizer_module, "LONG", long)
        assert len(list(subject._parts(text))) >= len(text) // (2 * long)
        assert subject.encode(text) == whole
    solid = "日本語" * 5000
    assert subject.decode(subject.encode(solid)).replace(" ", "") == solid
