"""Section of the live page with the losses of refinement and training."""

from collections.abc import Mapping, Sequence

from orchestrator.pages.live.drawings import LossLine, loss_lines
from orchestrator.pages.live.losses import BlockLosses, RunLosses, SnapshotLosses
from orchestrator.pages.markup import Markup, element, section

FAINTEST = 0.25
"""Opacity of the line of the first block; that of the last one is 1."""


def losses(found: RunLosses) -> Markup | None:
    """Figures of each stage that trains: held-out and training losses."""
    figures = [each for name, blocks in found.blocks.items() for each in _of_blocks(name, blocks)]
    figures += [_of_training(found.snapshots)] if found.snapshots else []
    shown = [each for each in figures if each is not None]
    return section("Losses", element("div", *shown, class_="multiples losses")) if shown else None


def _of_blocks(name: str, blocks: Mapping[int, BlockLosses]) -> list[Markup | None]:
    """Draw the losses of blocks over epochs, relative to the held-out loss at the start."""
    held_out, train = [], []
    for n, (block, each) in enumerate(sorted(blocks.items())):
        start = each.held_out[0] if each.held_out else 0.0
        if not start > 0:
            continue
        opacity = FAINTEST + (1 - FAINTEST) * n / max(len(blocks) - 1, 1)
        relative = [loss / start for loss in each.held_out]
        says = f"block {block}: {relative[min(each.best, len(relative) - 1)]:.3f} of its start"
        points = list(enumerate(relative))
        held_out.append(LossLine(points, says, opacity, best=each.best))
        points = [(epoch, loss / start) for epoch, loss in enumerate(each.train, 1)]
        train.append(LossLine(points, f"block {block}", opacity, is_other=True))
    of = "relative to the held-out loss before it; one line per block, the last one darkest"
    return [
        _figure(
            held_out,
            "epoch",
            f"{name}: held-out sequences",
            f"Mean squared error of a block's outputs, {of}. A dot marks the kept state.",
        ),
        _figure(
            train,
            "epoch",
            f"{name}: training sequences",
            "The same on the sequences that it is trained on, before each step.",
        ),
    ]


def _of_training(snapshots: Sequence[SnapshotLosses]) -> Markup | None:
    best = min(snapshots, key=lambda each: (each.held_out, each.step))
    last = snapshots[-1]
    lines = [
        LossLine(
            [(each.step, each.train) for each in snapshots],
            f"training {last.train:.4g}",
            is_other=True,
            name="training",
        ),
        LossLine(
            [(each.step, each.held_out) for each in snapshots],
            f"held out {last.held_out:.4g}",
            best=best.step,
            name="held out",
        ),
    ]
    says = f"Loss of the whole model. Held out: {last.held_out:.4g} at step {last.step:,}"
    says += f", the lowest {best.held_out:.4g} at step {best.step:,}." if best != last else "."
    return _figure(lines, "step", "train: the whole model", says)


def _figure(lines: Sequence[LossLine], unit: str, title: str, says: str) -> Markup | None:
    drawn = loss_lines(lines, unit=unit, label=title)
    if drawn is None:
        return None
    return element(
        "figure", element("h3", title, class_="plain"), drawn, element("figcaption", says)
    )
