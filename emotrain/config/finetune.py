"""Settings of a run that tunes a trained model: where it begins, what it changes, whom it
imitates."""

from __future__ import annotations

from dataclasses import dataclass

from emotrain.config.kinds import NonNegativeFloat, PathText

TRUNK = ("attention", "norms", "embedding", "head")
PARTS = ("routed", "shared", "router", *TRUNK)
"""Every parameter is of one of them."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Tuning of a trained model. What is not trained stays as it is, to the bit, and has no
    gradient and no optimizer state. All of it works for a model that starts anew, too."""

    start: PathText = ""
    """Checkpoint whose weights the run begins with, at step 0, with a new optimizer and data read
    from their start. (`training.resume` goes on with the optimizer and the step of a checkpoint.)
    Once the run has checkpoints of its own, it goes on from those."""
    train: str = "all"
    """What is trained: `all`, or names with commas of `routed` (experts), `shared` (experts),
    `router`, `trunk` (the rest), `attention`, `norms`, `embedding` and `head`."""
    experts: PathText = ""
    """Routed experts that are trained, and their rows of the router, where `train` has those: a
    FILE of `emotrain select`, numbers that hold for every layer (`3,7`), `last:2` of every layer,
    or `exclusive:rust`, those of a domain. Empty: all of them."""
    teacher: PathText = ""
    """Checkpoint whose predictions are learned, by the divergence of the model's from them at every
    position that has a target. It runs without pools. Empty: none."""
    teacher_weight: NonNegativeFloat = 1.0
    """Share of that divergence in the language-model loss; the cross entropy of the labels has the
    rest."""
    temperature: float = 1.0
    """What both models' logits are divided by in the divergence. It is multiplied by the square, so
    that gradients keep their size."""

    @property
    def parts(self) -> frozenset[str]:
        """The names of `train` that are of PARTS, `all` and `trunk` written out. Others, which
        `rules` refuses, are among them."""
        names: set[str] = set()
        for name in self.train.replace(" ", "").split(","):
            names |= {"all": set(PARTS), "trunk": set(TRUNK)}.get(name, {name})
        return frozenset(names)
