"""Runs of the golden record: fields of the recipe, by the name of the case.

Every method, preset, stage, form, allocation and number format has one; `test_golden` checks this
for methods, allocations, presets and the choices of a recipe.
"""

from typing import Any

SMALL: dict[str, Any] = {
    "model": "llama",
    "calibration": "text.txt",
    "method": "svd-llm",
    "keep": 0.5,
    "samples": 4,
    "sequence_length": 32,
    "executor": "local",
    "threads": 1,
}
"""Default fields of a case."""
_REFINEMENT = {"refinement": {"epochs": 2, "batches": 2, "learning_rate": 1e-3}}
_TRAINING = {
    "training": {"epochs": 2, "batches": 2, "every": 2, "learning_rate": 1e-3, "top_k": 24}
}
_UNFITTED = {"basis-sharing": {"refit": "never"}}
_INITIAL = {"cap": {"stage2": False}}
_FEW_TRIALS = {"strs": {"grid": "0.4 0.8", "windows": 1}}
_FEW_STEPS = {"rate": 0.25, "penalty": 0.01, "growth": 2.0, "growth_every": 1, "batch": 2}

_METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "asvd": {"method": "asvd"},
    "asvd-uniform": {
        "method": "asvd",
        "allocation": "uniform",
        "options": {"asvd": {"alpha": 0.75}},
    },
    "svd-llm": {"method": "svd-llm"},
    "svd-llm-v2": {"method": "svd-llm-v2"},
    "basis-sharing": {"method": "basis-sharing", "keep": 0.7},
    "basis-sharing-refit": {"method": "basis-sharing"},
    "d-rank": {"method": "d-rank"},
    "d-rank-shared": {"method": "d-rank", "options": {"d-rank": {"group": 2}}},
    "mgaa": {"method": "mgaa"},
    "bolaco": {"method": "bolaco"},
    "bolaco-pooled": {"method": "bolaco", "options": {"bolaco": {"covariance": "pooled"}}},
    "lpaf": {"method": "lpaf"},
    "lpaf-inputs": {
        "method": "lpaf",
        "options": {"lpaf": {"norm": "inputs", "weights": "none", "density": 0.8}},
    },
    "cap": {"method": "cap", "options": {"cap": {"iterations": 2, "samples": 2, "chunks": 2}}},
    "cap-fixed": {
        "method": "cap",
        "options": {
            "cap": {
                "solver": "admm_fixed_mu",
                "utility": "magnitude",
                "buckets": 0,
                "init": "magnitude",
                "projection": "multiplicative",
                "baseline": "ema",
                "iterations": 2,
                "samples": 2,
                "chunks": 2,
            }
        },
    },
    "two-sided": {"method": "two-sided"},
    "two-sided-draws": {"method": "two-sided", "options": {"two-sided": {"draws": 2}}, "seed": 7},
    "grasp": {"method": "grasp"},
    "two-sided-sparse": {"method": "two-sided-sparse"},
    "two-sided-sparse-unfitted": {
        "method": "two-sided-sparse",
        "keep": 0.7,
        "options": {"two-sided-sparse": {"steps": 0, "densities": "0 0.2 0.5"}},
    },
    "wanda": {"method": "wanda"},
    "expert-sharing": {"model": "qwen3_moe", "method": "expert-sharing"},
    "reap": {"model": "qwen3_moe", "method": "reap"},
    "merge-experts": {"model": "qwen3_moe", "method": "merge-experts"},
}
_ALLOCATIONS: dict[str, dict[str, Any]] = {
    "allocation-svd-llm-v2": {"method": "svd", "allocation": "svd-llm-v2"},
    "allocation-d-rank": {"allocation": "d-rank"},
    "allocation-mgaa": {"method": "two-sided", "allocation": "mgaa"},
    "allocation-learned": {
        "method": "two-sided",
        "allocation": "learned",
        "options": {"learned": {**_FEW_STEPS, "steps": 20, "every": 2}},
    },
    "allocation-path": {
        "method": "two-sided",
        "allocation": "path",
        "options": {"path": {"step": 0.05, "every": 2, "batch": 2}},
    },
    "allocation-soco": {
        "method": "two-sided",
        "allocation": "soco",
        "options": {"soco": {"rate": 0.3, "steps": 8, "every": 4, "batch": 2, "target": 0.5}},
    },
    "allocation-strs": {"allocation": "strs", "options": _FEW_TRIALS},
    "allocation-strs-curvature": {
        "method": "two-sided",
        "allocation": "strs",
        "options": _FEW_TRIALS,
    },
    "allocation-search": {
        "allocation": "search",
        "options": {
            "search": {"text": "held_out.txt", "sequences": 2, "trials": 5, "sampler": "random"}
        },
    },
    "allocation-threshold": {"allocation": "threshold"},
    "allocation-lorc": {
        "method": "svd",
        "allocation": "lorc",
        "target": ("*.k_proj", "*.v_proj"),
        "keep": None,
        "keep_cache": 0.5,
    },
    "bytes-factors": {"keep": None, "keep_bytes": 0.6},
    "bytes-pivoted": {"keep": None, "keep_bytes": 0.6, "storage": "pivoted"},
    "bytes-sparse": {"method": "wanda", "keep": None, "keep_bytes": 0.5},
    "dense": {"keep": 1.0},
    "multiples": {"rank_multiple": 2},
    "multiples-pivoted": {"method": "two-sided", "storage": "pivoted", "rank_multiple": 4},
}
_STAGES: dict[str, dict[str, Any]] = {
    "refit": {"options": {"svd-llm": {"refit": "always"}}, "keep": 0.8},
    "refit-pivoted": {"options": {"svd-llm": {"refit": "always"}}, "storage": "pivoted"},
    "pivot": {"storage": "pivoted"},
    "pivot-two-sided": {"method": "two-sided", "storage": "pivoted"},
    "pivot-strs": {"storage": "pivoted", "allocation": "strs", "options": _FEW_TRIALS},
    "walk-input": {"compensate": "input"},
    "walk-anchored": {"compensate": "anchored", "storage": "pivoted"},
    "walk-blend": {
        "method": "two-sided",
        "compensate": "blend",
        "options": {"compensation": {"beta": 0.25, "basis": "kept"}},
    },
    "walk-refined": {"compensate": "anchored", "refine": "in_order", "options": _REFINEMENT},
    "walk-then-blocks": {"compensate": "input", "refine": "blocks", "options": _REFINEMENT},
    "in-order": {
        "refine": "in_order",
        "options": {"refinement": {**_REFINEMENT["refinement"], "slices": 2, "clip": 0.001}},
    },
    "blocks": {"refine": "blocks", "options": _REFINEMENT},
    "blocks-dense": {
        "refine": "blocks",
        "target": ("*mlp*",),
        "options": {"refinement": {**_REFINEMENT["refinement"], "dense": True}},
    },
    "swept": {"refine": "swept", "storage": "pivoted", "options": _REFINEMENT},
    "train-all": {"train": "all", "options": _TRAINING},
    "train-lean": {
        "train": "lean",
        "options": {"training": {**_TRAINING["training"], "clip": 0.01, "temperature": 2.0}},
    },
    "train-light": {"train": "light", "storage": "pivoted", "options": _TRAINING},
    "train-recomputed": {
        "train": "all",
        "options": {
            "training": {**_TRAINING["training"], "targets": "recomputed", "cross_entropy": 0.1}
        },
    },
}
_FORMS: dict[str, dict[str, Any]] = {
    f"trained-{name}": {
        **fields,
        "refine": "blocks",
        "train": "all",
        "options": {**fields.get("options", {}), **_REFINEMENT, **_TRAINING},
    }
    for name, fields in {
        "pivoted": {"storage": "pivoted"},
        "sparse": {"method": "wanda"},
        "low-rank-sparse": {"method": "cap", "options": _INITIAL},
        "two-sided-sparse": {"method": "two-sided-sparse"},
        "shared-basis": {"method": "basis-sharing", "options": _UNFITTED},
    }.items()
}
_NUMBERS: dict[str, dict[str, Any]] = {
    "bfloat16": {"model": "llama_bf16"},
    "bfloat16-two-sided": {"model": "llama_bf16", "method": "two-sided", "storage": "pivoted"},
    "bfloat16-trained": {
        "model": "llama_bf16",
        "refine": "blocks",
        "train": "all",
        "options": {**_REFINEMENT, **_TRAINING},
    },
    "bfloat16-sparse": {"model": "llama_bf16", "method": "two-sided-sparse"},
    "to-bfloat16": {"dtype": "float64", "output_dtype": "bfloat16"},
    "to-float16": {"dtype": "bfloat16", "output_dtype": "float16", "storage": "pivoted"},
    "to-float32": {"model": "llama_bf16", "dtype": "float32", "output_dtype": "float32"},
    "to-float64": {"output_dtype": "float64", "method": "wanda"},
    "columns": {"model": "llama_wide", "method": "wanda", "keep": 0.045},
    "positions": {"model": "llama_wide", "method": "wanda", "keep": 0.015},
}
_INPUTS: dict[str, dict[str, Any]] = {
    "random-windows": {"sampling": "random", "seed": 3, "samples": 3},
    "padded-documents": {
        "calibration": "text.jsonl",
        "layout": "padded",
        "sequence_length": 64,
        "method": "two-sided",
    },
    "targets": {"target": ("*_proj",), "ignore": ("re:.*[12].*down_proj", "*v_proj")},
    "several-files": {"max_shard_size": "12KB"},
    "cut-in-three": {"model": "llama_three", "shards": 3, "method": "two-sided"},
    "family-gemma2": {"model": "gemma2", "method": "two-sided", "storage": "pivoted"},
    "family-phi3": {"model": "phi3", "method": "two-sided-sparse"},
    "family-gpt2": {"model": "gpt2", "storage": "pivoted"},
    "family-gpt2-trained": {
        "model": "gpt2",
        "method": "two-sided",
        "refine": "blocks",
        "train": "light",
        "options": {**_REFINEMENT, **_TRAINING},
    },
}
_PRESETS: dict[str, dict[str, Any]] = {
    "preset-fast": {"preset": "fast"},
    "preset-best": {
        "preset": "best",
        "options": {
            "refinement": {"epochs": 2, "batches": 2},
            "training": {"epochs": 2, "batches": 2, "every": 1, "top_k": 24},
        },
    },
}
_THREE = {name: {"model": "llama_three", **fields} for name, fields in _METHODS.items()}
_UNNAMED = {name: value for name, value in SMALL.items() if name != "method"}
CASES: dict[str, dict[str, Any]] = {
    name: {**(_UNNAMED if "preset" in fields else SMALL), **fields}
    for group in (_THREE, _ALLOCATIONS, _STAGES, _FORMS, _NUMBERS, _INPUTS, _PRESETS)
    for name, fields in group.items()
}

RETARGETED: dict[str, dict[str, Any]] = {
    "pivot": {"keep": 0.4},
    "cap": {"keep": 0.6},
    "preset-best": {"keep_bytes": 0.7},
}
"""Fields of another size made from the run of a case."""
EVALUATED: dict[str, dict[str, Any]] = {
    "preset-fast": {"against": "llama"},
    "wanda": {"layout": "padded", "text": "text.jsonl", "sequence_length": 64},
    "bfloat16-two-sided": {"against": "llama_bf16", "dtype": "float32"},
}
"""Arguments of an evaluation of a case's checkpoint."""
VERIFIED = ("preset-fast", "wanda", "basis-sharing", "cap", "bfloat16-trained", "family-gpt2")
"""Cases whose checkpoint is verified against its dense model, and exported."""
INTERRUPTED: dict[str, tuple[str, int]] = {"pivot": ("write", 0), "preset-best": ("train", 2)}
"""Cases that are also recorded unfinished: stage, and number of its units, at which to stop."""
