"""Compressed checkpoints of orchestrator in SGLang, which finds this package by an entry point."""


def register() -> None:
    """Make the quantization method `orchestrator` known to SGLang.

    SGLang calls this once in each of its processes, and only logs an error; the method is unknown
    then, and a compressed checkpoint is refused. A second call has no effect, and no device is
    touched. Under another release of SGLang the method is known too, and refuses to load.
    """
    import sglang
    from sglang.srt.layers import quantization

    from orchestrator_sglang.config import RefusedConfig, ServedConfig
    from orchestrator_sglang.release import refusal
    from orchestrator_sglang.shared.forms.config import METHOD

    config = RefusedConfig if refusal(sglang.__version__) else ServedConfig
    for table in (quantization.QUANTIZATION_METHODS, quantization.CPU_QUANTIZATION_METHODS):
        table[METHOD] = config
