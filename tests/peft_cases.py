"""What PEFT's own tests are run with: configs of this method, tiny models, tests of LoRA that fit.

PEFT names modules where a NEFT config has a mask. `Named` takes names, and gets its mask from the
model it meets: every second row or column of the modules.
"""

from pathlib import Path
from typing import Any

import torch
from families import tiny_model
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    T5Config,
)
from transformers.utils.logging import disable_progress_bar

from neft_core import NeftConfig, NeuronMask, frozen
from neft_core.groups import COLUMNS, ROWS, Group
from neft_core.tuner import NeftModel, neft_layers


class Named(NeftConfig):
    """A config by the names of modules, as PEFT's tests make one.

    Args:
        target_modules: those whose rows train; a list of endings, or one whole name.
        columns: those whose columns do.
        init_weights: False: an adapter starts as if it was trained already.
        init_lora_weights: the same, in tests of LoRA.
        r: not of this method.
        options: of a NeftConfig.
    """

    def __init__(
        self,
        target_modules: list[str] | str | None = None,
        columns: tuple[str, ...] = (),
        init_weights: bool = True,
        init_lora_weights: bool = True,
        r: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        rows = [target_modules] if isinstance(target_modules, str) else target_modules or []
        self.endings = {ROWS: tuple(rows), COLUMNS: tuple(columns)}
        self.trained = not (init_weights and init_lora_weights)

    def choose(self, model: nn.Module) -> None:
        """Make the mask for a model, and take it as any NeftConfig does."""
        groups = {}
        for name, module in model.named_modules():
            for axis, endings in self.endings.items():
                if any(f".{name}".endswith(f".{ending}") for ending in endings):
                    base = getattr(module, "base_layer", module)
                    size, turned = frozen.size(base), frozen.is_conv1d(base)
                    groups[name] = Group(name, axis, 0, size[axis], size[1 - axis], turned)
        indices = {name: torch.arange(0, group.count, 2) for name, group in groups.items()}
        NeftConfig.__post_init__(self, NeuronMask(indices, groups, 1))


class Tuner(NeftModel):
    """The tuner, which lets a `Named` config choose first and moves values where it says so."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **options: Any):
        config = self.peft_config[adapter_name]
        if isinstance(config, Named):
            config.choose(model)
        super().inject_adapter(model, adapter_name, *args, **options)
        if isinstance(config, Named) and config.trained:
            with torch.no_grad():
                for layer in neft_layers(model).values():
                    if adapter_name in layer.neft_values:
                        values = layer.neft_values[adapter_name]
                        values.add_(torch.randn_like(values))


def install() -> None:
    """Have PEFT use `Tuner` for the type NEFT in this process."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.NEFT] = Tuner


ADDITIVE = {"form": "additive"}
BOTH = {"target_modules": ["lin0"], "columns": ("lin1",)}
CUSTOM = [
    (f"{model} {number}", model, Named, kwargs)
    for model, cases in {
        "MLP": [
            {"target_modules": "lin0"},
            {"target_modules": ["lin1"]},
            {"columns": ("lin0",)},
            {"columns": ("lin0",), **ADDITIVE},
            {"target_modules": ["lin0", "lin1"]},
            BOTH,
            {**BOTH, **ADDITIVE},
            {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
            {"columns": ("lin0",), "modules_to_save": ["lin1"], **ADDITIVE},
            {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]},
        ],
        "MLP2": [BOTH],
        "MLP_LayerNorm": [BOTH, {**BOTH, "modules_to_save": ["layernorm1"]}],
        "EmbConv1D": [
            {"target_modules": ["conv1d"]},
            {"columns": ("conv1d",)},
            {"columns": ("conv1d",), **ADDITIVE},
            {"target_modules": ["lin0"], "columns": ("conv1d",)},
            {"target_modules": ["lin0"], "modules_to_save": ["emb"]},
        ],
        "Conv1d": [{"target_modules": ["lin0"]}],
        "Conv2d": [{"columns": ("lin0",)}],
        "MHA": [{"target_modules": ["lin0"]}],
    }.items()
    for number, kwargs in enumerate(cases, 1)
]
"""Name, PEFT's model, config, its options."""

_OTHER = {"init_weights": False}
_ROWS, _COLUMNS = {"target_modules": ["lin0"], **_OTHER}, {"columns": ("lin1",), **_OTHER}
SEVERAL = [
    ("Same", "neft", Named, _ROWS, _ROWS),
    ("Different", "neft", Named, _ROWS, _COLUMNS),
    ("Same, additive", "neft", Named, {**_ROWS, **ADDITIVE}, {**_ROWS, **ADDITIVE}),
    ("Different, additive", "neft", Named, {**_ROWS, **ADDITIVE}, {**_COLUMNS, **ADDITIVE}),
]
"""Pairs of adapters in one model."""

MIXED = [("NEFT mixed adapter", Named(**_ROWS), Named(**_COLUMNS))]

IN_PLACE_OF_LORA = {
    "test_add_adapter_rejects_duplicate_name_without_mutation",
    "test_delete_adapter_multiple_adapters_with_modules_to_save",
    "test_delete_adapter_with_multiple_adapters_works",
    "test_existing_model_card",
    "test_get_and_set_peft_model_state_dict_adapter_name_same_as_module_name",
    "test_get_and_set_peft_model_state_dict_normal_names",
    "test_get_and_set_peft_model_state_dict_peft_prefix_in_module_name",
    "test_get_and_set_peft_model_state_dict_weight_in_module_name",
    "test_ignore_mismatched_sizes_with_scalar_modules_to_save",
    "test_kwargs_only_forward_active_adapter",
    "test_kwargs_only_forward_disabled_adapter",
    "test_kwargs_only_forward_multi_adapter",
    "test_load_does_not_overwrite_similarly_named_sibling",
    "test_load_merged_and_unmerged_same_weights",
    "test_modules_to_save_targets_module_dict_raises",
    "test_multiple_adapters_mixed_modules_to_save_merging_adapters",
    "test_multiple_adapters_same_modules_to_save_merging_adapters_raises",
    "test_nested_ignores_modules_to_save",
    "test_non_existing_model_card",
    "test_requires_grad_follows_inference_mode_modules_to_save",
    "test_requires_grad_lora_different_targets",
    "test_requires_grad_lora_emb_conv1d",
    "test_requires_grad_lora_same_targets",
    "test_requires_grad_modules_to_save_default",
    "test_requires_grad_modules_to_save_disabling",
    "test_requires_grad_modules_to_save_multiple_adapters",
    "test_save_embedding_layers_excludes_similarly_named_sibling",
    "test_save_pretrained_succeeds_for_normal_lora",
    "test_set_peft_model_state_dict_preserves_input",
    "test_trained_modules_to_save_module_named_like_peft_prefix_round_trip",
    "test_targeting_module_to_save_raises",
    "test_transient_attribute_access_attr_does_not_exist_on_modules_to_save",
    "test_transient_attribute_access_attr_does_not_exist_on_original_module",
    "test_transient_attribute_access_default_adapter",
    "test_transient_attribute_access_disabled_adapter",
    "test_transient_attribute_access_non_default_adapter",
    "test_transient_attribute_access_non_existing_adapter",
    "test_unload_with_inactive_modules_to_save",
    "test_weight_bias_attributes",
}
"""Tests written with LoRA alone that say what every method should do."""


def _transformers_cases(task: str) -> list[tuple[type[NeftConfig], dict[str, Any]]]:
    """Rows of what widens in an MLP and columns of what narrows, whatever the model calls them."""
    rows = ["up_proj", "gate_proj", "c_fc", "fc1", "wi", "intermediate.dense"]
    columns = ("down_proj", "c_proj", "fc2", "wo", "output.dense")
    both = {"task_type": task, "target_modules": rows, "columns": columns}
    return [(Named, both), (Named, {**both, **ADDITIVE})]


def _encoders() -> dict[str, nn.Module]:
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    bert = BertConfig(num_attention_heads=2, max_position_embeddings=32, **sizes)
    return {"bert": AutoModel.from_config(bert)}


def _seq2seq() -> dict[str, nn.Module]:
    tokens = {"vocab_size": 16, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    t5 = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, **tokens)
    sizes = {"layers": 2, "ffn_dim": 24, "attention_heads": 2}
    halves = {f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in sizes.items()}
    bart = BartConfig(d_model=16, max_position_embeddings=32, bos_token_id=1, **tokens, **halves)
    return {
        name: AutoModelForSeq2SeqLM.from_config(one) for name, one in (("t5", t5), ("bart", bart))
    }


def models(folder: Path) -> dict[str, list[str]]:
    """Save tiny models with random weights; their folders by kind.

    PEFT skips tests by a model's name, so GPT-2 and Llama have other ones here.
    """
    disable_progress_bar()
    torch.manual_seed(0)
    decoders = {"opt": "opt", "conv1d": "gpt2", "gated": "llama", "grouped": "qwen2"}
    made = {
        "decoder": {name: tiny_model(kind) for name, kind in decoders.items()},
        "encoder": _encoders(),
        "seq2seq": _seq2seq(),
    }
    made["classifier"] = {
        name: AutoModelForSequenceClassification.from_config(model.config)
        for name, model in (made["decoder"] | made["encoder"]).items()
        if name in ("bert", "gated")
    }
    found = {}
    for kind, some in made.items():
        found[kind] = [str(folder / kind / name) for name in some]
        for path, model in zip(found[kind], some.values(), strict=True):
            model.save_pretrained(path)
    LoraConfig().save_pretrained(folder / "config")
    return found | {"config": [str(folder / "config")]}


def cases(paths: dict[str, list[str]]) -> dict[str, dict[str, list[Any]]]:
    """Cases of tests with a list of their own, by test and arguments."""
    classes = [AutoModelForCausalLM] * len(paths["decoder"]) + [AutoModel, AutoModelForSeq2SeqLM]
    ids = [*paths["decoder"], paths["encoder"][0], paths["seq2seq"][1]]
    (_, named), _ = _transformers_cases("CAUSAL_LM")
    return {
        "test_adapter_name_makes_no_difference": {"config0": [Named(**_ROWS)]},
        "test_inject_from_state_dict_and_from_config_target_same_layers": {
            "model_cls_and_id": list(zip(classes, ids, strict=True)),
            "config": [Named(**named)],
        },
        "test_multiple_adapters_mixed_modules_to_save": {"config_cls": [Named]},
        "test_multiple_adapters_mixed_modules_to_save_order_switched": {"config_cls": [Named]},
    }


def lists(paths: dict[str, list[str]]) -> dict[str, dict[str, list[Any]]]:
    """What PEFT's lists of cases hold instead, by its file of tests."""
    bert = paths["classifier"][:1]
    return {
        "test_custom_models": {
            "TEST_CASES": CUSTOM,
            "ALL_PEFT_CONFIG_CLASSES": [Named],
            "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": SEVERAL,
            "MIXED_ADAPTER_TEST_CASES": MIXED,
        },
        "test_config": {
            "ALL_CONFIG_CLASSES": [(NeftConfig, {})],
            "PEFT_MODELS_TO_TEST": [(paths["config"][0], None)],
        },
        "test_low_level_api": {},
        "test_other": {},
        "test_decoder_models": {
            "PEFT_DECODER_MODELS_TO_TEST": paths["decoder"],
            "ALL_CONFIGS": _transformers_cases("CAUSAL_LM"),
        },
        "test_encoder_decoder_models": {
            "PEFT_ENCODER_DECODER_MODELS_TO_TEST": paths["seq2seq"],
            "ALL_CONFIGS": _transformers_cases("SEQ_2_SEQ_LM"),
        },
        "test_feature_extraction_models": {
            "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST": paths["encoder"],
            "ALL_CONFIGS": _transformers_cases("FEATURE_EXTRACTION"),
        },
        "test_seq_classifier": {
            "PEFT_SEQ_CLS_MODELS_TO_TEST": paths["classifier"],
            "ALL_CONFIGS": _transformers_cases("SEQ_CLS"),
        },
        "test_token_classification_qa": {
            "PEFT_TOKEN_CLS_MODELS_TO_TEST": bert,
            "TOKEN_CLS_CONFIGS": _transformers_cases("TOKEN_CLS"),
            "QA_CONFIGS": _transformers_cases("QUESTION_ANS"),
        },
    }
