"""Compressed checkpoints of tiny random models, and what transformers makes of them.

    python make_checkpoints.py DIRECTORY [NAME ...]

Runs in orchestrator's own environment. Beside each checkpoint there is a JSON of its name: for some
prompts the greedy continuation and the log-probabilities of their tokens, by `orchestrator.load` in
float32.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import transformers
from compressed import compress, plan_of
from families import write_model
from safetensors.torch import save_file
from torch import Tensor

import orchestrator
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.linear import Linear, Survey
from orchestrator.plan.plan import Assignment, Plan

VOCABULARY = 384
GENERATED = 24
LENGTHS = (5, 17, 33, 60)
TEXTS = (
    "The river ran past seven mills before it came to the sea.",
    "Nobody at the inn could say who had built the bridge, or when. She counted 42 ships; the last",
    "def mean(values):\n    return",
)
# heads of a size that the attention of vLLM's CPU build has
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    # wide enough that tokens differ in their probabilities
    "initializer_range": 0.15,
}
GEMMA = {"sliding_window": 16, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}


def model(architecture: str, **changes: object) -> Callable[[], transformers.PreTrainedModel]:
    """Return a maker of a random model."""
    kind = getattr(transformers, architecture)
    return lambda: kind(kind.config_class(**{**SIZES, **changes}))


def multimodal() -> transformers.PreTrainedModel:
    """Make a model with a vision tower beside a language model."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**SIZES, **GEMMA},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


MODELS = {
    "llama": model("LlamaForCausalLM"),
    # one head of keys and values, which two ranks share
    "llama_one_kv_head": model("LlamaForCausalLM", num_key_value_heads=1),
    "llama_biased": model("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "mistral": model("MistralForCausalLM", sliding_window=16),
    "qwen2": model("Qwen2ForCausalLM"),
    "qwen3": model("Qwen3ForCausalLM", head_dim=64),
    "gemma2": model("Gemma2ForCausalLM", **GEMMA),
    "gemma3": model(
        "Gemma3ForCausalLM", **GEMMA, layer_types=["sliding_attention", "full_attention"] * 2
    ),
    "phi3": model("Phi3ForCausalLM"),
    "multimodal": multimodal,
    # refused: its loader puts the rows of projections in order
    "falcon": lambda: transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            multi_query=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


def low_rank(linear: Linear, fraction: float = 0.6) -> Assignment:
    return Assignment(form="low_rank", rank=int(LOW_RANK.break_even(linear) * fraction))


def pivoted(linear: Linear) -> Assignment:
    return Assignment(form="pivoted", rank=LOW_RANK.break_even(linear) + 3)


def sparse(linear: Linear) -> Assignment:
    return Assignment(form="sparse", nonzeros=linear.values // 2)


def low_rank_sparse(linear: Linear) -> Assignment:
    return Assignment(
        form="low_rank_sparse", rank=low_rank(linear, 0.3).rank, nonzeros=linear.values // 9
    )


def few_entries(linear: Linear) -> Assignment:
    """So few that their positions are stored one by one."""
    return Assignment(form="sparse", nonzeros=linear.out_features // 3)


def dense(linear: Linear) -> Assignment:
    return Assignment(form="dense")


def in_turn(*forms: Callable[[Linear], Assignment]) -> Callable[[Survey], Plan]:
    """Return a plan that gives the forms to the linears in turn, so that fused ones differ."""

    def plan(survey: Survey) -> Plan:
        turn = cycle(forms)
        return plan_of(survey, {each.name: next(turn)(each) for each in survey.linears})

    return plan


def shared(survey: Survey) -> Plan:
    """Plan bases that pairs of blocks share, of ranks that differ within a fused layer."""
    assignments = {}
    pairs = zip(survey.linears, [None] * len(survey.of_block(0)) + [*survey.linears], strict=False)
    for linear, above in pairs:
        if linear.block % 2 == 0:
            assignments[linear.name] = low_rank(linear, 0.5)
        else:
            assert above is not None
            rank = assignments[above.name].rank
            assignments[linear.name] = Assignment(form="low_rank", rank=rank, basis=above.name)
    return plan_of(survey, assignments)


MIXED = in_turn(low_rank, pivoted, dense, lambda linear: low_rank(linear, 0.4), pivoted)
CASES: dict[str, tuple[str, Callable[[Survey], Plan] | None]] = {
    "dense": ("llama", None),
    "low-rank": ("llama", in_turn(low_rank, lambda linear: low_rank(linear, 0.45))),
    "low-rank-and-dense": ("llama", in_turn(low_rank, dense, low_rank, low_rank, dense)),
    "pivoted": ("llama", in_turn(pivoted)),
    "pivoted-and-dense": ("llama", in_turn(pivoted, dense, dense, pivoted)),
    "mixed": ("llama", MIXED),
    "sparse": ("llama", in_turn(sparse, few_entries)),
    "low-rank-and-sparse": ("llama", in_turn(low_rank_sparse)),
    "every-form": (
        "llama",
        in_turn(sparse, low_rank, low_rank_sparse, pivoted, dense, few_entries),
    ),
    "shared-bases": ("llama", shared),
    "one-kv-head": ("llama_one_kv_head", MIXED),
    "biases": ("llama_biased", MIXED),
    "mistral": ("mistral", MIXED),
    "qwen2": ("qwen2", MIXED),
    "qwen3": ("qwen3", MIXED),
    "gemma2": ("gemma2", MIXED),
    "gemma3": ("gemma3", MIXED),
    "phi3": ("phi3", in_turn(low_rank, pivoted, pivoted, low_rank, dense)),
    "multimodal": ("multimodal", MIXED),
    "falcon": ("falcon", in_turn(low_rank)),
}


def prompts() -> list[list[int]]:
    """Return prompts of several lengths, always the same."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, VOCABULARY - 8, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]


@torch.no_grad()
def answers(loaded: Any, asked: list[list[int]]) -> dict[str, Any]:
    """Return prompts and continuations, and the log-probabilities of both."""
    continued, scores, chosen = [], [], []
    for prompt in asked:
        ids = torch.tensor([prompt])
        ids = loaded.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GENERATED,
            min_new_tokens=GENERATED,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=None,
        )
        logits = loaded(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
        each = logits.gather(1, ids[0, 1:, None])[:, 0].tolist()
        continued.append(ids[0, len(prompt) :].tolist())
        scores.append(each[: len(prompt) - 1])
        chosen.append(each[len(prompt) - 1 :])
    return {"prompts": asked, "continued": continued, "scores": scores, "chosen": chosen}


def make(root: Path, name: str) -> None:
    """Write the checkpoint of a case, and its reference."""
    family, plan = CASES[name]
    original = root / "originals" / family
    if not original.exists():
        write_model(MODELS[family], original)
    out = original if plan is None else root / name
    if plan is not None:
        compress(original, out, make_plan=plan)
    loaded = orchestrator.load(out, dtype=torch.float32)
    found = {"model": str(out), **answers(loaded, prompts())}
    (root / f"{name}.json").write_text(json.dumps(found))


def make_adapted(root: Path, name: str) -> None:
    """Write an adapter of the dense model's linears, and the answers with it on top of a case."""
    directory, rank, scale = root / f"{name}-adapter", 8, 2.0
    directory.mkdir()
    loaded = orchestrator.load(root / name, dtype=torch.float32)
    generator = torch.Generator().manual_seed(9)
    kinds = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    tensors: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path, module in loaded.named_modules():
            if not path.endswith(kinds):
                continue
            down_RI = torch.randn(rank, module.in_features, generator=generator) * 0.1
            up_OR = torch.randn(module.out_features, rank, generator=generator) * 0.1
            tensors[f"base_model.model.{path}.lora_A.weight"] = down_RI
            tensors[f"base_model.model.{path}.lora_B.weight"] = up_OR
            hook = adding(down_RI, up_OR * scale)
            hooks.callback(module.register_forward_hook(hook).remove)
        found = answers(loaded, prompts())
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "bias": "none"}
    config |= {"target_modules": list(kinds), "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    found |= {"model": str(root / name), "adapter": str(directory)}
    (root / f"{name}-adapted.json").write_text(json.dumps(found))


def adding(down_RI: Tensor, up_OR: Tensor) -> Callable[..., Tensor]:
    """Return a hook that adds the term of an adapter to a linear's outputs."""
    return lambda module, inputs, outputs: outputs + inputs[0] @ down_RI.T @ up_OR.T


def make_configs(root: Path) -> None:
    """Write configs, without weights, that name linears which are not served."""
    experts = {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2}
    bloom = {"hidden_size": 128, "n_head": 4, "n_layer": 1}
    low_rank = {"form": "low_rank", "rank": 2}
    up = {"model.layers.0.mlp.experts": {"up": {"form": "low_rank", "rank": [2, 2, 0, 2]}}}
    query = {"transformer.h.0.self_attention.query_key_value": low_rank}
    for name, architecture, forms, sizes in (
        ("experts", "Qwen3MoeForCausalLM", {"modules": {}, "experts": up}, SIZES | experts),
        ("bloom", "BloomForCausalLM", {"modules": query}, bloom),
    ):
        config = getattr(transformers, architecture).config_class(**sizes)
        config.architectures = [architecture]
        version = 2 if "experts" in forms else 1
        config.quantization_config = {"quant_method": "orchestrator", "format_version": version}
        config.quantization_config |= forms
        config.save_pretrained(root / "configs" / name)


def make_text_reference(root: Path, name: str) -> None:
    """Write the answers of a compressed model, which is there, to real text."""
    loaded = orchestrator.load(root / name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / name)
    asked = [tokenizer(text).input_ids for text in TEXTS]
    found = {"model": str(root / name), **answers(loaded, asked)}
    (root / f"{name}.json").write_text(json.dumps(found))


def main() -> None:
    """Write what is asked for, all but real models by default."""
    root, names = Path(sys.argv[1]).absolute(), sys.argv[2:]
    torch.set_num_threads(1)
    if not names:
        make_configs(root)
        names = [*CASES, "mixed-adapted", "low-rank-and-sparse-adapted"]
    for name in names:
        if name in CASES:
            make(root, name)
        elif name.endswith("-adapted"):
            make_adapted(root, name.removesuffix("-adapted"))
        else:
            make_text_reference(root, name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
