"""Adversarial training in single steps (ELLE and its peers), attacks, and what a robust model is held against."""

from torchlin.robust._ball import normalized_ball
from torchlin.robust.adaptive import AdaptiveLambda
from torchlin.robust.attacks import apgd, fgsm, multi_targeted, n_fgsm, pgd, square
from torchlin.robust.diagnostics import gradient_alignment, linearity_error
from torchlin.robust.elle import ELLE, CollapseWarning
from torchlin.robust.evaluation import Evaluation, evaluate
from torchlin.robust.peers import CURE, LLR, TRADES, GradAlign
from torchlin.robust.training import Training, adversarial_loss, train

__all__ = [
    "CURE",
    "ELLE",
    "LLR",
    "TRADES",
    "AdaptiveLambda",
    "CollapseWarning",
    "Evaluation",
    "GradAlign",
    "Training",
    "adversarial_loss",
    "apgd",
    "evaluate",
    "fgsm",
    "gradient_alignment",
    "linearity_error",
    "multi_targeted",
    "n_fgsm",
    "normalized_ball",
    "pgd",
    "square",
    "train",
]
