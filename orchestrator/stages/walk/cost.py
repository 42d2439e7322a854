"""Cost of the stages that process blocks in order."""

from collections.abc import Mapping

from orchestrator.forecast.block_training import epochs, smaller_blocks
from orchestrator.forecast.memory import (
    PROCESS_BYTES,
    REFINED_BYTES,
    Footprint,
    activation_bytes,
    trained_block,
)
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.rates import Rates
from orchestrator.forecast.shapes import Shapes
from orchestrator.forecast.stage_cost import Parts, Setting, StageCost
from orchestrator.forecast.storage import TRAINED_BYTES
from orchestrator.forecast.work import DRIFT_FLOPS, Work, kept_values
from orchestrator.models.training.compensation_options import SITE_BYTES, TOGETHER_BYTES
from orchestrator.models.training.refine_options import RefineOptions

UNITS = {"walk": "walked blocks", "sweep": "swept blocks"}
"""Units in the run directory, by stage."""


class WalkCost(StageCost):
    """Blocks in order, each replicated by all workers: compensation, training, or both."""

    unpacks_boundary = True

    def __init__(
        self, setting: Setting, options: RefineOptions, *, name: str, refines: bool
    ) -> None:
        super().__init__(setting)
        self._name, self._options = name, options
        # if a recipe has a walk and a sweep, each is counted with compensation and training
        self._refines = refines
        self._compensates = setting.recipe.compensate != "none"

    def forecast(self, held: Footprint) -> StageForecast:
        setting, blocks = self.setting, self.setting.shapes.num_blocks
        replicas = min(setting.workers, self._options.slices)
        one = self._block()
        parameters = kept_values(setting.shapes, setting.kept)
        steps = self._options.epochs * self._options.batches if self._refines else 0
        transfers = Work(network=4.0 * parameters * steps if replicas > 1 else 0.0)
        solving = self._solves() if self._compensates else Work()

        def take(rates: Rates) -> float:
            shared = one.seconds(rates) / replicas
            return blocks * (shared + transfers.seconds(rates) + solving.seconds(rates))

        return StageForecast(
            name=self._name,
            flops=blocks * (one.flops + solving.flops),
            seconds=setting.seconds(take),
            device=walking(
                setting.shapes,
                setting.kept,
                setting.is_even,
                tokens=setting.tokens,
                sequences=setting.sequences,
                itemsize=setting.costs.itemsize,
                replicas=replicas,
                compensates=self._compensates,
                refines=self._refines,
            ),
        )

    def shares(self) -> Mapping[str, Work]:
        """A chunk, a slice of a gradient, or the solves of one block."""
        setting, costs, options = self.setting, self.setting.costs, self._options
        passed = costs.forward_in_float32(1)
        trained_in = options.batches * options.slices
        return {
            "forward_dense": costs.forward(1) + passed,
            "compensate": self._drift().times(setting.sequences) + self._solves(),
            "evaluate": passed,
            "compute_gradients": epochs(setting, options).times(1 / (options.epochs * trained_in)),
            "forward_compressed": passed,
            "commit": Work(write=float(TRAINED_BYTES * kept_values(setting.shapes, setting.kept))),
        }

    def _block(self) -> Work:
        """All passes of a block, which its replicas share."""
        costs = self.setting.costs
        # dense; compressed before and after the change, in float32
        one = costs.forward(1) + costs.forward_in_float32(2)
        if self._compensates:
            one += self._drift()
        one = one.times(self.setting.sequences)
        if self._refines:
            one += epochs(self.setting, self._options)
        return one

    def _drift(self) -> Work:
        """One sequence up to each site of a block of both models, and its moments there.

        A pass serves the sites of many experts (`routed_drift.split_sites`).
        """
        costs, shapes = self.setting.costs, self.setting.shapes
        sites = {each.site: each.in_features for each in shapes.heaviest}
        passes = costs.forward(1) + costs.forward_in_float32(1)
        # a pass ends at its site: half of the block on average
        total = passes.times(len(_passes(shapes)) / 2)
        seen = {site: shapes.routed if shapes.is_expert(site) else 1 for site in sites}
        moments = sum(
            DRIFT_FLOPS * self.setting.tokens * seen[site] * n * n for site, n in sites.items()
        )
        return total + Work(single=moments)

    def _solves(self) -> Work:
        """The solves of a block, and the products of new right factors."""
        solves = sum(4.0 * n**3 for n in self.setting.costs.input_sites)
        heaviest = self.setting.shapes.heaviest
        fitted = sum(3 * 2.0 * each.values * each.in_features for each in heaviest)
        return Work(double=solves + fitted)

    def content(self, before: Parts) -> tuple[Parts, Parts]:
        costs = self.setting.costs
        streams = 2 * (1 + 4 / costs.itemsize) * costs.boundary
        after = {**before, UNITS[self._name]: TRAINED_BYTES * self.setting.kept_values}
        return {**after, "chunks": streams}, after

    def remedy(self) -> str:
        return smaller_blocks(self.setting.recipe)


def walking(
    shapes: Shapes,
    kept: float,
    even: bool,
    *,
    tokens: int,
    sequences: int,
    itemsize: int,
    replicas: int,
    compensates: bool,
    refines: bool,
) -> Footprint:
    """Footprint of a block of both models, with dense and compressed chunks.

    Args:
        replicas: Workers that share a block, and the compressed chunks after it.
        compensates: True if moments of both inputs are gathered, site by site.
        refines: True if the block is trained.
    """
    state = tokens * sequences * shapes.hidden
    fitting = max(32 * each.in_features**2 + 32 * each.values for each in shapes.heaviest)
    gathering = max(SITE_BYTES * sum(n * n for n in together) for together in _passes(shapes))
    training = trained_block(shapes, kept, even, REFINED_BYTES if refines else 4)
    return Footprint(
        {
            "process": PROCESS_BYTES,
            "dense block": (shapes.block_values + shapes.front_values) * itemsize,
            "compressed block": 4 * shapes.front_values + training,
            "streams": int(state * (2 * itemsize + 4 + 4 / replicas)),
            "moments": max(fitting, gathering) if compensates else 0,
            "activations": activation_bytes(shapes, tokens, 4, 1),
        }
    )


def _passes(shapes: Shapes) -> list[list[int]]:
    """Channels of the sites of a block that each pass of the chunks gathers together."""
    sites = {each.site: each.in_features for each in shapes.heaviest}
    found = [[n] for site, n in sites.items() if not shapes.is_expert(site)]
    for is_last in (False, True):
        routed = [
            n
            for site, n in sites.items()
            if shapes.is_expert(site) and site.endswith(".down") == is_last
        ]
        count = max(1, TOGETHER_BYTES // (SITE_BYTES * routed[0] ** 2)) if routed else 1
        found += [routed[start : start + count] for start in range(0, len(routed), count)]
    return found
