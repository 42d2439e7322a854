"""Dtypes to which the tensors of a model are cast when they are loaded."""

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation


def loaded_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Dtype of each tensor by its name; a class keeps some of its own in a wider one."""
    kept, dtype_by_group = None, {}
    if plan := model._get_dtype_plan(dtype):
        kept, dtype_by_group, _ = build_glob_alternation(list(plan))
    dtypes = {}
    for name, tensor in model.state_dict().items():
        match = kept.search(name) if kept else None
        dtypes[name] = plan[dtype_by_group[match.lastgroup]] if match else tensor.dtype
    return dtypes
