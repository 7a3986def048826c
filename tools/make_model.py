"""Make a small random Qwen3 model with a real tokenizer: ``python -m tools.make_model OUT_DIR --dtype float32``.

The weights are random but not careless. Attention is sharp (the query and key norms are above 1) and every block adds
about as much as it receives, so the next token depends on the whole prompt: a decoder that reads a wrong KV cache says
something else at once. The output head is wide, so that two candidates rarely come close enough for rounding to
decide between them.

The tokenizer is a byte-level BPE, trained in a few seconds on the English of Python's own language reference. The same
Python version and arguments give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Grows when the files of the same arguments change.
RECIPE = 1
STAMP = "kvlink-model.json"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Words that the language reference lacks and the demo's prompts need.
TOPIC = (
    "Explain the significance of KV cache in language models in English. A language model reads a prompt, computes a "
    "key and a value for every token in every layer, and keeps them in the KV cache, so that each new token attends to "
    "all earlier ones without computing them again. Disaggregated prefill splits the work: one engine computes the "
    "prompt, the cache moves over the network, and another engine decodes the answer, one token after the other. "
)


@dataclass(frozen=True)
class ModelSpec:
    """What the model looks like.

    Attributes:
        dtype: Of the stored weights: "float32" or "bfloat16".
        layers: Decoder layers.
        hidden: Width of the residual stream.
        intermediate: Width of the MLP.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Elements of one head.
        max_positions: Longest context, tokens.
        vocabulary: Upper limit of the tokenizer's entries.
        seed: Of the weights.
    """

    dtype: str = "float32"
    layers: int = 8
    hidden: int = 512
    intermediate: int = 1024
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    max_positions: int = 32768
    vocabulary: int = 4096
    seed: int = 20260101


def _corpus() -> Iterator[str]:
    """Yield English text that every CPython ships, and ours about the topic."""
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield topics.topics[name]
    for _ in range(20):
        yield TOPIC


def _write_tokenizer(folder: Path, spec: ModelSpec) -> int:
    """Train and save the tokenizer; return its number of entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer=trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": spec.max_positions,
        "eos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", config)
    return int(tokenizer.get_vocab_size())


def _weights(spec: ModelSpec, vocabulary: int) -> dict[str, torch.Tensor]:
    """Return the random weights by their Qwen3 names."""
    import torch

    generator = torch.Generator().manual_seed(spec.seed)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[spec.dtype]

    def normal(rows: int, columns: int, deviation: float) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * deviation).to(dtype)

    def linear(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return normal(rows, columns, gain * columns**-0.5)  # keeps the variance of what comes in

    def constant(width: int, value: float) -> torch.Tensor:
        return torch.full((width,), value, dtype=dtype)

    query, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    weights = {"model.embed_tokens.weight": normal(vocabulary, spec.hidden, 1.0)}
    for layer in range(spec.layers):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": constant(spec.hidden, 1.0),
            f"{name}.self_attn.q_proj.weight": linear(query, spec.hidden),
            f"{name}.self_attn.k_proj.weight": linear(keys, spec.hidden),
            f"{name}.self_attn.v_proj.weight": linear(keys, spec.hidden),
            f"{name}.self_attn.o_proj.weight": linear(spec.hidden, query, 1.5),
            f"{name}.self_attn.q_norm.weight": constant(spec.head_dim, 1.6),
            f"{name}.self_attn.k_norm.weight": constant(spec.head_dim, 1.6),
            f"{name}.post_attention_layernorm.weight": constant(spec.hidden, 1.0),
            f"{name}.mlp.gate_proj.weight": linear(spec.intermediate, spec.hidden),
            f"{name}.mlp.up_proj.weight": linear(spec.intermediate, spec.hidden),
            f"{name}.mlp.down_proj.weight": linear(spec.hidden, spec.intermediate),
        }
    weights["model.norm.weight"] = constant(spec.hidden, 1.0)
    weights["lm_head.weight"] = linear(vocabulary, spec.hidden, 4.0)
    return weights


def _config(spec: ModelSpec, vocabulary: int) -> dict[str, object]:
    """Return the content of config.json."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": spec.dtype,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _stamp(spec: ModelSpec) -> dict[str, object]:
    """Return what the files depend on: our arguments, this recipe, and the text the tokenizer is trained on."""
    digest = hashlib.sha256()
    for text in _corpus():
        digest.update(text.encode())
    return {"recipe": RECIPE, "spec": asdict(spec), "corpus": digest.hexdigest()}


def make_model(out: Path, spec: ModelSpec | None = None) -> Path:
    """Write the model into a folder, unless the same model stands there already.

    The folder appears complete or not at all, so that two processes may ask for the same one at once.

    Args:
        out: The folder; one that holds something other than an earlier model is refused.
        spec: What to make; None for the default.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: ``out`` exists and is no model made by this program.
    """
    spec = spec or ModelSpec()
    out = out.absolute()
    stamp = _stamp(spec)
    if (out / STAMP).is_file() and json.loads((out / STAMP).read_text(encoding="utf-8")) == stamp:
        return out
    if out.exists() and any(out.iterdir()) and not (out / STAMP).is_file():
        raise FileExistsError(f"{out} exists and holds no model of this program; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        from safetensors.torch import save_file

        draft.chmod(0o755)
        vocabulary = _write_tokenizer(draft, spec)
        save_file(_weights(spec, vocabulary), draft / "model.safetensors", metadata={"format": "pt"})
        _write_json(draft / "config.json", _config(spec, vocabulary))
        _write_json(draft / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 0, "do_sample": False})
        _write_json(draft / STAMP, stamp)
        _replace(draft, out, stamp)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def _replace(draft: Path, out: Path, stamp: dict[str, object]) -> None:
    """Move the finished draft to its place; another process that was faster with the same model wins."""
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}-old-", dir=out.parent))
        out.replace(old / "model")
        shutil.rmtree(old, ignore_errors=True)
    try:
        draft.replace(out)
    except OSError:
        if not (out / STAMP).is_file() or json.loads((out / STAMP).read_text(encoding="utf-8")) != stamp:
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: Arguments; None for the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.make_model", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder to make; kept when it is up to date")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the stored weights")
    parser.add_argument("--layers", type=int, default=ModelSpec.layers, help="decoder layers (%(default)s)")
    parser.add_argument("--seed", type=int, default=ModelSpec.seed, help="of the weights (%(default)s)")
    args = parser.parse_args(argv)
    try:
        out = make_model(args.out, ModelSpec(dtype=args.dtype, layers=args.layers, seed=args.seed))
    except OSError as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {args.dtype}, {args.layers} layers, {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
