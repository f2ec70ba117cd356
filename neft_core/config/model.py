"""Section `model`: the base model."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from neft_core.config.section import NO_FILE, Place, Section, Seed, refuse


class Pretraining(Section):
    """How the built model is pre-trained on the corpora's pre-training splits."""

    epochs: int = Field(ge=1)
    """Passes over the pre-training rows."""
    batch_size: int = Field(ge=1)
    """Sequences in a step."""
    lr: float = Field(gt=0, le=1)
    """Peak learning rate of AdamW; warmed up over 5 % of the steps, then linear decay."""
    seed: Seed = 1
    """Seed of the initial weights and of the order of rows."""


class BuiltModel(Section):
    """A small Llama with its own byte-level BPE tokenizer, pre-trained in stage `base`."""

    kind: Literal["built"]
    """Where the base model comes from."""
    path: Literal["data/none"] = NO_FILE
    """No local file."""
    vocabulary: int = Field(ge=300, le=200_000)
    """Tokens of the tokenizer, the 256 bytes included."""
    hidden: int = Field(ge=8)
    """Hidden size."""
    intermediate: int = Field(ge=8)
    """Intermediate size of the MLP: the neurons of each up and down projection."""
    layers: int = Field(ge=1)
    """Decoder layers."""
    heads: int = Field(ge=1)
    """Attention heads; divides `hidden`."""
    context: int = Field(default=256, ge=16)
    """Longest sequence, in tokens."""
    pretraining: Pretraining
    """How it is pre-trained."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "BuiltModel":
        if self.hidden % (2 * self.heads):
            raise refuse(
                f"heads: got {self.heads} with hidden {self.hidden}; hidden / heads must be even"
            )
        return self


class LocalModel(Section):
    """A directory in the Hub's layout: config.json, tokenizer files, *.safetensors."""

    kind: Literal["local"]
    """Where the base model comes from."""
    path: Place
    """The directory, relative to the workspace or absolute."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


class HubModel(Section):
    """A model on the Hugging Face Hub."""

    kind: Literal["hub"]
    """Where the base model comes from."""
    path: Literal["data/none"] = NO_FILE
    """No local file."""
    id: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    """Repository id, such as `meta-llama/Llama-2-7b-chat-hf`."""
    revision: str = "main"
    """Branch, tag or commit; pin a commit to reproduce."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


Model = Annotated[BuiltModel | LocalModel | HubModel, Field(discriminator="kind")]
