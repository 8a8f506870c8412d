"""Generates with llama.cpp from an export: FOLDER PROMPT [EOS]. Prints the ids of at most 20 tokens, as JSON.

Run by a Python that has gpt4all, which brings llama.cpp, and gguf, llama.cpp's own reader of what ends a text; ``EOS``
is stated instead of that. The tensors are laid out as llama.cpp's convert_hf_to_gguf.py does for LlamaForCausalLM.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
from gpt4all import GPT4All
from safetensors.numpy import load_file

CONTEXT = 256
FLOAT32 = 0  # gguf's number of it


def write_gguf(folder: Path, file: Path, eos_id: int | None) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FLOAT32)
    add_tokenizer(writer, folder, eos_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in tensors(folder).items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleaved(tensor, heads)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(theirs, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face rotates halves of a head, llama.cpp neighbours."""
    rows, columns = tensor.shape
    halves = tensor.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, eos_id: int | None) -> None:
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    ids = range(pieces.vocab_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types([token_type(pieces, i) for i in ids])
    special = gguf.SpecialVocab(folder, load_merges=False)
    if eos_id is not None:
        special.special_token_ids["eos"] = eos_id
    special.add_to_gguf(writer)


def token_type(pieces: sentencepiece.SentencePieceProcessor, i: int) -> int:
    if pieces.is_unknown(i):
        return gguf.TokenType.UNKNOWN
    if pieces.is_control(i):
        return gguf.TokenType.CONTROL
    if pieces.is_byte(i):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def generated(file: Path, prompt: str) -> list[int]:
    model = GPT4All(
        file.name,
        model_path=str(file.parent),
        allow_download=False,
        device="cpu",
        n_ctx=CONTEXT,
    )
    ids: list[int] = []

    def take(token: int, text: str) -> bool:
        ids.append(token)
        return True

    model.generate(prompt, max_tokens=20, temp=0.0, callback=take)
    return ids


if __name__ == "__main__":
    export = Path(sys.argv[1])
    made = export / "model.gguf"
    write_gguf(export, made, int(sys.argv[3]) if len(sys.argv) > 3 else None)
    print(json.dumps(generated(made, sys.argv[2])))
