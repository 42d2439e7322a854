"""Linears of a vision tower: a second stack of blocks, beside that of the language model."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orchestrator.models.forms.install import features
from orchestrator.plan.linear import Linear

DEPTHS = ("num_hidden_layers", "depth")
"""Names of the number of blocks in configs of vision towers."""


def tower_linears(model: PreTrainedModel, blocks: str) -> tuple[Linear, ...]:
    """Return the linears of the vision tower's blocks, in model order; empty without a tower.

    The stack is the list outside of the decoder with as many entries as the config says; if several
    match, the one with the most linears. A trace on text does not run it, so each linear has a
    site of its own. All belong to block 0, whose shard runs the tower.

    Args:
        blocks: Module name of the list of decoder blocks.
    """
    config = getattr(model.config, "vision_config", None)
    depth = next((getattr(config, name) for name in DEPTHS if hasattr(config, name)), None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and not f"{name}.".startswith(f"{blocks}.")
    ]
    if not stacks:
        return ()
    name, stack = max(
        stacks, key=lambda each: sum(isinstance(m, nn.Linear | Conv1D) for m in each[1].modules())
    )
    tower = next(part for part in name.split(".") if part != model.base_model_prefix)
    found = []
    for index, block in enumerate(stack):
        for role, module in block.named_modules():
            if type(module) not in {nn.Linear, Conv1D}:
                continue
            in_features, out_features = features(module)
            path = f"{name}.{index}.{role}"
            found.append(
                Linear(
                    name=path,
                    block=0,
                    role=f"{tower}.{role}",
                    site=path,
                    out_features=out_features,
                    in_features=in_features,
                    has_bias=module.bias is not None,
                    tower=tower,
                )
            )
    return tuple(found)
