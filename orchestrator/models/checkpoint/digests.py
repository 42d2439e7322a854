"""Digests that bind the files of a checkpoint together.

The report has the digest of every other file, and config.json that of the report. Two of them are
of contents, not of bytes: that of the report leaves its timings out, so that equal results have
equal configs, and that of the config leaves the digest of the report out.
"""

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.store.files import digest_json

CONFIG_FILE = "config.json"
REPORT_DIGEST = "report_blake2b"
"""Field of `quantization_config`; checkpoints of earlier versions have none."""


def report_digest(report: Mapping[str, Any]) -> str:
    """BLAKE2b of the report without timings."""
    return _digest({name: value for name, value in report.items() if name != "timings"})


def config_digest(config: Mapping[str, Any]) -> str:
    """BLAKE2b of config.json without the digest of the report."""
    forms = dict(config["quantization_config"])
    forms.pop(REPORT_DIGEST, None)
    return _digest({**config, "quantization_config": forms})


def _digest(value: Mapping[str, Any]) -> str:
    """Digest of the value that is read from the JSON of this one."""
    return digest_json(json.loads(json.dumps(value)))
