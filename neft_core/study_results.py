"""Parts of a study that show results: the table in the paper's form, and learning rates."""

from neft_core.config.study import RatesSection, TableSection
from neft_core.findings import Findings
from neft_core.page import Gallery, Html
from neft_core.study_tables import Table


def table(found: Findings, part: TableSection, _gallery: Gallery) -> list[Table | Html]:
    """Methods against tasks, and their differences to full fine-tuning and to LoRA."""
    raise NotImplementedError


def rates(found: Findings, part: RatesSection, _gallery: Gallery) -> list[Table | Html]:
    """Dev losses by method and learning rate."""
    raise NotImplementedError
