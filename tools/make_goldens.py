#!/usr/bin/env python3
"""Golden tokens and logits of a real model, computed by an implementation independent of this project.

    python tools/make_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf           # writes tests/goldens/smollm2_135m_q4_1.*
    python tools/make_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf --check   # recomputes and compares

The GGUF's weights are dequantised by the ``gguf`` package, placed by transformers' own GGUF reader (and, as a check,
once more by the formulas below), and run by transformers' ``LlamaForCausalLM`` in float32 on the CPU. Tokens are a
plain arg max loop: no generation configuration, no sampling, no end of sequence. Needs the extra ``parity``.

A prompt is only used if every step is decided by more than ``MIN_MARGIN``, so that float32 rounding cannot flip a
token.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import platform
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

FORMAT = "orcd-goldens"
FORMAT_VERSION = 1
NAME = "smollm2_135m_q4_1"
STEPS = 32
MIN_MARGIN = 1e-3
TOP = 50
SAMPLED_IDS = 512
SAMPLE_SEED = 20_240
CHECK_LOGITS = 1e-4  # another CPU may order float32 sums differently; measured differences stay below this

STORY = (
    "The lighthouse keeper had counted ships for thirty-one years. Each evening she wrote the date, the wind and "
    "the names she could read through the brass telescope, and each morning she carried the book down ninety-four "
    "steps to the harbour office, where a young clerk copied the list in blue ink. Nobody had ever asked her what "
    "she thought of the ships. She thought about them a good deal. The grey ones, she believed, were tired; the "
    "white ones were vain; the small fishing boats, painted in whatever colour had been cheap that spring, were the"
    " only ones that ever seemed glad to come home. One night in November a boat came in without lights. It did not"
    " answer the horn, and it did not turn when she swung the beam across its bow. She wrote in the book: unknown "
    "vessel, no lights, heading north. Then she took her coat and her lamp and went down the ninety-four steps "
    "without the book, for the first time in thirty-one years. On the quay the clerk was already waiting. He had "
    "seen it too. His hands were blue with ink and with cold, and he said that there was a name painted on the "
    "side, but that he could not read it, because it was written in letters he had only ever seen once before, on "
    "the first page of her first book, in her own hand. She held the lamp higher. The boat touched the stones as "
    "gently as a cat, and from the dark cabin a voice said her name. She answered"
)

CODE = '''def fibonacci(n: int) -> int:
    """Return the n-th Fibonacci number."""
    if n < 2:
        return n
'''


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A candidate: what it exercises, and its text. ``chat`` wraps it as a user's message by the chat template."""

    name: str
    text: str
    chat: bool = False


CANDIDATES = (
    Prompt("plain_english", "The capital of France is"),
    Prompt("single_token", "The"),
    Prompt("science", "Water boils at a lower temperature on a mountain because"),
    Prompt("code", CODE),
    Prompt("numbers", "1, 2, 4, 8, 16, 32, 64,"),
    Prompt("arithmetic_table", "3 x 1 = 3\n3 x 2 = 6\n3 x 3 = 9\n3 x  4 = 12\n"),
    Prompt("emoji", "I love pizza 🍕 and ice cream 🍦! My favourite"),
    Prompt("multilingual", "Der schnelle braune Fuchs springt über den faulen Hund. Le chat est"),
    Prompt("other_scripts", "你好，世界！ Привет, мир! こんにちは"),
    Prompt("json", '{"name": "Ada Lovelace", "born": 1815, "occupation": "'),
    Prompt("whitespace", "Shopping list:\n\n  - apples\n\t- 12  eggs\n\n\n  - "),
    Prompt("chat", "Write a haiku about GPU computing", chat=True),
    Prompt("chat_question", "What is the largest planet in the solar system?", chat=True),
    Prompt("three_blocks", STORY),
    Prompt("repetition", "row row row your boat " * 6),
    Prompt("quotation", "To be, or not to be, that is the"),
)


@dataclasses.dataclass(frozen=True)
class Golden:
    """What the reference computed for one prompt.

    Attributes:
      ids: the prompt's token ids.
      tokens: ``[STEPS]`` greedy tokens.
      margins: ``[STEPS]`` difference between the two highest logits of each step.
      logits: ``[vocab]`` float32, of the prompt's last position.
      text_out: the tokens as text.
    """

    prompt: Prompt
    text: str
    ids: list[int]
    tokens: list[int]
    margins: list[float]
    logits: NDArray[np.float32]
    text_out: str


def read_gguf(path: Path, model: transformers.LlamaForCausalLM | None = None) -> dict[str, dict[str, Any]]:
    """What transformers reads of a GGUF file: ``config`` and, for a model to be filled, ``tensors`` by its names."""
    read: Callable[..., dict[str, dict[str, Any]]] = load_gguf_checkpoint
    return read(str(path), return_tensors=model is not None, model_to_load=model)


class Reference:
    """transformers' float32 model and tokenizer of one GGUF file."""

    def __init__(self, path: Path) -> None:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        values = read_gguf(path)["config"]
        if values.pop("model_type") != "llama":
            raise SystemExit(f"{path} is not a llama model")
        values.pop("_model_name_or_path", None)
        config = transformers.LlamaConfig.from_dict({**values, "attn_implementation": "eager", "dtype": "float32"})
        self.model = transformers.LlamaForCausalLM(config).train(False)
        weights = read_gguf(path, self.model)["tensors"]
        self._check_placement(path, weights, config)
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
            raise SystemExit(f"the GGUF does not fill the model: missing {missing}, unexpected {unexpected}")
        self.model.tie_weights()
        self.tensor_types = sorted({t.tensor_type.name for t in gguf.GGUFReader(path).tensors})
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # transformers drops `tokenizer.ggml.pre`. For `smollm` it means: digits one by one, then GPT-2's pattern, as in
        # the model's original tokenizer.json; it changes spaces before digits.
        pre = gguf.GGUFReader(path).get_field("tokenizer.ggml.pre")
        if pre is None or pre.contents() != "smollm":
            raise SystemExit("only the pre-tokeniser `smollm` is known here")
        self.tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )

    @staticmethod
    def _check_placement(path: Path, weights: dict[str, torch.Tensor], config: transformers.LlamaConfig) -> None:
        """Places every tensor a second time, from the definition of the format, and compares bit by bit.

        ``llama`` files hold q and k with the rows of each head interleaved: (0, h/2, 1, h/2 + 1, …).
        """
        names = {
            "token_embd": "model.embed_tokens",
            "output_norm": "model.norm",
            "output": "lm_head",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }
        seen = set()
        for tensor in gguf.GGUFReader(path).tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            parts = tensor.name.split(".")
            if parts[0] == "blk":
                name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
            else:
                name = f"{names[parts[0]]}.weight"
            if parts[-2] in ("attn_q", "attn_k"):
                heads = int(config.num_attention_heads if parts[-2] == "attn_q" else config.num_key_value_heads or 0)
                half = values.shape[0] // heads // 2
                values = values.reshape(heads, half, 2, -1).transpose(0, 2, 1, 3).reshape(values.shape)
            if not np.array_equal(values, weights[name].numpy()):
                raise SystemExit(f"transformers and gguf place {tensor.name} differently")
            seen.add(name)
        if seen != set(weights):
            raise SystemExit(f"transformers and gguf disagree about {sorted(seen ^ set(weights))}")

    @torch.no_grad()
    def run(self, prompt: Prompt) -> Golden:
        """Greedy tokens, margins and prefill logits of one prompt.

        Raises:
          SystemExit: decoding with a cache and one pass over the whole sequence choose different tokens.
        """
        text = prompt.text
        if prompt.chat:
            message = [{"role": "user", "content": text}]
            text = str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        cache, step = None, torch.tensor([ids])
        tokens: list[int] = []
        margins: list[float] = []
        first: NDArray[np.float32] | None = None
        for _ in range(STEPS):
            out = self.model(step, past_key_values=cache, use_cache=True)
            logits, cache = out.logits[0, -1], out.past_key_values
            first = logits.numpy().astype(np.float32) if first is None else first
            top = torch.topk(logits, 2).values
            margins.append(float(top[0] - top[1]))
            tokens.append(int(logits.argmax()))
            step = torch.tensor([tokens[-1:]])
        whole = self.model(torch.tensor([ids + tokens[:-1]]), use_cache=False).logits[0, len(ids) - 1 :]
        if whole.argmax(-1).tolist() != tokens:
            raise SystemExit(f"{prompt.name}: cached and uncached passes disagree")
        assert first is not None
        return Golden(prompt, text, ids, tokens, margins, first, str(self.tokenizer.decode(tokens)))


def sampled_ids(vocab_size: int) -> NDArray[np.int32]:
    """The fixed random ids whose logits are kept besides the top ones."""
    ids = np.random.default_rng(SAMPLE_SEED).choice(vocab_size, SAMPLED_IDS, replace=False)
    return np.sort(ids).astype(np.int32)


def arrays_of(goldens: list[Golden]) -> dict[str, NDArray[np.generic]]:
    """The arrays of the .npz, one row a prompt."""
    logits = np.stack([g.logits for g in goldens])
    top = np.argsort(-logits, axis=1, kind="stable")[:, :TOP].astype(np.int32)
    ids = sampled_ids(logits.shape[1])
    wide = logits.astype(np.float64)
    return {
        "top_ids": top,
        "top_logits": np.take_along_axis(logits, top, axis=1),
        "sampled_ids": ids,
        "sampled_logits": logits[:, ids],
        "logsumexp": np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1),
        "mean": wide.mean(1),
        "standard_deviation": wide.std(1),
    }


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def document_of(path: Path, reference: Reference, goldens: list[Golden], rejected: list[Golden]) -> dict[str, object]:
    """The content of the .json."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": {
            "file": path.name,
            "size_bytes": path.stat().st_size,
            "sha256": sha256_of(path),
            "tensor_types": reference.tensor_types,
        },
        "made_by": {
            "command": f"python tools/make_goldens.py {path.name}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("torch", "transformers", "tokenizers", "gguf", "numpy")},
            "model": "transformers.LlamaForCausalLM, float32, eager attention, CPU, one thread, deterministic",
            "weights": "dequantised by gguf.dequantize; placed by transformers' GGUF reader and, bit for bit the same, "
            "from the format's definition",
            "tokenizer": "transformers' GGUF tokenizer with the pre-tokeniser `smollm` (Digits one by one, then "
            "ByteLevel), which transformers drops",
            "tokens": "arg max of the last logits, KV cache; equal to the arg max of one uncached pass; end of "
            "sequence is ignored",
        },
        "steps": STEPS,
        "minimum_margin": MIN_MARGIN,
        "rejected": [
            {"name": g.prompt.name, "text": g.prompt.text, "step": int(np.argmin(g.margins)), "margin": min(g.margins)}
            for g in rejected
        ],
        "prompts": [
            {
                "name": g.prompt.name,
                "text": g.text,
                **({"user_message": g.prompt.text} if g.prompt.chat else {}),
                "ids": g.ids,
                "tokens": g.tokens,
                "text_out": g.text_out,
                "margins": [round(m, 6) for m in g.margins],
            }
            for g in goldens
        ],
    }


def check(directory: Path, path: Path, goldens: list[Golden]) -> list[str]:
    """What differs between the files in ``directory`` and what was just computed; empty when nothing does."""
    stored = json.loads((directory / f"{NAME}.json").read_text(encoding="utf-8"))
    wrong = []
    if stored["source"]["sha256"] != sha256_of(path):
        wrong.append("the GGUF is another file")
    if [p["name"] for p in stored["prompts"]] != [g.prompt.name for g in goldens]:
        wrong.append("the chosen prompts differ")
    for old, new in zip(stored["prompts"], goldens, strict=False):
        for key, value in (("text", new.text), ("ids", new.ids), ("tokens", new.tokens), ("text_out", new.text_out)):
            if old[key] != value:
                wrong.append(f"{new.prompt.name}: {key} differ")
        apart = float(np.abs(np.subtract(old["margins"], new.margins)).max())
        if apart > CHECK_LOGITS:
            wrong.append(f"{new.prompt.name}: margins differ by {apart:.2g}, limit {CHECK_LOGITS}")
    with np.load(directory / f"{NAME}.npz") as arrays:
        for key, now in arrays_of(goldens).items():
            kept = arrays[key]
            if kept.shape != now.shape:
                wrong.append(f"{key}: shape {kept.shape}, now {now.shape}")
            elif key == "top_ids":
                continue  # near ties may swap places; their logits are compared
            elif (apart := float(np.abs(kept.astype(np.float64) - now.astype(np.float64)).max())) > CHECK_LOGITS:
                wrong.append(f"{key}: differs by {apart:.2g}, limit {CHECK_LOGITS}")
    return wrong


def main() -> int:
    """Makes or checks the goldens; the exit status is 1 when a check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--check", action="store_true", help="recompute and compare; write nothing")
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(__file__).resolve().parent.parent / "tests" / "goldens",
        help="of the files",
    )
    options = parser.parse_args()
    path: Path = options.gguf.resolve()
    if not path.is_file():
        parser.error(f"there is no file {options.gguf}")

    reference = Reference(path)
    goldens: list[Golden] = []
    rejected: list[Golden] = []
    for prompt in CANDIDATES:
        golden = reference.run(prompt)
        (goldens if min(golden.margins) >= MIN_MARGIN else rejected).append(golden)
        print(f"{prompt.name}: {len(golden.ids)} tokens, smallest margin {min(golden.margins):.2g}", file=sys.stderr)

    if options.check:
        wrong = check(options.directory, path, goldens)
        print("\n".join(wrong) or f"{NAME}: {len(goldens)} prompts are as stored")
        return 1 if wrong else 0
    options.directory.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.directory / f"{NAME}.npz", **arrays_of(goldens))  # type: ignore[arg-type]
    text = json.dumps(document_of(path, reference, goldens, rejected), indent=1, ensure_ascii=False)
    text = re.sub(r"\[\n([\d\s,.]+)\]", lambda m: f"[{' '.join(m[1].split())}]", text)  # a list of numbers on one line
    (options.directory / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    print(f"{NAME}: {len(goldens)} prompts kept, {len(rejected)} rejected")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
