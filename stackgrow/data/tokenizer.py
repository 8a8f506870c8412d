"""Tokenizers: SentencePiece models and Hugging Face's tokenizer.json; and training one that gives every byte back."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers

from stackgrow.data.store import AGAIN, Manifest, StoreError

# SentencePiece writes a space as U+2581, so that a real U+2581 would come back as a space.
SPACE = "\u2581"
LONG = 2**20  # characters; a longer text is encoded in parts, since encoders hold some 100 bytes per character
WORD_END = re.compile(r"\w(?= \w)")
# Names to look for where neither a tokenizer_config.json nor the tokenizer itself says which token it is.
BOS = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|endoftext|>")
EOS = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>")
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
    def load(path: str | Path) -> Tokenizer:
        """The tokenizer in file ``path``. Raises TokenizerError if it is not one, OSError if unreadable."""
        content = Path(path).read_bytes()
        kind = HfTokenizer if str(path).endswith(".json") else SentencePiece
        return kind(content, str(path))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without BOS or EOS; special tokens spelled out in it are text."""
        return np.asarray(self.encode_batch([text])[0]).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int] | np.ndarray]:
        """Token ids of each text; a long one's as an array, which takes a tenth of a list's memory."""
        # All short ones in one call: the encoders spread them over the cores.
        ids_of_short_texts = iter(self._encode([text for text in texts if len(text) <= LONG]))
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
    return Tokenizer.load(path)


class SentencePiece(Tokenizer):
    """``decode(encode(text)) == text`` for every text when the model is one of ``train_tokenizer``; a model from
    elsewhere may normalise what it reads."""

    file = "tokenizer.model"

    def __init__(self, model: bytes, name: str = "tokenizer"):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"{name} is not a SentencePiece model; give one, or a tokenizer.json") from error
        if self._model.bos_id() < 0:
            raise TokenizerError(f"{name} has no BOS token; every document must begin with one")
        self.model = model
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()
        self.eos_id = self._model.eos_id()
        self.adds_prefix = self._model.encode("a", out_type=str)[0].startswith(SPACE)
        bytes_of_space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        # Only where a text may be encoded in parts: bytes are pieces, and no part gets a space of its own.
        self._space_ids: list[int] | None = None
        if all(map(self._model.is_byte, bytes_of_space)) and not self.adds_prefix:
            self._space_ids = bytes_of_space

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids)))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [self._encode_spaces(text) if SPACE in text else self._model.encode(text) for text in texts]

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
    """A tokenizer.json, such as Llama 3's. BOS is what it puts before a text itself, or a token of a known name."""

    file = "tokenizer.json"

    def __init__(self, model: bytes, name: str = "tokenizer"):
        try:
            self._model = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # the library raises nothing more specific
            raise TokenizerError(f"{name} is not a tokenizer.json ({error}); give one of Hugging Face's") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        self.model = model
        self.bos_id = self._own_bos()
        if self.bos_id == NONE:
            raise TokenizerError(f"{name} has no BOS token ({', '.join(BOS)}); every document must begin with one")
        self.eos_id = self._first_known(EOS)
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        self.adds_prefix = not self._model.encode("a", add_special_tokens=False).tokens[0].startswith("a")

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids), skip_special_tokens=False))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def _own_bos(self) -> int:
        put_before_a_text = self._model.encode("").ids
        if put_before_a_text and self._model.id_to_token(put_before_a_text[0]) not in EOS[:-1]:
            return int(put_before_a_text[0])
        return self._first_known(BOS)

    def _first_known(self, names: Sequence[str]) -> int:
        for name in names:
            token = self._model.token_to_id(name)
            if token is not None:
                return int(token)
        return NONE


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
            max_sentence_length=2**30,  # a document is one sentence; longer ones would be dropped
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or "there is no text to train on"
        raise TokenizerError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from error
    return SentencePiece(model.getvalue())
