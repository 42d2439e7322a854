"""Cost of the stage: every kept value is read, multiplied and written once."""

from orchestrator.forecast.memory import PROCESS_BYTES, Footprint
from orchestrator.forecast.outcome import StageForecast
from orchestrator.forecast.stage_cost import StageCost


class RescaleCost(StageCost):
    """A few bytes and FLOPs for each output."""

    def forecast(self, held):
        outputs = sum(each.out_features for each in self.setting.shapes.linears)
        return StageForecast(
            name="rescale",
            flops=float(outputs),
            seconds=self.setting.seconds(lambda rates: 0.0),
            device=Footprint({"process": PROCESS_BYTES, "diagonals": 8 * outputs}),
        )

    def content(self, before):
        after = {**before, "diagonals": 4.0 * self.setting.kept_values}
        return after, after

    def remedy(self):
        return "leave out the table [rescale]"
