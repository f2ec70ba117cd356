"""A run whose mask holds no neuron, where any size is right: nothing trains, the base stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from neft_core import ranks
from neft_core.files import read_json, write_json
from neft_core.loading import autocast, device, load_base
from neft_core.workspace import Workspace

NOTHING = "nothing: the mask holds no neuron, so these are the base's own results"
"""What a run's metrics say where there was nothing to train."""

COST = {"seconds": 0.0, "tokens_per_second": 0.0, "peak_bytes": 0}


def keep_base(
    ws: Workspace, dev: Any, pad: int, target: Path, told: Callable[[Any, str], dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """Write what a training would have written of itself, with the base's dev loss.

    Args:
        ws: the workspace.
        dev: the encoded dev split.
        pad: the padding token.
        target: the seed's directory to make.
        told: of a course and a type of weights, what metrics.json says of every training.

    Returns:
        The course, of no step, and what metrics.json says.
    """
    from neft_core.course import DEV_COLUMNS, TRAIN_COLUMNS, Course, write_table
    from neft_core.steps import split_loss

    params = ws.params()
    model, size = load_base(ws), params.training.batch_size
    with autocast(params):
        loss, tokens = split_loss(model, dev, size, pad, device(params))
    course = Course(dev=[(0, 0.0, loss / tokens)])
    result = told(course, str(model.dtype)) | {
        "trainable_parameters": 0,
        "trainable_percent": 0.0,
        "lr": 0.0,
        "selected_neurons": 0,
        "trained": NOTHING,
    }
    if ranks.main():
        print(f"train {result['run']}, seed {result['seed']}: {NOTHING}")
        target.mkdir()
        write_table(target / "train.csv", TRAIN_COLUMNS, course.train)
        write_table(target / "dev.csv", DEV_COLUMNS, course.dev)
        write_json(target / "metrics.json", result)
    return course, result


def trains_nothing(folder: Path) -> bool:
    """Whether a seed's directory is of such a run, which leaves no adapter."""
    file = folder / "metrics.json"
    return file.is_file() and read_json(file).get("trained") == NOTHING
