"""The training loss (docs/method.md, section 8): focal on score and map, dice on the map, semantic consistency."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fbclip.model.network import TEMPERATURE

FOCAL_GAMMA = 4.0
FOCAL_SMOOTH = 1e-5  # the published focal loss softens its targets by this and adds it to the probability
DICE_WEIGHT, SCR_WEIGHT, MARGIN_WEIGHT = 0.2, 0.15, 0.5


class Losses(NamedTuple):
    """Scalars; the weights are applied already, so they add up to `total`."""

    score_focal: Tensor
    map_focal: Tensor
    map_dice: Tensor
    scr: Tensor

    @property
    def total(self) -> Tensor:
        return self.score_focal + self.map_focal + self.map_dice + self.scr


def fbclip_losses(
    score: Tensor, patch_map: Tensor, projected_last: Tensor, text: Tensor, label: Tensor, mask: Tensor
) -> Losses:
    """The four terms.

    Args:
        score: (B,) abnormal probability of the image.
        patch_map: (B, g, g) abnormal probability of the patches.
        projected_last: (B, N, E) projected tokens of the last output, not normalised.
        text: (2, E) unit text features.
        label: (B,) 0 or 1.
        mask: (B, S, S) 0 or 1.
    """
    anomaly_map = F.interpolate(patch_map[:, None], mask.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return Losses(
        focal(score, label),
        focal(anomaly_map, mask),
        DICE_WEIGHT * dice(anomaly_map, mask),
        SCR_WEIGHT * semantic_consistency(projected_last, text),
    )


def focal(probability: Tensor, target: Tensor) -> Tensor:
    """Focal loss of abnormal probabilities against 0/1 targets of the same shape, gamma 4, mean."""
    p_target = torch.where(target > 0.5, probability, 1 - probability)
    p_target = p_target * (1 - FOCAL_SMOOTH) + (1 - p_target) * FOCAL_SMOOTH
    return (-((1 - p_target).clamp_min(0) ** FOCAL_GAMMA) * p_target.log()).mean()


def dice(probability: Tensor, mask: Tensor) -> Tensor:
    """Dice loss per image, smoothed by 1, averaged over the batch; both (B, S, S)."""
    p, g = probability.flatten(1), mask.flatten(1).to(probability.dtype)
    return 1 - ((2 * (p * g).sum(1) + 1) / (p.sum(1) + g.sum(1) + 1)).mean()


def semantic_consistency(projected: Tensor, text: Tensor) -> Tensor:
    """SCR: a decided image feature, by low entropy and by a margin between the two texts."""
    feature = F.normalize(projected.mean(dim=1), dim=-1)
    r = feature @ text.mT / TEMPERATURE  # (B, 2)
    p = r.softmax(dim=-1)
    entropy = -(p * (p + 1e-8).log()).sum(dim=-1).mean()
    return entropy + MARGIN_WEIGHT * F.relu(1 - (r[:, 1] - r[:, 0]).abs()).mean()
