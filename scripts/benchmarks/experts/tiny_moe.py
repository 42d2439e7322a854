"""A tiny Qwen3-MoE of bytes: three blocks of twelve experts, of which each token uses two.

Shape suffixes: B sequences, T tokens.
"""

from pathlib import Path

import torch
from benchmarks.common.figures import say
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

LENGTH = 96
BATCH = 32
BALANCE = 0.01
"""Weight of the loss that balances the router, in training alone."""


def make_moe(seed: int) -> Qwen3MoeForCausalLM:
    """Make the model with random weights, in float32."""
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            num_experts=12,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            norm_topk_prob=True,
            router_aux_loss_coef=BALANCE,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = {chr(byte): byte for byte in shown}
    characters |= {chr(256 + index): byte for index, byte in enumerate(hidden)}
    inner = Tokenizer(models.BPE(vocab=characters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def train(model: Qwen3MoeForCausalLM, text: bytes, *, steps: int, seed: int) -> list[float]:
    """Train all weights on random windows of a text; gives the mean loss of each tenth, in nats."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    losses: list[float] = []
    tenth = max(steps // 10, 1)
    for step in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch_BT = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        found = model(input_ids=batch_BT, output_router_logits=True)
        loss = _mean_loss(found.logits, batch_BT)
        optimizer.zero_grad()
        (loss + BALANCE * found.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % tenth == 0:
            say(f"step {step + 1} of {steps}, loss {sum(losses[-tenth:]) / tenth:.4f}")
    model.eval()
    return [sum(losses[i : i + tenth]) / tenth for i in range(0, steps - tenth + 1, tenth)]


def save(model: Qwen3MoeForCausalLM, directory: Path) -> None:
    """Write the model with its tokenizer."""
    model.save_pretrained(directory)
    bytes_tokenizer().save_pretrained(directory)


def _mean_loss(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
