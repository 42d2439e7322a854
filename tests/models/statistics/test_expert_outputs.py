"""Mean outputs of experts: distances and tokens, beside plain computations on the whole model."""

import pytest
import torch
from moe.families import BLOCKS, make_moe
from torch.nn.functional import silu

from orchestrator.models.experts.module import Experts
from orchestrator.models.experts.replace import replace_experts
from orchestrator.models.shards.chunk import Chunk
from orchestrator.models.shards.lazy_model import LazyModel
from orchestrator.models.statistics.expert_outputs import OutputsCalibration


def some_chunks():
    generator = torch.Generator().manual_seed(1)
    for index in range(2):
        tokens_BT = torch.randint(3, 90, (3, 30), generator=generator)
        mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        mask_BT[0, : 7 + index] = False
        yield Chunk(index, tokens_BT * mask_BT, mask_BT)


def direct(family):
    """Mean outputs [E, H] over all real tokens, and tokens of each, of the last block's experts."""
    model = make_moe(family)
    replace_experts(model)
    experts = [module for module in model.modules() if isinstance(module, Experts)][-1]
    rows, routed = [[] for _ in range(experts.num_experts)], [0] * experts.num_experts

    def record(module, arguments):
        states, *routing = arguments
        for expert in range(module.num_experts):
            if routing:
                seen = states[mask]
                routed[expert] += int((routing[0][mask] == expert).sum())
            else:
                seen = states.view(module.num_experts, len(mask), -1)[expert][mask]
                routed[expert] += int(seen.any(dim=1).sum())
            gate, up, down = (
                module.get_submodule(f"{expert}.{part}").weight for part in ("gate", "up", "down")
            )
            rows[expert].append((silu(seen @ gate.T) * (seen @ up.T)) @ down.T)

    experts.register_forward_pre_hook(record)
    for chunk in some_chunks():
        mask = chunk.mask.flatten()
        with torch.no_grad():
            model(input_ids=chunk.tokens, attention_mask=chunk.mask.long())
    return torch.stack([torch.cat(each).double().mean(dim=0) for each in rows]), routed


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])
def test_distances_are_of_outputs_on_all_real_tokens(family, moe_checkpoint):
    """Also of tokens that the router sends elsewhere; padding has no part in it."""
    lazy_model = LazyModel.open(moe_checkpoint(family))
    with lazy_model.shard(range(BLOCKS)) as shard:
        last = [each for each in shard.linears if ".experts." in each.name][-3:]
        names = last[0].name.rsplit(".", 2)[0]
        linears = [each for each in shard.linears if each.name.startswith(names)]
        calibration = OutputsCalibration(shard, linears, lambda linear, site: "input")
        for chunk in some_chunks():
            calibration.forward(chunk)
        found = {each.name: calibration.statistic(each) for each in linears}
        tokens = calibration.expert_tokens(linears)
        calibration.close()
    means_EH, routed = direct(family)
    for expert, count in enumerate(routed):
        apart_E = (means_EH - means_EH[expert]).norm(dim=1)
        statistic = found[f"{names}.{expert}.down"]
        torch.testing.assert_close(statistic.distances_E, apart_E, rtol=1e-4, atol=1e-6)
        assert statistic.tokens == tokens[f"{names}.{expert}"] == count
        assert len(found[f"{names}.{expert}.up"].distances_E) == 0
