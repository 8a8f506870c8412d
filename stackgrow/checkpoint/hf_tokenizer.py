"""A token store's tokenizer as transformers loads it: a tokenizer.json with the ids that the model was trained on.

A SentencePiece model is written down again as a tokenizer.json: transformers 5 would otherwise build one itself, which
gives other ids after line ends and runs of spaces. What was written is then compared with the store's tokenizer on
texts that are hard for tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from stackgrow import seal
from stackgrow.data.tokenizer import NONE, SPACE, HfTokenizer, SentencePiece, Tokenizer

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
# One of each kind that tokenizers are known to differ on.
HARD_TEXTS = {
    "prose": "The quick brown fox jumps over the lazy dog. It didn't care, did it?",
    "code": "def f(x):\n    if x:\n        return x  # 1234\n\tTab\n\n\nclass A:\n    pass\n",
    "space after a line end": "a:\n    return x",
    "two spaces": "Hello  world.",
    "run of spaces": "a" + " " * 17 + "b" + " " * 64 + "c",
    "leading space": " leading",
    "leading spaces": "    four",
    "trailing spaces": "trailing   ",
    "spaces alone": "   ",
    "tabs": "\ta\t\tb",
    "line ends": "\n\na\n\n\n",
    "CRLF": "one\r\ntwo\r\n\r\nthree\r",
    "numbers": "3.14159 1,000,000 0x1F 2024-01-05",
    "punctuation": "...!?--==(([[{{}}]]))<<>>//\\\\",
    "repeated letters": "aaaaaaaaaaa bbbbbbb ------- =======",
    "accents": "naïve café Ångström coöperate",
    "combining accents": "e\u0301 n\u0303 a\u030a",
    "CJK": "日本語のテキスト。中文文本，没有空格。한국어",
    "Cyrillic, Greek, Arabic, Devanagari": "Привет мир γειά σου مرحبا नमस्ते",
    "emoji": "😀👍🏽👨‍👩‍👧‍👦🇩🇪",
    "rare characters": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ꙮ 𒀀",
    "kinds of spaces": "a\u00a0b\u2003c\u3000d\u200be\ufefff",
    "control characters": "a\x01b\x7fc\u2028d",
    "markup": '<p class="x">a &amp; b</p> [link](http://example.com/?q=1#a)',
}
UNDERLINE = (
    "texts that hold the character \u2581 (U+2581) itself, which SentencePiece writes for a space and which other text "
    "hardly ever has"
)
PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")


@dataclass(frozen=True)
class StoredTokenizer:
    """A token store's tokenizer. ``document_ends``: "bos" where the store's documents begin with BOS and have no EOS,
    "eos" or "both"; ``samples``: texts of the store."""

    tokenizer: Tokenizer
    document_ends: str = "bos"
    samples: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def document_end_ids(self) -> list[int]:
        """The ids at which a document is over, EOS first: its own EOS, and the BOS of the next. Where nothing but a BOS
        stands between documents, EOS is named too: fine-tuning may use it."""
        ends = []
        for token in (self.tokenizer.eos_id, self.tokenizer.bos_id):
            if token != NONE and token not in ends:
                ends.append(token)
        return ends

    @property
    def trained_end_id(self) -> int:
        """The one that the model was trained to end a document with."""
        return (
            self.tokenizer.bos_id
            if self.document_ends == "bos"
            else self.tokenizer.eos_id
        )


@dataclass(frozen=True)
class ExportedTokenizer:
    """What ``write_tokenizer`` wrote: the ids of special tokens, for config.json; how many texts tokenizer.json was
    compared on, and the names of those to which it gives other ids than the store's tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    end: str
    pad: str | None
    texts: int
    differing: tuple[str, ...]

    @property
    def card_section(self) -> str:
        """What the model card says of it."""
        lines = [f"It ends a document with `{self.end}`, which ends generation."]
        if self.pad:
            lines.append(f"`{self.pad}` is for padding: no text has it.")
        else:
            lines.append(
                "There is no token for padding; add one before fine-tuning in batches."
            )
        same = self.texts - len(self.differing)
        lines.append(
            f"tokenizer.json gives the ids of the tokenizer of training on {same} of {self.texts} sample texts."
        )
        if self.differing:
            lines.append(f"It differs on: {', '.join(self.differing)}.")
        return "\n## Tokenizer\n\n" + "\n".join(lines) + "\n"


def write_tokenizer(
    folder: Path, stored: StoredTokenizer, seq_len: int | None
) -> ExportedTokenizer:
    """Writes tokenizer.json and tokenizer_config.json, and for other programs the tokenizer.model that there is.

    A text begins with BOS, as documents do in training; where those end in EOS and have no BOS, it begins with the EOS
    of the one before. tokenizer.json is compared with the store's tokenizer on HARD_TEXTS and the store's own.

    transformers takes a special token that is spelled out in a text for that token; here it is text.
    """
    tokenizer = stored.tokenizer
    if isinstance(tokenizer, SentencePiece):
        model = from_sentencepiece(tokenizer)
        (folder / tokenizer.file).write_bytes(tokenizer.model)
    else:
        model = tokenizers.Tokenizer.from_buffer(tokenizer.model)
    bos = str(model.id_to_token(tokenizer.bos_id))
    if model.encode("").ids != [tokenizer.bos_id]:
        model.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)]
        )
    model.save(str(folder / TOKENIZER_JSON))

    end = str(model.id_to_token(stored.trained_end_id))
    pad = _pad_token(model, tokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": bos,
        "eos_token": end,
    }
    if pad is not None:
        config["pad_token"] = pad
    if isinstance(tokenizer, SentencePiece):
        config["unk_token"] = _unknown(_proto(tokenizer))
        config["add_prefix_space"] = tokenizer.adds_prefix
    if seq_len:
        config["model_max_length"] = seq_len
    seal.write_json(folder / TOKENIZER_CONFIG, config)

    texts = {**HARD_TEXTS, UNDERLINE: f"a {SPACE}b"}
    for number, sample in enumerate(stored.samples):
        texts[f"text {number} of the store"] = sample
    ends = stored.document_end_ids
    return ExportedTokenizer(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=None if pad is None else model.token_to_id(pad),
        end=end,
        pad=pad,
        texts=len(texts),
        differing=_differing(folder / TOKENIZER_JSON, tokenizer, texts),
    )


def _pad_token(model: tokenizers.Tokenizer, tokenizer: Tokenizer) -> str | None:
    """A token to fill up batches with, which no text has: one that is called so, or the unknown token of a model that
    falls back to bytes. EOS would not do, as what is filled up is left out of the loss."""
    for name in PADS:
        if model.token_to_id(name) is not None:
            return name
    if isinstance(tokenizer, SentencePiece):
        proto = _proto(tokenizer)
        if proto.trainer_spec.byte_fallback:
            return _unknown(proto)
    return None


def _differing(
    file: Path, tokenizer: Tokenizer, texts: dict[str, str]
) -> tuple[str, ...]:
    written = HfTokenizer(file.read_bytes(), str(file))
    return tuple(
        name
        for name, text in texts.items()
        if written.encode(text) != tokenizer.encode(text)
    )


def write_generation_config(folder: Path, tokenizer: ExportedTokenizer) -> None:
    """What ``generate`` reads: where to begin, to stop and to fill up."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    seal.write_json(
        folder / GENERATION_CONFIG,
        {name: token for name, token in ids.items() if token is not None},
    )


# SentencePiece -> tokenizer.json.


def from_sentencepiece(tokenizer: SentencePiece) -> tokenizers.Tokenizer:
    """The same tokenizer for Hugging Face's library, ids and all.

    SentencePiece joins the neighbours whose joint piece has the best score, the library those whose pair stands first
    in a list: the list has every way to split a piece, in the order of the pieces' scores.
    """
    proto = _proto(tokenizer)
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        model: Any = models.Unigram(
            scores, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback
        )
    else:
        vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
        model = models.BPE(
            vocab=vocabulary,
            merges=_merges(proto),
            unk_token=_unknown(proto),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    made = tokenizers.Tokenizer(model)
    made.normalizer = _normalizer(proto.normalizer_spec)
    made.decoder = _decoder(proto.normalizer_spec)
    special = []
    own = []
    for piece in proto.pieces:
        if piece.type in (piece.CONTROL, piece.UNKNOWN):
            special.append(AddedToken(piece.piece, normalized=False, special=True))
        elif piece.type == piece.USER_DEFINED:
            own.append(AddedToken(piece.piece.replace(SPACE, " "), normalized=False))
    made.add_special_tokens(special)
    made.add_tokens(own)
    return made


def _proto(tokenizer: SentencePiece) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)


def _unknown(proto: Any) -> str:
    return str(proto.pieces[proto.trainer_spec.unk_id].piece)


def _merges(proto: Any) -> list[tuple[str, str]]:
    scores = {
        piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL
    }
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                ranked.append((score, len(left), left, right))
    ranked.sort(key=lambda merge: (-merge[0], -merge[1]))
    return [(left, right) for _, _, left, right in ranked]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Strip())
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> decoders.Decoder:
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
