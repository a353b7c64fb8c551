"""The overview: targets by systems, what became of each, and its seconds."""

from __future__ import annotations

from pathlib import Path

from .systems import OURS, SYSTEMS
from .targets import TARGETS

__all__ = ["draw"]

COLORS = {
    "right": ("#7fbf7b", "right"),
    "told": ("#fee08b", "wrong, says so"),
    "quiet": ("#ef8a62", "wrong, does not say so"),
    "none": ("#d9d9d9", "not ended, or cannot"),
}


def draw(cells: dict[tuple[str, str], tuple[str, str]], path: Path) -> None:
    """Write the picture.

    :param cells: of every target and system the outcome, a key of ``COLORS``, and a few characters.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch, Rectangle

    targets = [name for name in TARGETS if any(target == name for target, _ in cells)]
    systems = [name for name in SYSTEMS if any(system == name for _, system in cells)]
    systems.sort(key=lambda name: name not in OURS)
    figure, axes = plt.subplots(
        figsize=(max(6.0, 1.6 + 0.62 * len(systems)), 1.6 + 0.32 * len(targets)), layout="constrained"
    )
    for (target, system), (kind, text) in cells.items():
        x, y = systems.index(system), targets.index(target)
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=COLORS[kind][0]))
        axes.text(x, y, text, ha="center", va="center", fontsize=7)
    axes.set(
        xlim=(-0.5, len(systems) - 0.5),
        ylim=(len(targets) - 0.5, -0.5),
        xticks=range(len(systems)),
        yticks=range(len(targets)),
    )
    axes.set_yticklabels(targets, fontsize=8)
    axes.set_xticklabels(systems, rotation=35, ha="left", fontsize=8)
    for label, name in zip(axes.get_xticklabels(), systems, strict=True):
        label.set_fontweight("bold" if name in OURS else "normal")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    handles = [Patch(color=color, label=label) for color, label in COLORS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
