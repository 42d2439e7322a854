"""Compressed checkpoints of tiny random models, and what transformers makes of them.

    python make_checkpoints.py DIRECTORY [NAME ...]

Runs in orchestrator's own environment. Every directory gets a `reference.json`: for each prompt the
greedy continuation and the log-probabilities of its tokens, by `orchestrator.load` in float32.
"""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch
import transformers
from compressed import compress, plan_of
from families import write_model

import orchestrator
from orchestrator.plan.forms import LOW_RANK
from orchestrator.plan.linear import Linear, Survey
from orchestrator.plan.plan import Assignment, Plan

VOCABULARY = 384
GENERATED = 24
LENGTHS = (5, 17, 33, 60)
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
    """Make a model with a vision tower around a language model."""
    text = {**SIZES, **GEMMA, "vocab_size": VOCABULARY}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


MODELS = {
    "llama": model("LlamaForCausalLM"),
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
    "biases": ("llama_biased", MIXED),
    "mistral": ("mistral", MIXED),
    "qwen2": ("qwen2", MIXED),
    "qwen3": ("qwen3", MIXED),
    "gemma2": ("gemma2", MIXED),
    "gemma3": ("gemma3", MIXED),
    "phi3": ("phi3", in_turn(low_rank, pivoted, pivoted, low_rank, dense)),
    "multimodal": ("multimodal", MIXED),
}


def prompts() -> list[list[int]]:
    """Return prompts of several lengths, always the same."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, VOCABULARY - 8, (length,), generator=generator).tolist()
        for length in LENGTHS
    ]


@torch.no_grad()
def reference(directory: Path) -> dict[str, list[list[float]] | list[list[int]]]:
    """Return prompts, continuations and log-probabilities."""
    loaded = orchestrator.load(directory, dtype=torch.float32)
    found: dict[str, list[list[float]] | list[list[int]]] = {"prompts": prompts()}
    continued, scores = [], []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        logits = loaded(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
        scores.append(logits.gather(1, ids[0, 1:, None])[:, 0].tolist())
        ids = loaded.generate(
            input_ids=ids, max_new_tokens=GENERATED, do_sample=False, eos_token_id=None
        )
        continued.append(ids[0, len(prompt) :].tolist())
    return found | {"continued": continued, "scores": scores}


def make(root: Path, names: list[str]) -> Iterator[Path]:
    """Yield the directory of every case, once it is there."""
    for name in names:
        family, plan = CASES[name]
        original = root / "originals" / family
        if not original.exists():
            write_model(MODELS[family], original)
        out = original if plan is None else root / name
        if plan is not None:
            compress(original, out, make_plan=plan)
        (root / f"{name}.json").write_text(json.dumps({"model": str(out), **reference(out)}))
        yield out


def main() -> None:
    root, *names = sys.argv[1:]
    torch.set_num_threads(1)
    for directory in make(Path(root), names or list(CASES)):
        print(directory, flush=True)


if __name__ == "__main__":
    main()
