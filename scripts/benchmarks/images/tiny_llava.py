"""A tiny LLaVA: a vision tower of three blocks, a language model of four, a vocabulary of words.

Shape suffixes: B sequences, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.common.figures import say
from benchmarks.images.pictures import SIDE, WORDS, DrawnScene, scenes
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PATCH = 8
IMAGE_TOKENS = (SIDE // PATCH) ** 2
VOCABULARY = ("<pad>", "<image>", ".", *WORDS)
CAPTION_TOKENS = 16
BATCH = 32
TRAINED = 8000
"""Scenes of the training; there are 207 million captions."""


@dataclass(frozen=True)
class TinyLlava:
    """The model with its processor."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor

    @classmethod
    def load(cls, directory: Path) -> "TinyLlava":
        model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
        return cls(model, LlavaProcessor.from_pretrained(directory))

    def save(self, directory: Path) -> None:
        self.model.save_pretrained(directory)
        self.processor.save_pretrained(directory)

    def inputs(self, of: Sequence[DrawnScene], *, captions: bool) -> dict[str, Tensor]:
        """Tokens and pixels of some scenes; captions have one length."""
        ends = [f" {scene.caption} ." if captions else "" for scene in of]
        encoded: Any = self.processor(
            text=[f"<image>{end}" for end in ends],
            images=[scene.draw() for scene in of],
            return_tensors="pt",
            padding=True,
            padding_side="right",
        )
        return dict(encoded)

    @torch.no_grad()
    def captions(self, model: Any, of: Sequence[DrawnScene]) -> list[str]:
        """Greedy captions of a model, up to the full stop."""
        found = []
        for start in range(0, len(of), BATCH):
            inputs = self.inputs(of[start : start + BATCH], captions=False)
            made = model.generate(
                **inputs,
                max_new_tokens=CAPTION_TOKENS,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=2,
            )
            said = self.processor.batch_decode(made[:, IMAGE_TOKENS:])
            found += [text.partition(".")[0].strip() for text in said]
        return found


def make_llava(seed: int) -> TinyLlava:
    """Make the model with random weights, and its processor."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY.index("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    vocabulary = {word: number for number, word in enumerate(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<pad>", "<image>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
    square = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return TinyLlava(LlavaForConditionalGeneration(config), processor)


def train(tiny: TinyLlava, *, steps: int, seed: int, avoid: Sequence[DrawnScene]) -> list[float]:
    """Train all weights on other scenes; gives the mean loss of every tenth of the steps, in nats.

    Args:
        avoid: Held-out scenes, whose captions are left out.
    """
    held_out = {scene.caption for scene in avoid}
    pool = [each for each in scenes(seed, TRAINED) if each.caption not in held_out]
    # prepared once: the processor takes as long as a step
    prepared = tiny.inputs(pool, captions=True)
    model = tiny.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(steps):
        picked = torch.randint(len(pool), (BATCH,), generator=generator)
        loss = _loss(model, {name: tensor[picked] for name, tensor in prepared.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % max(steps // 10, 1) == 0:
            say(f"step {step + 1} of {steps}, loss {sum(losses[-50:]) / len(losses[-50:]):.4f}")
    tenth = max(steps // 10, 1)
    model.eval()
    return [sum(losses[i : i + tenth]) / tenth for i in range(0, steps - tenth + 1, tenth)]


def _loss(model: LlavaForConditionalGeneration, tokens: dict[str, Tensor]) -> Tensor:
    """Mean loss of the words of the captions."""
    logits = model(**tokens).logits[:, IMAGE_TOKENS - 1 : -1]
    labels_BT = tokens["input_ids"][:, IMAGE_TOKENS:].clone()
    labels_BT[tokens["attention_mask"][:, IMAGE_TOKENS:] == 0] = -100
    return cross_entropy(logits.flatten(0, 1), labels_BT.flatten())
