"""Two processes with a part of the model each give the answers of one."""

import pytest
from serving import check_answers, served


@pytest.mark.parametrize("name", ["mixed", "every-form", "one-kv-head", "phi3"])
def test_tensor_parallel(name, reference):
    """Both factors are divided over two ranks; heads of keys and values too, or shared."""
    expected = reference(name)
    with served(
        expected["model"], tensor_parallel_size=2, distributed_executor_backend="mp"
    ) as llm:
        check_answers(llm, expected)


@pytest.mark.parametrize("name", ["mixed", "shared-bases"])
def test_pipeline_parallel(name, reference):
    """Each stage has half of the blocks; bases are shared within a stage."""
    expected = reference(name)
    options = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    # an eager CPU worker makes no room for the values of the stage before
    with served(expected["model"], enforce_eager=False, **options) as llm:
        check_answers(llm, expected)
