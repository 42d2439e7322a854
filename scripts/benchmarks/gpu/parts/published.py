"""The published method (Cholesky factor, inverse, SVD) on the weights of `decompositions`.

A separate part and a late one: cuSOLVER's SVD of these sizes may take minutes.
"""

from benchmarks.decompositions import measure_published
from benchmarks.gpu.bench import Bench, PartResult
from benchmarks.gpu.parts.cuts import in_words, problems

WIDER = 5
"""Expected time of the wide weight over that of the square one."""


def measure(bench: Bench) -> PartResult:
    ours = bench.results.parts.get("decompositions", {}).get("figures")
    if ours is None:
        raise RuntimeError("the part decompositions has no figures; it must end before this one")
    rows, spent = [], 0.0
    for problem, own in zip(problems(bench), ours, strict=True):
        if bench.seconds_left < WIDER * spent:
            bench.say(f"{in_words(own)} left out, {bench.seconds_left:.0f} s left")
            break
        row, spent = bench.timed(lambda p=problem, o=own: measure_published(p, o["optimum"]))
        row |= {"shape": own["shape"], "over_ours": row["published_seconds"] / own["seconds"]}
        rows.append(row)
    parts = [
        f"{in_words(row)} in {row['published_seconds']:.3g} s, {row['over_ours']:.1f} times ours, "
        f"{row['published_above_optimum']:.1e} above the optimum"
        for row in rows
    ]
    return PartResult("; ".join(parts), rows)
