"""Tasks of lm-evaluation-harness, an optional package (`pip install 'orchestrator[lm-eval]'`)."""
