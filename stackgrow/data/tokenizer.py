"""Tokenizers: SentencePiece models and Hugging Face's tokenizer.json; and training one that gives every byte back."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from stackgrow.data.store import AGAIN, Manifest, StoreError

# SentencePiece writes a space as U+2581, so that a real U+2581 would come back as a space.
SPACE = "\u2581"
LONG = (
    2**20
)  # characters; a longer text is encoded in parts, since encoders hold some 100 bytes per character
WORD_END = re.compile(r"\w(?= \w)")
# Names to look for where neither a tokenizer_config.json nor the tokenizer itself says which token it is.
BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|endoftext|>")
EOS = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>")
CONFIG = "tokenizer_config.json"
NONE = -1  # the id of a token that a tokenizer does not have


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or read; the message says what to change."""


class Tokenizer:
    """A tokenizer, the bytes of its file and their SHA-256.

    Texts beyond LONG are cut before a space between two letters, which no token of a SentencePiece or byte-level BPE
    model spans: the parts' tokens are the whole's. Where 2 LONG characters hold no such place they are cut anywhere.
    """

    model: bytes
    file: str  # its name in a token store
    vocab_size: int
    bos_id: int  # NONE: it has none
    eos_id: int  # NONE: it has none
    adds_prefix: bool  # it puts a space before every text

    @staticmethod
    def load(
        path: str | Path, *, bos: str | None = None, document_ends: str = "bos"
    ) -> Tokenizer:
        """The tokenizer in file or folder ``path``: tokenizer.json, or else tokenizer.model.

        BOS and EOS are what a tokenizer_config.json beside the file names, or else what the tokenizer itself says;
        ``bos`` names another token for the BOS.

        Raises:
            TokenizerError: it is no tokenizer, or lacks a token that ``document_ends`` needs.
            OSError: it cannot be read.
        """
        file = _file_of(Path(path))
        tokenizer = Tokenizer.parse(file.read_bytes(), str(file))
        config = _read_config(file.with_name(CONFIG))
        tokenizer.bos_id = tokenizer._named(config.get("bos_token"), tokenizer.bos_id)
        tokenizer.eos_id = tokenizer._named(config.get("eos_token"), tokenizer.eos_id)
        if bos is not None:
            tokenizer.bos_id = tokenizer._named(bos, NONE)
            if tokenizer.bos_id == NONE:
                raise TokenizerError(
                    f'{file} has no token "{bos}"; name one of its own with --bos'
                )
        tokenizer._require(document_ends, str(file))
        return tokenizer

    @staticmethod
    def parse(content: bytes, name: str) -> Tokenizer:
        """A tokenizer from its file's content and name alone. Raises TokenizerError."""
        kind = HfTokenizer if name.endswith(".json") else SentencePiece
        return kind(content, name)

    def _require(self, document_ends: str, name: str) -> None:
        if document_ends != "eos" and self.bos_id == NONE:
            raise TokenizerError(
                f"{name} has no BOS token that is known; name the one that is to open every document with --bos, "
                "or prepare with --document-ends eos"
            )
        if document_ends != "bos" and self.eos_id == NONE:
            raise TokenizerError(
                f"{name} has no EOS token that is known; prepare with --document-ends bos"
            )

    def _named(self, token: str | None, otherwise: int) -> int:
        """The id of a token, or ``otherwise`` where there is no such token."""
        identity = self._id_of(token) if token else None
        return otherwise if identity is None else identity

    def _id_of(self, token: str) -> int | None:
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without BOS or EOS; special tokens spelled out in it are text."""
        return np.asarray(self.encode_batch([text])[0]).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int] | np.ndarray]:
        """Token ids of each text; a long one's as an array, which takes a tenth of a list's memory."""
        # All short ones in one call: the encoders spread them over the cores.
        ids_of_short_texts = iter(
            self._encode([text for text in texts if len(text) <= LONG])
        )
        result: list[list[int] | np.ndarray] = []
        for text in texts:
            if len(text) <= LONG:
                result.append(next(ids_of_short_texts))
            else:
                result.append(self._encode_long(text))
        return result

    def _encode_long(self, text: str) -> np.ndarray:
        parts = []
        for part in self._parts(text):
            [ids] = self._encode([part])
            parts.append(np.array(ids, np.uint32))
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def _encode(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def _parts(self, text: str) -> Iterator[str]:
        start = 0
        while start < len(text):
            word_end = WORD_END.search(text, start + LONG, start + 2 * LONG)
            end = word_end.end() if word_end else start + 2 * LONG
            yield text[start:end]
            start = end
            if word_end and self.adds_prefix:
                start += 1  # the next part's own prefix stands for its space


def store_tokenizer(manifest: Manifest) -> Tokenizer:
    """The tokenizer of a token store. Raises StoreError where the file is not the one that made its tokens."""
    path = manifest.folder / manifest.tokenizer
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != manifest.tokenizer_sha256:
        raise StoreError(f"{path} is missing or damaged (SHA-256 differs); {AGAIN}")
    tokenizer = Tokenizer.parse(content, str(path))
    # What opens and closes a document was decided when the store was made.
    tokenizer.bos_id = manifest.bos_id
    if manifest.eos_id is not None:
        tokenizer.eos_id = manifest.eos_id
    return tokenizer


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in (HfTokenizer.file, SentencePiece.file):
        if (path / name).is_file():
            return path / name
    raise TokenizerError(
        f"{path} has neither {HfTokenizer.file} nor {SentencePiece.file}; name the file itself"
    )


def _read_config(path: Path) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names; nothing where there is no such file."""
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"{path} is not JSON ({error}); fetch it again, or take it away"
        ) from error
    named = {}
    for key in ("bos_token", "eos_token"):
        token = raw.get(key) if isinstance(raw, dict) else None
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if isinstance(token, str):
            named[key] = token
    return named


class SentencePiece(Tokenizer):
    """``decode(encode(text)) == text`` for every text when the model is one of ``train_tokenizer``; a model from
    elsewhere may normalise what it reads."""

    file = "tokenizer.model"

    def __init__(self, model: bytes, name: str = "tokenizer"):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(
                f"{name} is not a SentencePiece model; give one, or a tokenizer.json"
            ) from error
        self.model = model
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        self.eos_id = self._model.eos_id()
        self.adds_prefix = self._model.encode("a", out_type=str)[0].startswith(SPACE)
        bytes_of_space = [
            self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()
        ]
        # Only where a text may be encoded in parts: bytes are pieces, and no part gets a space of its own.
        self._space_ids: list[int] | None = None
        if all(map(self._model.is_byte, bytes_of_space)) and not self.adds_prefix:
            self._space_ids = bytes_of_space

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids)))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [
            self._encode_spaces(text) if SPACE in text else self._model.encode(text)
            for text in texts
        ]

    def _id_of(self, token: str) -> int | None:
        identity = self._model.piece_to_id(token)
        return None if identity == self._model.unk_id() else int(identity)

    def _encode_spaces(self, text: str) -> list[int]:
        """Token ids of a text with real U+2581 in it: their bytes, between the tokens of what stands between them."""
        if self._space_ids is None:
            return list(self._model.encode(text))
        result: list[int] = []
        for number, part in enumerate(self._model.encode(text.split(SPACE))):
            if number > 0:
                result += self._space_ids
            result += part
        return result


class HfTokenizer(Tokenizer):
    """A tokenizer.json, such as Llama 3's. BOS is what it puts before a text itself, or a token of a known name; so it
    is where no tokenizer_config.json names another."""

    file = "tokenizer.json"

    def __init__(self, model: bytes, name: str = "tokenizer"):
        try:
            self._model = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # the library raises nothing more specific
            raise TokenizerError(
                f"{name} is not a tokenizer.json ({error}); give one of Hugging Face's"
            ) from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        self.model = model
        self.bos_id = self._own_bos()
        self.eos_id = self._first_known(EOS)
        self.vocab_size = (
            max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        )
        self.adds_prefix = (
            not self._model.encode("a", add_special_tokens=False)
            .tokens[0]
            .startswith("a")
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids), skip_special_tokens=False))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._model.encode_batch_fast(
                texts, add_special_tokens=False
            )
        ]

    def _own_bos(self) -> int:
        put_before_a_text = self._model.encode("").ids
        if (
            put_before_a_text
            and self._model.id_to_token(put_before_a_text[0]) not in EOS[:-1]
        ):
            return int(put_before_a_text[0])
        return self._first_known(BOS)

    def _first_known(self, names: Sequence[str]) -> int:
        for name in names:
            identity = self._id_of(name)
            if identity is not None:
                return identity
        return NONE

    def _id_of(self, token: str) -> int | None:
        identity = self._model.token_to_id(token)
        return None if identity is None else int(identity)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE tokenizer of exactly ``vocab_size`` pieces: the same texts give the same bytes.

    Ids: 0 unknown (never produced, thanks to byte fallback), 1 BOS, 2 EOS, then 256 bytes. Nothing is
    normalised, so that code keeps its newlines, tabs and indentation; digits are split.

    Raises:
        TokenizerError: no text, or a vocabulary that is too large or too small for it.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            # Rare characters are left to byte fallback instead of taking a small vocabulary's room.
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=2
            ** 30,  # a document is one sentence; longer ones would be dropped
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or "there is no text to train on"
        raise TokenizerError(
            f"cannot train a tokenizer of {vocab_size} pieces: {reason}"
        ) from error
    return SentencePiece(model.getvalue())
