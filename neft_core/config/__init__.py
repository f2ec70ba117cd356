"""params.yaml as typed sections: one class a section, one docstring a key."""

from neft_core.config.model import BuiltModel, HubModel, LocalModel
from neft_core.config.params import MEASURES, Params
from neft_core.config.reading import (
    check_section,
    load_params,
    parse_params,
    read_yaml,
    yaml_text,
)
from neft_core.config.runs import BUDGETS, Method, Neft, Run, Selection
from neft_core.config.scores import GradientScores
from neft_core.config.section import NO_FILE
from neft_core.config.study import Study, StudyFile
from neft_core.config.tasks import (
    GeneratedSource,
    HubSource,
    Instruction,
    LocalSource,
    Nli,
    Summarisation,
    Task,
    Translation,
    has_pretraining,
)
from neft_core.config.training import Compute, Optimisation, Warmup

__all__ = [
    "BUDGETS",
    "MEASURES",
    "NO_FILE",
    "BuiltModel",
    "Compute",
    "GeneratedSource",
    "GradientScores",
    "HubModel",
    "HubSource",
    "Instruction",
    "LocalModel",
    "LocalSource",
    "Method",
    "Neft",
    "Nli",
    "Optimisation",
    "Params",
    "Run",
    "Selection",
    "Study",
    "StudyFile",
    "Summarisation",
    "Task",
    "Translation",
    "Warmup",
    "check_section",
    "has_pretraining",
    "load_params",
    "parse_params",
    "read_yaml",
    "yaml_text",
]
