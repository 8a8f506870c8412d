"""SentencePiece BPE tokenizers that give every byte of a text back."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

# SentencePiece writes a space as U+2581, so that a real U+2581 would come back as a space.
SPACE = "\u2581"


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or read; the message says what to change."""


class Tokenizer:
    """A SentencePiece model and the SHA-256 of its bytes.

    ``decode(encode(text)) == text`` for every text when the model is one of ``train_tokenizer``; a model from
    elsewhere may normalise what it reads.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TokenizerError(f"{name} is not a SentencePiece model; give a tokenizer.model file") from error
        if self._model.bos_id() < 0:
            raise TokenizerError(f"{name} has no BOS token; every document must begin with one")
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        adds_prefix = self._model.encode("a", out_type=str)[0].startswith(SPACE)
        # Only where a text may be encoded in parts: bytes are pieces, and no part gets a space of its own.
        self._space_ids = ids if all(map(self._model.is_byte, ids)) and not adds_prefix else None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in file ``path``. Raises TokenizerError if it is not one, OSError if unreadable."""
        return cls(Path(path).read_bytes(), str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all CPU cores."""
        batch: list[list[int]] = self._model.encode(list(texts), num_threads=-1)
        if self._space_ids is not None:
            for i, text in enumerate(texts):
                if SPACE in text:
                    batch[i] = self._encode_with_space_sign(text, self._space_ids)
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids)))

    def _encode_with_space_sign(self, text: str, space_ids: list[int]) -> list[int]:
        first, *rest = self._model.encode(text.split(SPACE))
        return [*first, *(i for part in rest for i in (*space_ids, *part))]


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
    return Tokenizer(model.getvalue())
