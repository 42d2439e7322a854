"""The stages after the plan, each in a folder of its own, and the driver.

A new stage is a folder and a name in `STAGES`.
"""

from orchestrator.stages.base import Stage
from orchestrator.stages.pivot.spec import Pivot
from orchestrator.stages.refine.spec import Refine
from orchestrator.stages.refit.spec import Refit
from orchestrator.stages.train.spec import Train
from orchestrator.stages.walk.spec import Sweep, Walk

STAGES: tuple[type[Stage], ...] = (Refit, Pivot, Walk, Refine, Sweep, Train)
"""All stages after the plan, in the order of execution."""
OPTION_TABLES = frozenset(table for stage in STAGES for table in stage.tables)
"""Tables of a recipe with options of stages."""
