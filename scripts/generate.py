"""Print a line of text from each model: the most likely continuation of one beginning."""

import argparse
import os

# set before transformers is imported, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
from transformers import AutoTokenizer

from orchestrator.api import load

BEGINNING = "The most important thing about a programming language is"
NEW_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="dense or compressed")
    for directory in parser.parse_args().models:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = load(directory, dtype=torch.float32)
        tokens = tokenizer(BEGINNING, return_tensors="pt")
        with torch.inference_mode():
            (ids,) = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
        line = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
        print(f"{directory}:\n    {line}")


if __name__ == "__main__":
    main()
