"""Sections `compute`, `warmup`, `training`: where and how models are trained."""

from typing import Literal

from pydantic import Field, model_validator

from neft_core.config.section import Section, Seed, refuse


class Compute(Section):
    """Where and in which precision models run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Type of frozen weights; `auto`: bfloat16 on a GPU with mixed precision, else float32. What
    trains is float32 (in float64: float64)."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast; `auto`: bf16 on a GPU or where dtype is not float32, else none."""
    threads: int = Field(default=2, ge=1, le=4096)
    """CPU threads of each process; another number can change the last bits of a sum."""
    processes: int = Field(default=1, ge=1)
    """Processes that share warm-up, training and evaluation on this machine, each with a device of
    its own, by `accelerate launch`; steps stay the same rows. 1: nothing is launched."""
    accelerate_config: str | None = Field(default=None, min_length=1)
    """Your own Accelerate configuration file, relative to the workspace or absolute, for other
    ways to share (several machines, FSDP2, DeepSpeed); it says how many processes. Precision is
    `mixed_precision` above."""

    @model_validator(mode="after")
    def _one_says_how_many(self) -> "Compute":
        if self.accelerate_config is not None and self.processes > 1:
            raise refuse(
                f"processes: got {self.processes} beside accelerate_config; "
                "num_processes of that file says how many"
            )
        return self


class Optimisation(Section):
    """What every training has: steps of AdamW with linear decay."""

    lr: float = Field(gt=0, le=1)
    """Learning rate at the first step; decays linearly to zero."""
    batch_size: int = Field(ge=1)
    """Rows in a micro-batch."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches in a step."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """The gradient of what trains is clipped to this norm; null: it isn't clipped."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of what trains, towards zero."""
    gradient_checkpointing: bool = False
    """Trade a second forward pass for memory."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints to resume from."""


class Warmup(Optimisation):
    """The limited-step fine-tune that gives the tuned model; by default of all parameters, exact.

    `modules`, `states` and `update` make it smaller, in any combination; what each costs in
    fidelity is in docs/results.md.
    """

    steps: int = Field(ge=1)
    """K: optimiser steps."""
    seed: Seed = 1
    """Seed of the order of rows, and of new parameters."""
    modules: Literal["all", "candidates", "lora"] = "all"
    """What trains: `all` parameters, the `candidates` of the layout alone, or `lora` on every
    linear module, merged in fp32 afterwards."""
    layout: Literal["mlp", "mlp+gate", "attention", "all", "rows"] | None = None
    """With `candidates`: whose weights train; the same as `scoring.layout`."""
    rank: int | None = Field(default=None, ge=1)
    """With `lora`: rank of the factors; the scale is 2."""
    states: Literal["fp32", "8bit", "factored"] = "fp32"
    """What the optimiser keeps: AdamW's two moments in `fp32` (8 bytes for each trained value) or
    in `8bit` (2), or Adafactor's `factored` second moment (almost nothing)."""
    update: Literal["after_backward", "in_backward"] = "after_backward"
    """`in_backward`: each parameter is updated as soon as its gradient is there, so that one
    gradient is kept at a time. Clipping then needs a second pass for the norm: the same result in
    twice the time; with `max_grad_norm: null` there is one pass."""

    @model_validator(mode="after")
    def _fitting(self) -> "Warmup":
        for key, modules in (("layout", "candidates"), ("rank", "lora")):
            given = getattr(self, key)
            if given is None and self.modules == modules:
                raise refuse(f"{key}: missing; modules: {modules} needs it")
            if given is not None and self.modules != modules:
                raise refuse(f"{key}: got {given!r}; it is for modules: {modules} only")
        if self.update == "in_backward" and self.accumulation > 1:
            raise refuse(
                f"accumulation: got {self.accumulation}; update: in_backward keeps no gradient to "
                "add to: set 1, or update: after_backward"
            )
        return self


class Training(Optimisation):
    """Defaults of every run."""

    epochs: float = Field(gt=0)
    """Passes over the training rows; a fraction is allowed."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between dev losses; null: at the end of each epoch. The last step always has one."""
    patience: int | None = Field(default=None, ge=1)
    """Dev losses in a row without improvement before training stops; null: never."""
