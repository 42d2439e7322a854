"""MLflow: a run of the experiment `orchestrator`, or of the one in MLFLOW_EXPERIMENT_NAME.

The store is that of MLFLOW_TRACKING_URI, else MLflow's own default. A resumed run is found by the
tag with its run directory.
"""

import os
import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from orchestrator.tracking.base import TrackedRun

TAG = "orchestrator.run_dir"
STATES = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
LONGEST_PARAM = 500
"""Characters of a parameter that every store accepts."""


class MlflowTracker:
    """Client of a tracking store."""

    def __init__(self, run: TrackedRun) -> None:
        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.group)
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        filter_string = "tags.`{}` = '{}'".format(TAG, run.place.replace("'", "\\'"))
        found = self._client.search_runs([experiment], filter_string, max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {TAG: run.place}
            created = self._client.create_run(experiment, tags=tags, run_name=run.name)
            self._id = created.info.run_id
        earlier = found[0].data.params if found else {}
        params = [
            Param(key, str(value)[:LONGEST_PARAM])
            # a parameter cannot be changed
            for key, value in run.settings.items()
            if key not in earlier
        ]
        self._client.log_batch(self._id, params=params)

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(f"{group}/{name}", value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, state: str) -> None:
        self._client.set_terminated(self._id, status=STATES[state])
