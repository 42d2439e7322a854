"""Compressed checkpoints of orchestrator in vLLM, which finds this package by an entry point."""


def register() -> None:
    """Make the quantization method `orchestrator` known to vLLM.

    vLLM calls this once in each of its processes. A second call has no effect, and no device is
    touched. Under another release of vLLM the method is known too, and refuses to load.
    """
    import vllm

    from orchestrator_vllm.release import refusal

    if refusal(vllm.__version__):
        from orchestrator_vllm import refused  # noqa: F401 # importing it registers
    else:
        from orchestrator_vllm import config  # noqa: F401
