"""Recognition of models that a command cannot take, from their headers and without torch."""

from pathlib import Path

from orchestrator.errors import InputError
from orchestrator.models.checkpoint.headers import Headers, quoted, read_json
from orchestrator.store.places import Place

ADAPTER_CONFIG = "adapter_config.json"
GGUF_SUFFIX = ".gguf"


def check_format(place: Place) -> None:
    """Refuse a GGUF file, and a directory that has an adapter or GGUF files and no config.json.

    Raises:
        InputError: With the conversion by which the model becomes a checkpoint.
    """
    if not place.is_dir():
        if place.name.endswith(GGUF_SUFFIX):
            raise InputError(_gguf(place.parent, place.name))
        return
    if (place / "config.json").exists():
        return
    if (place / ADAPTER_CONFIG).exists():
        base = read_json(place / ADAPTER_CONFIG).get("base_model_name_or_path")
        of = f" of {base if isinstance(base, str) and base.isprintable() else quoted(base)}"
        raise InputError(
            f"{place}: is a PEFT adapter{of if base else ''}, not a model; merge it first: "
            f"peft.AutoPeftModelForCausalLM.from_pretrained({str(place)!r}).merge_and_unload()"
            ".save_pretrained(NEW), and copy the tokenizer to NEW"
        )
    found = sorted(path.name for path in place.iterdir() if path.name.endswith(GGUF_SUFFIX))
    if found:
        raise InputError(_gguf(place, found[0]))


def _gguf(directory: Place, name: str) -> str:
    where = str(directory) if isinstance(directory, Path) else "DIR"
    return (
        f"{directory / name}: is a GGUF file, which is quantised; give the checkpoint that it was "
        "made from, or convert it: transformers.AutoModelForCausalLM.from_pretrained("
        f"{where!r}, gguf_file={name!r}).save_pretrained(NEW), the same with AutoTokenizer"
    )


def check_compressed(directory: Path, purpose: str) -> None:
    """Refuse a directory without the headers, or the config, of a compressed checkpoint.

    Args:
        purpose: The verb of the caller, such as `push`.

    Raises:
        InputError: With what the directory holds instead.
    """
    try:
        Headers.open(directory)
    except InputError:
        check_format(directory)
        raise
    forms = read_json(directory / "config.json").get("quantization_config")
    if not isinstance(forms, dict) or forms.get("quant_method") != "orchestrator":
        raise InputError(
            f"{directory}: is not compressed by orchestrator; there is nothing to {purpose}"
        )
