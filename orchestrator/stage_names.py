"""Names of the stages that are not chosen by a recipe; all others are in `stages.STAGES`.

`resolve.ResolvedRecipe.stage_names` has those of a run in order. Events, the status, forecasts and
reports name stages by them.
"""

SURVEY = "survey"
"""Reading of config and headers."""
READ = "read"
"""Reading and tokenization of text."""
VERIFY = "verify"
"""Verification of the files of reusable units, within the stage that reuses them."""
CALIBRATE = "calibrate"
"""Statistics and decomposition of all linears."""
SCORE = "score"
"""Measurement of the losses that an allocator asks for; left out if it asks for none."""
LEARN = "learn"
"""Learning of the scores that an allocator asks for, in the place of `score`."""
ALLOCATE = "allocate"
"""Division of the budget; the plan is its result."""
WRITE = "write"
"""Writing of the checkpoint."""
EVALUATE = "evaluate"
"""Evaluation of models, a run of its own."""
TASKS = "tasks"
"""Tasks of lm-evaluation-harness, in an evaluation."""

FIXED = (SURVEY, READ, VERIFY, CALIBRATE, SCORE, LEARN, ALLOCATE, WRITE, EVALUATE, TASKS)
"""Names that no stage of another package may have."""
