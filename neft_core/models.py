"""Base models: found, checked and hashed, or built small; loaded with their tokenizers.

The only module that imports transformers.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neft_core import checkpoints, hub, ranks
from neft_core.errors import NeftError
from neft_core.neurons import count_parameters, is_tied

if TYPE_CHECKING:
    import torch
    from torch import nn

CARD = "base.json"
"""The file of stage `base` that tells which model it is."""


@dataclass(frozen=True)
class Base:
    """What stage `base` found out about the base model."""

    kind: str
    """`built`, `local` or `hub`."""
    location: str
    """Directory (relative to the workspace where it is inside), or Hub id."""
    revision: str
    """Commit of a Hub model, else empty."""
    hash: str
    """SHA-256 over the weight files and the configuration."""
    model_type: str
    """The architecture's name in transformers."""
    parameters: int
    """Parameters in the checkpoint; a tied head counts once."""
    context: int
    """Longest sequence in tokens; 0 where the configuration names none."""
    trust_remote_code: bool
    """Whether the model's own Python code may run."""

    def save(self, folder: Path) -> None:
        """Write the card."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        (folder / CARD).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Base":
        """Read the card that stage `base` wrote.

        Raises:
            NeftError: it is missing or damaged.
        """
        path = folder / CARD
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise NeftError(f"{path}: missing or damaged; run 'neft run'") from None

    def directory(self, root: Path) -> Path:
        """The checkpoint directory on this machine.

        Raises:
            NeftError: a Hub model isn't in the local cache and can't be fetched.
        """
        if self.kind == "hub":
            return hub.fetch(self.location, self.revision)
        return root / os.path.expanduser(self.location)


def inspect(directory: Path, *, trust_remote_code: bool = False) -> tuple[str, int, int, str]:
    """Check a checkpoint directory in the Hub's layout without building the model.

    Every value of every tensor is read once.

    Args:
        directory: config.json, tokenizer files and *.safetensors.
        trust_remote_code: allow a model whose code comes with it.

    Returns:
        Model type, number of parameters, longest sequence (0 if unknown), hash.

    Raises:
        NeftError: no directory, no or only pickled weights, not a causal language model, a file
            that isn't whole, a value that is not finite.
    """
    import torch

    if not directory.is_dir():
        raise NeftError(f"{directory}: no such directory; set model.path to a model's directory")
    config = checkpoints.config(directory)
    if not any(directory.glob("*.safetensors")):
        pickled = sorted(p.name for p in directory.glob("*.bin")) or sorted(
            p.name for p in directory.glob("*.pt*")
        )
        found = f"only pickled weights ({pickled[0]})" if pickled else "no weights"
        raise NeftError(f"{directory}: {found}; *.safetensors are needed, pickle is never loaded")
    _refuse_other_architectures(directory, config, trust_remote_code)
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    shapes = checkpoints.shapes(directory)
    # Other files of weights may lie there too: what the index doesn't name is never loaded.
    for path in sorted(set(checkpoints.locate(directory).values())):
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
        with checkpoints.opened(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise NeftError(
                        f"{path}: {name} holds a value that is not finite; get a sound copy"
                    )
    model_type = str(config["model_type"])
    context = int(config.get("max_position_embeddings") or config.get("n_positions") or 0)
    return model_type, count_parameters(shapes, is_tied(config)), context, digest.hexdigest()


def _refuse_other_architectures(directory: Path, config: dict[str, Any], trust: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if "AutoModelForCausalLM" in config.get("auto_map", {}):
        if not trust:
            raise NeftError(f"{directory}: {_OWN_CODE}")
        return
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    named = config.get("architectures") or ([known] if known else [])
    if known is None or known not in named:
        found = ", ".join(named) or f"model_type '{kind}'"
        raise NeftError(f"{directory}: not a causal language model ({found}); choose one that is")


_OWN_CODE = (
    "needs Python code of its own; set model.trust_remote_code: true if you trust its authors"
)


@functools.cache
def _caution(directory: Path) -> None:
    """Say, once in each process, that code from outside may run; before it does."""
    if ranks.main():
        told = f"CAUTION: Python code that comes with the model in {directory} may run"
        print(f"{told} (model.trust_remote_code: true)", flush=True)


def load_model(
    directory: Path, dtype: "torch.dtype | str", *, trust_remote_code: bool = False
) -> Any:
    """A causal language model from a directory, on the CPU; `auto`: in its files' precision.

    Raises:
        NeftError: transformers refuses the checkpoint; its reason is shown.
    """
    from transformers import AutoModelForCausalLM

    _quiet()
    if trust_remote_code:
        _caution(directory)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as fault:  # the library raises a dozen unrelated types
        raise NeftError(
            f"{directory}: can't be loaded ({_one_line(fault)}); check the directory"
        ) from fault
    # The library would go on with random weights there.
    odd = sorted(found["missing_keys"]) + sorted(str(key[0]) for key in found["mismatched_keys"])
    if odd:
        raise NeftError(
            f"{directory}: its weights lack {odd[0]} in the shape that config.json asks for; "
            "fetch the model again"
        )
    return model


def _one_line(fault: Exception) -> str:
    return " ".join(str(fault).split())[:200] or type(fault).__name__


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer, with a padding token.

    Raises:
        NeftError: the directory holds no usable tokenizer.
    """
    from transformers import AutoTokenizer

    _quiet()
    if trust_remote_code:
        _caution(directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as fault:  # as in `load_model`
        raise NeftError(
            f"{directory}: no usable tokenizer ({_one_line(fault)}); add its files"
        ) from fault
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # Some classes start without any file, and know nothing then.
        raise NeftError(f"{directory}: no usable tokenizer (no vocabulary); add its files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def build_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> Any:
    """A byte-level BPE tokenizer with <pad>, <s> and </s>, learned from texts.

    Args:
        texts: what it learns from.
        vocabulary: tokens at most, special ones and the 256 bytes included.
        context: longest sequence of the model, in tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=context,
    )


def build_llama(
    vocabulary: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    context: int,
    seed: int,
) -> "nn.Module":
    """A small Llama with tied embeddings and random weights."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    config = llama_config(vocabulary, hidden, intermediate, layers, heads, context)
    model: nn.Module = LlamaForCausalLM(config)
    return model


def llama_config(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, context: int
) -> Any:
    """The configuration of the small Llama."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def read_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """A model's configuration, from its directory or a config.json alone.

    Raises:
        NeftError: it is absent, says no sizes, or transformers doesn't know such a model.
    """
    from transformers import AutoConfig, PreTrainedConfig

    _quiet()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise NeftError(f"{file}: no such file; give a model's config.json")
    if trust_remote_code:
        _caution(file.parent)
    try:
        config = AutoConfig.from_pretrained(
            str(path if path.is_dir() else file),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
        told = json.loads(file.read_text(encoding="utf-8")).keys()
    except Exception as fault:  # as in `load_model`
        if not trust_remote_code and "trust_remote_code" in str(fault):
            raise NeftError(f"{file}: {_OWN_CODE}") from None
        raise NeftError(
            f"{file}: not a model's configuration ({_one_line(fault)}); give a config.json"
        ) from fault
    if not trust_remote_code:
        # Where a file says none of a model's sizes the library takes those of some large one.
        own = type(config)().to_dict().keys() - PreTrainedConfig().to_dict().keys()
        if not told & own:
            raise NeftError(f"{file}: not a model's configuration (no sizes); give a config.json")
    return config


def skeleton(
    config: Any,
    dtype: "torch.dtype",
    *,
    device: str = "meta",
    trust_remote_code: bool = False,
) -> Any:
    """A model without weights of its own: on `meta` without any, elsewhere with random ones."""
    import torch
    from transformers import AutoModelForCausalLM

    _quiet()
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )


def save_checkpoint(
    model: Any, folder: Path, keep_float32: Iterable[str] = (), dtype: Any = None
) -> None:
    """Write a checkpoint in the Hub's layout.

    Args:
        model: a transformers model.
        folder: an existing directory.
        keep_float32: names of weights that keep their precision.
        dtype: what the other weights are cast to; None leaves them.
    """
    _quiet()
    kept = set(keep_float32)
    state = {
        name: tensor if dtype is None or name in kept else tensor.to(dtype)
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(str(folder), state_dict=state, max_shard_size="5GB")
