"""Cases of the trial: command lines that cannot succeed, with exit code and a part of the line.

OUT is a new directory. Lines are split as by a shell; a tuple has arguments that cannot be written
so. Other hostile inputs are in `tests/fuzz` (recipes, models, run directories and checkpoints of
arbitrary content) and `tests/cli/test_bad_input.py` (damaged weights, configs and texts).
"""

RECIPE = "--keep 0.5 --calibration text.txt --executor local --samples 4 --sequence-length 32"
HERE = "--executor local --run-dir OUT"
MODELS = [
    (
        f"compress lora OUT {RECIPE}",
        4,
        "lora: is a PEFT adapter of someone/base, not a model; merge",
    ),
    ("plan lora --keep 0.5", 4, "lora: is a PEFT adapter of someone/base, not a model; merge"),
    ("plan model.gguf --keep 0.5", 4, "model.gguf: is a GGUF file, which is quantised; give the"),
    ("plan ggufs --keep 0.5", 4, "from_pretrained('ggufs', gguf_file='small-Q4.gguf').save_pret"),
    (f"compress model.gguf OUT {RECIPE}", 4, "model.gguf: is a GGUF file, which is quantised"),
    (f"compress ggufs OUT {RECIPE}", 4, "small-Q4.gguf: is a GGUF file, which is quantised"),
    (f"evaluate ggufs --text text.txt {HERE}", 4, "small-Q4.gguf: is a GGUF file"),
    (f"compress untokenised OUT {RECIPE}", 4, "untokenised: has no tokenizer (tokenizer.json, "),
    ("plan untokenised --keep 0.5", 4, "untokenised: has no tokenizer (tokenizer.json, "),
    ("plan text.txt --keep 0.5", 4, "text.txt: is a file; give its directory, or a config.json"),
    (f"compress dense/model.safetensors OUT {RECIPE}", 4, "is a file; a directory with config"),
    (f"compress someone/model OUT {RECIPE}", 4, "someone/model: neither a directory nor in the"),
    (f"compress https://host/model OUT {RECIPE}", 2, "https:// is not supported; use a local path"),
    (f"compress '' OUT {RECIPE}", 2, "model is empty; it must name something"),
    (("compress", "two\nlines", "OUT", *RECIPE.split()), 4, "'two\\nlines': no such directory"),
    (("plan", "bell\x07", "--keep", "0.5"), 4, "'bell\\x07': no such directory"),
    ("plan nowhere/at/all --keep 0.5", 4, "nowhere/at/all: no such directory"),
    ("verify nowhere", 4, "nowhere: no such directory; give the directory of a checkpoint"),
    ("export dense OUT", 4, "dense: is not compressed by orchestrator; there is nothing to export"),
]
TEXTS = [
    (
        f"compress dense OUT {RECIPE} --calibration https://host/t.txt",
        2,
        "https://host/t.txt: is a",
    ),
    (
        "plan dense --keep 0.5 --calibration https://host/t.txt",
        2,
        "https://host/t.txt: is a URL; download it",
    ),
    ("plan dense --keep 0.5 --calibration nowhere.txt", 4, "nowhere.txt: no such text file"),
    (
        f"evaluate dense --text https://host/t.txt {HERE}",
        2,
        "https://host/t.txt: is a URL; download it",
    ),
    (f"evaluate dense --text nowhere.txt {HERE}", 4, "nowhere.txt: no such text file"),
    (
        f"search dense OUT {RECIPE} --vary storage=plain --text text.txt",
        2,
        "is the calibration text",
    ),
]
VALUES = [
    ("compress dense OUT --keep much", 2, "--keep much: must be a fraction such as 0.8"),
    ("compress dense OUT --keep 1.7", 2, "keep is 1.7; it must be above 0 and at most 1"),
    ("compress dense OUT --keep 1e400", 2, "keep is inf; it must be above 0 and at most 1"),
    ("compress dense OUT --keep 0.5 --preset slow", 2, "--preset slow: must be one of fast, best"),
    ("compress dense OUT --keep 0.5 --samples 1.5", 2, "--samples 1.5: must be a whole number"),
    ("compress dense OUT --keep 0.5 --seed -1", 2, "seed is -1; it must be 0 or above"),
    (
        "compress dense OUT --keep 0.5 --workers 3..2",
        2,
        "workers is '3..2'; it must be a number of",
    ),
    ("compress dense OUT --keep 0.5 --max-shard-size 0", 2, "size is '0'; write it like"),
    (f"compress dense OUT {RECIPE} --method svd-lm", 2, "method is 'svd-lm'; it must be one of"),
    ("compress dense OUT --keep 0.5 --option keep.x=1", 2, "keep is a field of the recipe, not a"),
    ("compress dense OUT --keep 0.5 --option x", 2, "option is 'x'; write it like mgaa.t=0.5"),
    (
        f"compress dense OUT {RECIPE} --option mgaa.t=0.5",
        2,
        "option mgaa.t has no effect; mgaa has",
    ),
    ("plan dense --keep 0.8,0.6", 2, "plan takes one keep, not several"),
    ("plan dense --keep 0.5 --gpus many", 2, "--gpus many: must be a whole number"),
    ("plan dense --keep 0.5 --gpu X900", 2, "gpu is 'X900'; it must be one of H100"),
    ("plan dense --keep 0.5 --rates nowhere.json", 4, "nowhere.json: no such file; `orchestrator"),
    ("measure nowhere/rates.json", 2, "nowhere: no such directory; create it, or name another"),
    ("verify dense --linears -1", 2, "linears is -1; it must be 0 or above"),
    (
        f"search dense OUT {RECIPE} --vary storage --text t.txt",
        2,
        "vary is 'storage'; write it like",
    ),
    (
        f"compress dense OUT {RECIPE} --target *.q_proj,*.k_prj",
        2,
        "selector '*.k_prj' matches none",
    ),
    (
        f"compress dense OUT {RECIPE} --target re:(",
        2,
        "selector 're:(' is not a regular expression",
    ),
    (f"compress dense OUT {RECIPE} --ignore *", 2, "no linear remains: 28 targeted, all of them"),
]
FLAGS = [
    ("", 2, "required: COMMAND; see orchestrator --help"),
    ("comprss dense OUT", 2, "unknown command comprss; near misses: compress, compare; see orch"),
    ("compress dense OUT --kep 0.5", 2, "unknown flag --kep; near misses: --keep, --help"),
    ("compress dense OUT more", 2, "surplus argument more; see orchestrator compress --help"),
    ("compress --keep 0.5", 2, "recipe: model and out missing; give them as arguments or in a"),
    ("--verbose status dense", 2, "--verbose must follow the command status"),
    ("evaluate dense", 2, "neither a text nor tasks are given; give --text or --tasks"),
    ("submit -- compress dense OUT --kep 0.5", 2, "unknown flag --kep; near misses: --keep"),
    ("submit -- compress dense relative", 2, "give an absolute path that all nodes can access"),
]
PLACES = [
    ("compress --recipe table.toml", 2, "table.toml: fields are in a table [compress]; write them"),
    ("compress --recipe nowhere.toml", 2, "nowhere.toml: cannot read the recipe: No such file"),
    ("compress --recipe text.txt", 2, "text.txt: not a TOML file"),
    ("compress --recipe dense/model.safetensors", 2, "model.safetensors: not a TOML file"),
    (f"compress dense text.txt {RECIPE}", 2, "text.txt: is a file; give a directory that is new"),
    (f"compress dense '' {RECIPE}", 2, "out is empty; it must name something"),
    (f"compress dense ftp://host/out {RECIPE}", 2, "ftp:// is not supported; use a local path"),
    (f"compress dense OUT {RECIPE} --run-dir dense", 2, "dense is the model"),
    ("status dense", 4, "dense: is not a run directory: run.json does not exist"),
    ("clean .", 4, "is not a run directory: run.json does not exist"),
    ("report nowhere", 4, "nowhere: is not a run directory: run.json does not exist"),
    ("compare nowhere", 2, "1 run given; name two or more to compare"),
    ("retarget dense OUT --keep 0.5", 4, "dense: is not a run directory: run.json does not exist"),
    ("retarget nowhere OUT --keep 0.5,0.5", 2, "keep: 0.5, 0.5 contains a size twice"),
    ("export dense text.txt", 4, "dense: is not compressed by orchestrator"),
]
PATHS = [
    (f"compress dense / {RECIPE}", 2, "out: / is a root; give a directory that is new or empty"),
    (f"compress dense loop {RECIPE}", 2, "loop is a link without a target; give a new directory"),
    (f"compress dense dangling/out {RECIPE}", 2, "dangling is a link without a target; give a new"),
    (f"compress dense text.txt/out {RECIPE}", 2, "text.txt is a file; give a new directory"),
    (f"compress dense OUT {RECIPE} --run-dir text.txt/run", 2, "text.txt is a file; give a new"),
    (f"compress dense /dev/null {RECIPE}", 2, "/dev/null: is a file; give a directory that is"),
    (f"compress dense OUT {RECIPE} --run-dir /proc/run", 1, "/proc/run/hold.json: cannot be writ"),
    (f"compress loop OUT {RECIPE}", 4, "loop: neither a directory nor in the local hub cache"),
    ("export dense loop", 4, "dense: is not compressed by orchestrator"),
    ("measure /proc/rates.json", 2, "/proc: cannot be written to; name a file in another"),
    ("report dense --output text.txt/page.html", 4, "dense: is not a run directory"),
    ("status text.txt", 4, "text.txt: is a file, not a run directory"),
    ("clean /", 4, "/: is not a run directory: run.json does not exist"),
    ("watch text.txt", 4, "text.txt: is not a run directory"),
]
WRITTEN = [
    (f"compress dense OUT {RECIPE} --calibration latin.txt", 4, "byte 0xe9 at offset 11 is n"),
    (f"compress dense OUT {RECIPE} --calibration utf16.txt", 4, "byte 0xff at offset 0 is not"),
    (f"compress dense OUT {RECIPE} --calibration empty.txt", 4, "1 document with 0 tokens give"),
    (f"compress dense OUT {RECIPE} --calibration table.csv", 2, "table.csv: text files end in"),
    (f"compress dense OUT {RECIPE} --calibration dense", 4, "dense: no text files in this direc"),
    (f"compress dense OUT {RECIPE} --calibration loop", 4, "loop: no such text file or direct"),
    (f"compress dense OUT {RECIPE} --calibration small.parquet", 4, "small.parquet: not a reada"),
    (f"compress dense OUT {RECIPE} --workers 0", 2, "workers is 0; it must be a number of 1 or"),
    (f"compress dense OUT {RECIPE} --threads 0", 2, "threads is 0; it must be 1 or above"),
    (f"compress dense OUT {RECIPE} --keep nan", 2, "keep is nan; it must be above 0 and at most"),
    (f"compress dense OUT {RECIPE} --keep -0.5", 2, "keep is -0.5; it must be above 0 and at"),
    (f"compress dense OUT {RECIPE} --gpu", 2, "unknown flag --gpu"),
    ("compress --model dense --out OUT --keep 0.5", 2, "unknown flag --model"),
    ("plan dense --keep 0.5 --price nan", 2, "price is nan; it must be 0 or above"),
    ("watch nowhere --port 99999", 2, "port is 99999; it must be 0 (any) to 65535"),
    ("push dense someone/model", 4, "dense: is not compressed by orchestrator; there is nothing"),
    ("push nowhere a/b/c", 2, "repo is 'a/b/c'; it must be OWNER/NAME of a model hub"),
]
CASES = [*MODELS, *TEXTS, *VALUES, *FLAGS, *PLACES, *PATHS, *WRITTEN]
IS_SHOWN = {(str(case[0]).partition(" ")[0], case[1]): case for case in reversed(CASES)}
INSTALLED = [*IS_SHOWN.values()]
"""The first case of each verb and exit code, for the installed script."""
TEXT = "--keep 0.5 --calibration text.txt"
EARLY = [
    ("retarget run OUT --keep 2", 2),
    ("retarget run OUT --keep 0.5,0.5", 2),
    ("retarget run OUT --keep 0.5,7", 2),
    ("retarget nowhere OUT --keep 0.5", 4),
    ("push nowhere someone/model", 4),
    ("push plain a/b/c", 2),
    ("export nowhere OUT", 4),
    ("verify plain --linears -1", 2),
    (f"compress dense OUT {TEXT} --option mgaa.t=0.5", 2),
    (f"compress dense OUT {TEXT} --method svd-lm", 2),
    (f"compress nowhere/at/all OUT {TEXT}", 4),
    ("compress dense OUT --keep 0.5", 2),
    ("compress dense OUT --keep 0.5 --calibration nowhere.txt", 4),
    ("compress dense OUT --keep 0.5 --calibration table.csv", 2),
    ("compress dense OUT --keep 0.5,2 --calibration text.txt", 2),
    ("evaluate nowhere/at/all --text text.txt", 4),
    ("evaluate dense --text nowhere.txt", 4),
    ("evaluate dense --text text.txt --against nowhere/at/all", 4),
    ("measure nowhere/rates.json", 2),
    (f"compress dense dense/small {TEXT}", 2),
    (f"compress dense OUT --run-dir dense/run {TEXT}", 2),
    (f"compress dense run/small --run-dir run {TEXT}", 2),
    ("retarget run run/small --keep 0.5", 2),
    ("retarget run run/small --keep 0.6,0.5", 2),
    ("retarget run dense/small --keep 0.5", 2),
]
"""Command lines with exit codes that are refused before torch is imported."""
