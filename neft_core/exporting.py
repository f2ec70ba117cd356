"""`neft export`: a trained run as a checkpoint that needs no package of ours, or as an adapter.

A checkpoint keeps the base's own files (configuration, tokenizer, generation settings, code) and
has its weights with the adapter merged. What their precision loses is measured and written beside.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neft_core import __version__, loading, models, runs
from neft_core.errors import NeftError
from neft_core.files import read_json, replacing, write_json
from neft_core.progress import Progress
from neft_core.untrained import trains_nothing
from neft_core.workspace import REPORTS, Workspace

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

FACTS = "export.json"
"""The file with provenance and losses."""

ROWS = 16
"""Dev rows on which the exported checkpoint is compared with the run."""

_KEPT = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_OURS = {"config.json", models.CARD}


def export(
    ws: Workspace, run: str, seed: int | None, target: Path, dtype: str | None, adapter: bool
) -> None:
    """Write a run's model, or its adapter alone, to a new directory; all or nothing.

    Args:
        ws: the workspace.
        run: a run that is trained.
        seed: which of its seeds; None: the first.
        target: the directory to make; not among what the pipeline makes.
        dtype: a key of DTYPES; None: the precision of the base's files.
        adapter: write the adapter in PEFT's form instead of merging it.

    Raises:
        NeftError: run or seed is unknown or not trained, was changed since,
            the target exists, a value doesn't fit the precision.
    """
    seed = runs.chosen_seed(ws.params(), run, seed)
    if target.exists():
        raise NeftError(f"{target}: exists already; give a new directory with --to")
    for made in ("work", REPORTS):
        if target.resolve().is_relative_to((ws.root / made).resolve()):
            raise NeftError(
                f"{target}: {made}/ is the pipeline's; give another directory with --to"
            )
    if adapter and dtype:
        raise NeftError("--dtype: an adapter keeps the precision it was trained in; leave it out")
    runs.check_current(ws, run)
    if trains_nothing(ws.path("train", run, f"seed-{seed}")):
        raise NeftError(f"run {run}: its mask holds no neuron; export another, or use the base")
    label = f"export {run}, seed {seed}"
    facts = _provenance(ws, run, seed)
    with replacing(target) as folder, Progress(label, 1 if adapter else 3, "part") as progress:
        folder.mkdir()
        if adapter:
            _write_adapter(ws, run, seed, folder)
            said = ["the adapter alone; load it with peft after `import neft_core`"]
        else:
            method = ws.params().runs[run].method
            source = ws.path("train", run, f"seed-{seed}")
            card, _ = loading.base_card(ws)
            directory = card.directory(ws.root)
            options = method.model_dump()
            facts |= write_merged(card, directory, method.name, options, source, folder, dtype)
            progress.advance(2, "merged")
            facts["effect"] = _effect(ws, run, seed, folder)
            said = _words(facts)
        progress.advance(1, "written")
        write_json(folder / FACTS, facts)
        (folder / "README.md").write_text(_card(facts, said, adapter), encoding="utf-8")
    for line in said:
        print(f"{label}: {line}")
    print(f"{label}: {target}")


def _provenance(ws: Workspace, run: str, seed: int) -> dict[str, Any]:
    params = ws.params()
    base = asdict(loading.base_card(ws)[0])
    if base["kind"] != "hub":
        base["location"] = Path(base["location"]).name  # where it was here is nobody's business
    entry = params.runs[run]
    return {
        "run": run,
        "seed": seed,
        "task": entry.task,
        "method": entry.method.model_dump(mode="json"),
        "training": read_json(ws.path("train", run, f"seed-{seed}", "metrics.json")),
        "base": base,
        "version": __version__,
    }


def _write_adapter(ws: Workspace, run: str, seed: int, folder: Path) -> None:
    from neft_core.methods import METHODS, PEFT_CONFIG, PEFT_FILE

    name = ws.params().runs[run].method.name
    if METHODS[name].file != PEFT_FILE:
        raise NeftError(
            f"--adapter: run {run} has method {name}, which trains weights of the base itself; "
            "leave --adapter out"
        )
    card, _ = loading.base_card(ws)
    source = ws.path("train", run, f"seed-{seed}")
    fields = read_json(source / PEFT_CONFIG)
    if card.kind != "hub":
        fields["base_model_name_or_path"] = str(card.directory(ws.root).resolve())
    write_json(folder / PEFT_CONFIG, fields)
    shutil.copyfile(source / PEFT_FILE, folder / PEFT_FILE)


def write_merged(
    card: models.Base,
    directory: Path,
    method: str,
    options: dict[str, Any],
    source: Path,
    folder: Path,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a base with a trained adapter merged.

    Args:
        card: the base's.
        directory: the base's checkpoint.
        method: what trained.
        options: that method's.
        source: a directory with what it saved.
        folder: an existing directory for the checkpoint.
        dtype: a key of DTYPES; None: the precision of the base's files.

    Returns:
        the checkpoint's precision, and what that loses.

    Raises:
        NeftError: a value isn't finite in that precision.
    """
    import torch

    from neft_core.methods import METHODS
    from neft_core.rounding import Tally

    model = models.load_model(directory, "auto", trust_remote_code=card.trust_remote_code)
    target = getattr(torch, DTYPES[dtype]) if dtype else model.dtype
    # Merged where both fit, so that each weight is rounded once.
    merging = torch.promote_types(model.dtype, target)
    model.to(merging)
    tally = Tally(target)
    model = METHODS[method].merge(model, options, card.model_type, source, card.hash, tally)
    stored = str(target).removeprefix("torch.")
    for name, parameter in model.named_parameters():
        if merging != target:
            parameter.data = parameter.data.to(target)
        if not bool(torch.isfinite(parameter).all()):
            raise NeftError(
                f"--dtype {dtype or stored}: {name} has a value that is not finite in {stored}; "
                "use fp32 or bf16"
            )
    models.save_checkpoint(model, folder)
    _keep_files(directory, folder, stored)
    return {"dtype": stored, "rounding": asdict(tally.result())}


def _keep_files(directory: Path, folder: Path, dtype: str) -> None:
    """The base's own files as they are; of its configuration, what has to change.

    Other programs read the base's configuration; this version of transformers may write it in
    another way.
    """
    for pattern in _KEPT:
        for path in directory.glob(pattern):
            if path.name not in _OURS and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    written, config = (read_json(place / "config.json") for place in (folder, directory))
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in {"dtype", "torch_dtype"} & section.keys():
            section[key] = dtype
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    if "tie_word_embeddings" in written:
        config["tie_word_embeddings"] = written["tie_word_embeddings"]
    write_json(folder / "config.json", config)


def _effect(ws: Workspace, run: str, seed: int, folder: Path) -> dict[str, float] | None:
    """The checkpoint on some dev rows, against the run as `neft evaluate` has it."""
    import numpy as np
    import torch

    from neft_core.encoding import load_encoded
    from neft_core.steps import collate

    params = ws.params()
    file = ws.path("prepared", params.runs[run].task, "dev.safetensors")
    if not file.is_file():
        return None
    arrays, _ = load_encoded(file)
    card, tokenizer = loading.base_card(ws)
    device = loading.device(params)
    rows = np.arange(min(ROWS, len(arrays["offsets"]) - 1))
    batch = collate(arrays, rows, tokenizer.pad_token_id)
    targets = batch.pop("labels")[:, 1:]
    chosen = targets != -100
    gold = targets[chosen]

    def logits(model: Any) -> Any:
        """At the trained tokens, [tokens, vocabulary]."""
        model.eval()
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.no_grad(), loading.autocast(params):
            found = model(**inputs).logits[:, :-1].cpu()[chosen]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def loss(found: Any) -> float:
        return torch.nn.functional.cross_entropy(found, gold).item()

    # One after the other, so that only one model is in memory.
    trained = logits(runs.load_trained(ws, run, seed)[0])
    model = models.load_model(folder, "auto", trust_remote_code=card.trust_remote_code)
    stored = logits(model.to(device))
    return {
        "rows": len(rows),
        "tokens": len(gold),
        "loss_trained": loss(trained),
        "loss_exported": loss(stored),
        "largest_logit_difference": (trained - stored).abs().max().item(),
        "same_first_choice": (trained.argmax(-1) == stored.argmax(-1)).double().mean().item(),
    }


def _words(facts: dict[str, Any]) -> list[str]:
    """What the precision loses, in lines."""
    from neft_core.rounding import Rounding

    said = [str(Rounding(**facts["rounding"]))]
    effect = facts["effect"]
    if effect is None:
        return [*said, "the effect on the dev loss isn't measured; work/prepared has no dev rows"]
    return [
        *said,
        f"loss on {effect['rows']} dev rows {effect['loss_trained']:.4f} as trained, "
        f"{effect['loss_exported']:.4f} as exported; logits differ by at most "
        f"{effect['largest_logit_difference']:.1e}, and "
        f"{100 * effect['same_first_choice']:.1f} % of the most likely tokens are the same",
    ]


def _card(facts: dict[str, Any], said: list[str], adapter: bool) -> str:
    """The README.md, with the head that the Hub reads."""
    base, training = facts["base"], facts["training"]
    hub = base["kind"] == "hub"
    head = [f"base_model: {base['location']}"] if hub else []
    head += [f"library_name: {'peft' if adapter else 'transformers'}", "tags: [neft]"]
    rows = {
        "run": f"{facts['run']}, seed {facts['seed']}, task {facts['task']}",
        "method": json.dumps(facts["method"], sort_keys=True),
        "trained": f"{training['trainable_parameters']:,} parameters, "
        f"{training['trainable_percent']:.2f} % of the model",
        "base": (f"{base['location']} at {base['revision']}" if hub else base["kind"])
        + f", {base['model_type']}, sha256 {base['hash']}",
        "best dev loss": f"{training['best_dev_loss']:.4f} at step {training['best_step']}",
        "precision": facts.get("dtype", "that of training"),
        "made by": f"neft {facts['version']}",
    }
    lines = ["---", *head, "---", "", f"# {facts['run']}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join([*lines, "", *(f"- {line}" for line in said), "", f"More: {FACTS}.", ""])
