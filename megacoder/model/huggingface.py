"""The transformer to and from a Hugging Face folder, without a changed bit: `LlamaForCausalLM`, with biases of queries,
keys and values `Qwen2ForCausalLM`, with norms of queries and keys `Qwen3ForCausalLM`. A `MistralForCausalLM` without a
sliding window is read as the Llama that it is.

`transformers` and vLLM load what `export_model` writes, llama.cpp's converter too (`tools/convert_gguf.py` says how);
`import_model` reads what they and DeepSeek publish.
Names are already Hugging Face's (`weight_pieces`). Two things differ: the vocabulary's padding is not exported, and
RoPE has several spellings (`megacoder.model.huggingface_rope`).

A Qwen2 gets Qwen's own tokenizer class in transformers 5, thus also in vLLM, which splits text its own way whatever
tokenizer.json says. So a model with biases and another tokenizer leaves as a Llama. A Llama or Qwen3 with biases has
one of the attention's output, too, which is zero.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacoder.checkpoint.dcp import DcpFolder
from megacoder.checkpoint.huggingface import (
    TensorFolder,
    open_tensors,
    read_config,
    write_model_folder,
)
from megacoder.checkpoint.rank_file import bytes_of
from megacoder.checkpoint.reader import CHUNK_ELEMENTS
from megacoder.checkpoint.tensor_file import StoredTensor, dtype_name
from megacoder.core.errors import ConfigError, FormatError
from megacoder.data.chat_format import FormatConfig
from megacoder.data.tokenizer import Tokenizer
from megacoder.data.tokenizer_folder import read_tokenizer_files
from megacoder.model.config import ModelConfig
from megacoder.model.huggingface_rope import rope_from_huggingface, rope_to_huggingface
from megacoder.model.transformer import Transformer, weight_pieces
from megacoder.parallel.tensor import ALONE, TensorParallel

__all__ = [
    "can_load", "check_vocabulary", "config_from_huggingface", "config_to_huggingface", "export_model", "import_model",
    "import_with_tokenizer", "open_folder", "weight_shapes", "write_folder",
]  # fmt: skip

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LLAMA, _MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
_QWEN2, _QWEN3 = "Qwen2ForCausalLM", "Qwen3ForCausalLM"
_FIXED: dict[str, dict[str, Any]] = {
    _LLAMA: {"model_type": "llama", "hidden_act": "silu", "mlp_bias": False},
    _MISTRAL: {"model_type": "mistral", "hidden_act": "silu"},
    _QWEN2: {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False},
    _QWEN3: {"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False},
}
"""By architecture, settings that all our models share; a folder with different ones is refused."""
_WITH_OUTPUT_BIAS = (_LLAMA, _QWEN3)
"""Whose biases are a setting, `attention_bias`, which is one of the output, too."""
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Sizes for which transformers has no default, or a default that nobody means."""
_POSITIONS = {_LLAMA: 2048, _MISTRAL: 131072, _QWEN2: 32768, _QWEN3: 32768}
"""What transformers takes for max_position_embeddings where it is not given."""
_MISTRAL_WINDOW, _QWEN3_HEAD_DIM = 4096, 128
"""And for a Mistral's sliding_window, where null means none, and a Qwen3's head_dim."""


def export_model(
    model: Transformer,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer_folder: Path | None = None,
    chat: FormatConfig | None = None,
) -> None:
    """Writes `folder`, replacing an older one only when complete; memory beyond the model is a few rows.

    `dtype` is float32 or bfloat16, the model's own unless given. With `tokenizer_folder` its files are copied, and the
    ids of BOS, EOS and padding are put in the configuration. `chat` is the format of a model that was tuned with one.
    Raises ConfigError for what transformers would refuse.
    """
    if model.tp.size > 1:
        raise ConfigError(f"a model sharded with tp = {model.tp.size} cannot be exported; export its checkpoint")
    views = {piece.hf_name: piece.view for piece in weight_pieces(model)}
    write_folder(
        folder, model.config,
        lambda name: (rows.flatten() for rows in views[name].split(max(1, CHUNK_ELEMENTS // views[name][0].numel()))),
        dtype=model.lm_head.weight.dtype if dtype is None else dtype,
        tokenizer_folder=tokenizer_folder, chat=chat,
    )  # fmt: skip


def write_folder(
    folder: Path,
    config: ModelConfig,
    stream: Callable[[str], Iterable[Tensor]],
    *,
    dtype: torch.dtype,
    tokenizer_folder: Path | None,
    chat: FormatConfig | None = None,
) -> None:
    """As `export_model`; `stream(name)` yields the elements of a weight in order, in chunks of shape (n,)."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"dtype {dtype}: models are exported in float32 or bfloat16")
    ids: dict[str, int | list[int] | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    files: dict[str, str] = {}
    as_qwen2 = config.head_dim * config.num_attention_heads == config.hidden_size  # Qwen2 has no other
    if tokenizer_folder is not None:
        tokenizer = read_tokenizer_files(tokenizer_folder, max_length=config.max_position_embeddings, chat=chat)
        check_vocabulary(tokenizer.vocab_size, config, tokenizer_folder)
        ids, files = tokenizer.ids, tokenizer.files
        as_qwen2 &= tokenizer.is_qwens
    table = config_to_huggingface(config, dtype, as_qwen2=as_qwen2)
    if table["architectures"] == [_LLAMA] and config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_attention_heads}; "
            "transformers refuses to load such a model"
        )
    zeros = _zero_shapes(config, table)
    shapes = weight_shapes(config) | zeros

    def chunks(name: str) -> Iterable[Tensor]:
        return [torch.zeros(zeros[name])] if name in zeros else stream(name)

    write_model_folder(
        folder,
        config=table | ids,
        generation_config={"do_sample": False} | ids,
        tensors=[StoredTensor(name, dtype_name(dtype), shape) for name, shape in shapes.items()],
        data=lambda name: (bytes_of(chunk.to("cpu", dtype)) for chunk in chunks(name)),
        files=files,
    )


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every weight, in the order in which a forward reads them; takes no memory."""
    with torch.device("meta"):
        return {piece.hf_name: piece.shard.shape for piece in weight_pieces(Transformer(config))}


def _zero_shapes(config: ModelConfig, table: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the biases that a folder with this config.json has and our models lack."""
    if table["architectures"][0] not in _WITH_OUTPUT_BIAS or not table.get("attention_bias"):
        return {}
    layers = range(config.num_hidden_layers)
    return {f"model.layers.{layer}.self_attn.o_proj.bias": (config.hidden_size,) for layer in layers}


def open_folder(folder: Path) -> tuple[ModelConfig, dict[str, Any], TensorFolder | DcpFolder]:
    """(the configuration of a Hugging Face folder, its config.json as read, its weights, checked against it).

    Raises FormatError, one line that names the file, key or tensor at fault, for a folder that is incomplete or holds
    a different architecture.
    """
    table = read_config(folder)
    config = config_from_huggingface(table, where=str(folder / "config.json"))
    tensors = open_tensors(folder)
    ignored = ["rotary_emb.inv_freq"]  # older folders hold this table, which config.json implies
    if config.tie_word_embeddings:
        ignored.append("lm_head.weight")
    zeros = _zero_shapes(config, table)
    tensors.check(weight_shapes(config) | zeros, ignored=ignored)
    for name in zeros:
        if tensors.read(name).any():
            raise FormatError(f"{folder}: {name} is not zero; only biases of queries, keys and values can be loaded")
    return config, table, tensors


@torch.no_grad()
def import_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tp: TensorParallel = ALONE,
) -> Transformer:
    """This rank's part of the model in a Hugging Face folder; the default `dtype` is the one in config.json.

    Raises FormatError as `open_folder`.
    """
    config, table, tensors = open_folder(folder)
    stored = table.get("torch_dtype") or table.get("dtype") or "float32"
    if stored not in _DTYPES:
        raise FormatError(f"{folder / 'config.json'}: torch_dtype = {stored!r}: expected one of {', '.join(_DTYPES)}")
    with _default_dtype(dtype or _DTYPES[stored]):
        model = Transformer(config, tp)
    for param in model.parameters():
        param.zero_()  # the rows that pad the vocabulary are in no file
    for piece in weight_pieces(model):
        piece.view.copy_(piece.shard.part(tensors.read(piece.hf_name)))
    return model.to(device)


def import_with_tokenizer(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tp: TensorParallel = ALONE,
    tokenizer_folder: Path | None = None,
) -> tuple[Transformer, Tokenizer]:
    """The model of a Hugging Face folder and its tokenizer, or that of `tokenizer_folder`; FormatError where they do
    not fit together.
    """
    tokenizer = Tokenizer.load(tokenizer_folder or folder)  # first, since the weights take long
    model = import_model(folder, dtype=dtype, device=device, tp=tp)
    check_vocabulary(tokenizer.vocab_size, model.config, folder)
    return model, tokenizer


def config_to_huggingface(config: ModelConfig, dtype: torch.dtype, *, as_qwen2: bool = True) -> dict[str, Any]:
    """config.json of `config`, without the tokenizer's ids; a model with biases is a Qwen2 if it may be one."""
    architecture = _architecture_of(config, as_qwen2=as_qwen2)
    fixed = _FIXED[architecture]
    biases = {"attention_bias": config.qkv_bias} if architecture in _WITH_OUTPUT_BIAS else {}
    return {
        "architectures": [architecture],
        "model_type": fixed["model_type"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        **rope_to_huggingface(config),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **fixed,
        **biases,
    }


def _architecture_of(config: ModelConfig, *, as_qwen2: bool) -> str:
    """What `config` is exported as."""
    if config.qk_norm:
        return _QWEN3
    return _QWEN2 if config.qkv_bias and as_qwen2 else _LLAMA


def can_load(table: dict[str, Any]) -> bool:
    """Whether the architecture that a config.json names is one of ours."""
    return table.get("architectures") in [[architecture] for architecture in _FIXED]


def config_from_huggingface(table: dict[str, Any], *, where: str) -> ModelConfig:
    """The ModelConfig of a config.json; FormatError, beginning with `where`, for anything unsupported."""
    architecture = (table.get("architectures") or ["none named"])[0]
    if not can_load(table):
        *others, last = map(repr, _FIXED)
        raise FormatError(f"{where}: architecture {architecture!r}; only {', '.join(others)} and {last} can be loaded")
    fixed = _FIXED[architecture]
    if table.get("model_type", fixed["model_type"]) != fixed["model_type"]:
        raise FormatError(
            f"{where}: model_type {table['model_type']!r} beside architecture {architecture!r}; expected "
            f"{fixed['model_type']!r}"
        )
    for key, value in fixed.items():
        if (found := table.get(key, value)) != value and not (found is None and value is False):
            raise FormatError(f"{where}: {key} = {found!r}; only {value!r} can be loaded")
    biased = table.get("attention_bias") if architecture in _WITH_OUTPUT_BIAS else architecture == _QWEN2
    if biased is not None and not isinstance(biased, bool):
        raise FormatError(f"{where}: attention_bias = {biased!r}: expected true or false")
    if table.get("quantization_config") is not None:
        raise FormatError(f"{where}: the weights are quantized; only plain float weights can be loaded")
    rope = rope_from_huggingface(table, where)
    sizes = {key: _read(table, key, where) for key in _REQUIRED}
    layer_types = ["full_attention"] * sizes["num_hidden_layers"]
    if table.get("layer_types") not in (None, layer_types):
        raise FormatError(
            f"{where}: layer_types = {table['layer_types']!r}; only 'full_attention' in every layer can be loaded"
        )
    hidden, heads, is_qwen3 = sizes["hidden_size"], sizes["num_attention_heads"], architecture == _QWEN3
    positions = _read(table, "max_position_embeddings", where, default=_POSITIONS[architecture])
    if architecture == _MISTRAL:
        _check_window(table, positions, where)
    try:
        return ModelConfig(
            **sizes,
            num_key_value_heads=_read(table, "num_key_value_heads", where, default=heads),
            head_dim=_read(table, "head_dim", where, default=_QWEN3_HEAD_DIM if is_qwen3 else hidden // max(heads, 1)),
            rms_norm_eps=_read(table, "rms_norm_eps", where, default=1e-6),
            rope_theta=_read(rope, "rope_theta", where, default=10000.0),
            rope_factor=_read(rope, "factor", where, default=1.0),
            rope_scaling=rope["scaling"],
            max_position_embeddings=positions,
            tie_word_embeddings=bool(table.get("tie_word_embeddings")),
            qkv_bias=bool(biased),
            qk_norm=is_qwen3,
            init_std=_read(table, "initializer_range", where, default=0.02),
        )
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from None


def _check_window(table: dict[str, Any], positions: int, where: str) -> None:
    """FormatError where a Mistral's tokens do not see all of the `positions` before them."""
    window = table.get("sliding_window", _MISTRAL_WINDOW)
    if window is not None and not (type(window) is int and window >= positions):
        raise FormatError(
            f"{where}: sliding_window = {window!r}, below max_position_embeddings = {positions}; only models whose "
            "tokens see all positions before them can be loaded"
        )


def _read(table: dict[str, Any], key: str, where: str, *, default: float | None = None) -> Any:
    """A number of the type of `default`, an integer without one; an absent key or null means the default."""
    value = default if table.get(key) is None else table[key]
    if value is None:
        raise FormatError(f"{where}: {key} is missing")
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(0 if default is None else default):
        raise FormatError(f"{where}: {key} = {value!r}: expected a number")
    return value


def check_vocabulary(num_ids: int, config: ModelConfig, folder: Path) -> None:
    """FormatError where the tokenizer in `folder` gives ids that the model does not know."""
    if num_ids > config.vocab_size:
        raise FormatError(
            f"{folder}: the tokenizer has {num_ids:,} ids, the model knows {config.vocab_size:,}; "
            "use the tokenizer that the model was trained with"
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are created in `dtype`, so that a bf16 model never takes the memory of an fp32 one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
