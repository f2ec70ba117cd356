"""A registered model: what is kept of it, and answering with it.

Kept are text and safetensors alone: the adapter with a reference to its base (kind, location,
revision, hash), or a merged checkpoint; and the params by which it was trained. Nothing is pickled.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas
from mlflow.pyfunc import PythonModel

from neft_core import __version__, answering, config, loading
from neft_core.errors import NeftError
from neft_core.files import read_json, write_json
from neft_core.workspace import Workspace

FACTS, ANSWERS, CHECKPOINT = "neft.json", "answers.jsonl", "checkpoint"
"""Files of a registered model: what it is; its answers to the test split; merged weights."""

BASE = "NEFT_BASE"
"""Variable with the directory of the base model, where it isn't where it was."""


def write(ws: Workspace, run: str, seed: int, folder: Path, merged: bool) -> None:
    """Write what is kept of a trained run, into an existing directory.

    Args:
        ws: the workspace.
        run: a run that is trained and evaluated.
        seed: one of its seeds.
        folder: where to.
        merged: keep a whole checkpoint in place of the adapter.
    """
    from neft_core.exporting import export
    from neft_core.methods import METHODS, PEFT_CONFIG, PEFT_FILE

    params = ws.params()
    method = params.runs[run].method
    base = asdict(loading.base_card(ws)[0])
    if base["kind"] != "hub":
        base["location"] = str((ws.root / base["location"]).resolve())
    if merged:
        export(ws, run, seed, folder / CHECKPOINT, None, False)
    else:
        source = ws.path("train", run, f"seed-{seed}")
        shutil.copyfile(source / METHODS[method.name].file, folder / METHODS[method.name].file)
        if METHODS[method.name].file == PEFT_FILE:
            shutil.copyfile(source / PEFT_CONFIG, folder / PEFT_CONFIG)
    shutil.copyfile(ws.path("evaluation", run, f"seed-{seed}.jsonl"), folder / ANSWERS)
    facts = {
        "run": run,
        "seed": seed,
        "task": params.runs[run].task,
        "base": base,
        "form": "merged" if merged else "adapter",
        "params": params.model_dump(mode="json", exclude={"tracking"}),
        "version": __version__,
    }
    write_json(folder / FACTS, facts)


class Answering(PythonModel):  # type: ignore[misc]
    """Answers questions of the task that a run was trained on, as its evaluation does."""

    def load_context(self, context: Any) -> None:
        """Load the model: the base of the recorded hash with the adapter, or the merged weights."""
        import torch

        from neft_core import models
        from neft_core.methods import METHODS

        folder = Path(context.artifacts["model"])
        facts = read_json(folder / FACTS)
        self.params = config.parse_params(facts["params"], FACTS)
        self.task = facts["task"]
        card = models.Base(**facts["base"])
        device = loading.device(self.params)
        directory = folder / CHECKPOINT if facts["form"] == "merged" else _base(card)
        dtype = getattr(torch, loading.frozen_type(self.params.compute, device == "cpu"))
        trust = card.trust_remote_code
        model = models.load_model(directory, dtype, trust_remote_code=trust)
        if facts["form"] != "merged":
            method = self.params.runs[facts["run"]].method
            model = METHODS[method.name].load(
                model, method.model_dump(), card.model_type, folder, card.hash
            )
        self.model = model.to(device)
        self.tokenizer = models.load_tokenizer(directory, trust_remote_code=trust)
        self.context = card.context

    def predict(  # MLflow demands these names, and knows this type not to be a schema.
        self,
        context: Any,  # noqa: ARG002
        model_input: pandas.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """One text for each question; of nli, the label.

        Args:
            context: MLflow's; not needed any more.
            model_input: a table with the columns of `answering.COLUMNS`.
            params: `max_new_tokens`, where other than in evaluation.
        """
        kind = self.params.tasks[self.task].format.task
        columns = answering.COLUMNS[kind]
        asked = [
            {name: _text(row[name], name, number) for name in columns}
            for number, row in enumerate(model_input[list(columns)].to_dict("records"), 1)
        ]
        return answering.answers(
            self.params,
            self.task,
            self.model,
            self.tokenizer,
            list(map(answering.asking, asked)),
            context=self.context,
            label="answers",
            max_new_tokens=int((params or {}).get("max_new_tokens") or 0) or None,
        )


def _base(card: Any) -> Path:
    """The directory of the base model, whose content is checked against the hash."""
    from neft_core import hub, models

    told = os.environ.get(BASE)
    if told:
        directory = Path(os.path.expanduser(told))
    elif card.kind == "hub":
        directory = hub.fetch(card.location, card.revision)
    else:
        directory = Path(card.location)
    found = models.inspect(directory, trust_remote_code=card.trust_remote_code)[3]
    if found != card.hash:
        raise NeftError(
            f"{directory}: hash {found[:12]}, the adapter was trained on {card.hash[:12]}; "
            f"name that base model's directory in {BASE}, or register the merged form"
        )
    return directory


def _text(value: Any, name: str, number: int) -> str:
    if not isinstance(value, str) or not value.strip():
        raise NeftError(f"question {number}: '{name}' is {json.dumps(str(value))}; give a text")
    return value
