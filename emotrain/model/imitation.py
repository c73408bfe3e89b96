"""Learning another model's predictions: the divergence of the model's from the teacher's (knowledge
distillation, arXiv 1503.02531), over blocks of tokens, so that no logits [T, V] exist."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emotrain.kernels.linear_cross_entropy import IGNORE


class Imitation:
    """The loss of one micro-batch, for `linear_cross_entropy`, which gives it blocks of tokens in
    order:

        weight * temperature^2 * KL(teacher || model) + (1 - weight) * (cross entropy + z-loss)

    at every position with a target. Both distributions of the KL are those of logits divided by the
    temperature.
    """

    def __init__(self, hidden_TD: Tensor, head_VD: Tensor, weight: float, temperature: float):
        """`hidden_TD` and `head_VD` are the teacher's, without gradient."""
        self.hidden_TD, self.head_VD = hidden_TD, head_VD
        self.weight, self.temperature = weight, temperature
        self._seen = 0
        self.cross_entropy = hidden_TD.new_zeros((), dtype=torch.float32)
        """Sum so far of the cross entropy of the labels, in nats; of `z` and `kl` alike."""
        self.z, self.kl = torch.zeros_like(self.cross_entropy), torch.zeros_like(self.cross_entropy)

    def __call__(
        self, hidden_tD: Tensor, head_VD: Tensor, target_t: Tensor, z_weight: float, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss of each token, zeros (the z-loss is in it), and the gradient of the logits."""
        teacher_tD = self.hidden_TD[self._seen : self._seen + len(hidden_tD)]
        self._seen += len(hidden_tD)
        wide = torch.promote_types(hidden_tD.dtype, torch.float32)
        logits_tV = (hidden_tD @ head_VD.t()).to(wide)
        teacher_tV = (teacher_tD @ self.head_VD.t()).to(wide)
        counted_t = target_t != IGNORE
        index_t1 = torch.where(counted_t, target_t, 0)[:, None]
        lse_t = logits_tV.logsumexp(dim=1)
        cross_entropy_t = lse_t - logits_tV.gather(1, index_t1)[:, 0]
        log_q_tV = F.log_softmax(logits_tV / self.temperature, dim=1)
        log_p_tV = F.log_softmax(teacher_tV / self.temperature, dim=1)
        p_tV = log_p_tV.exp()
        kl_t = (p_tV * (log_p_tV - log_q_tV)).sum(dim=1)
        for total, part_t in (
            (self.cross_entropy, cross_entropy_t),
            (self.z, lse_t.square()),
            (self.kl, kl_t),
        ):
            total += torch.where(counted_t, part_t, 0).sum()
        labels, imitated = 1 - self.weight, self.weight * self.temperature
        loss_t = (
            labels * (cross_entropy_t + z_weight * lse_t.square())
            + imitated * self.temperature * kl_t
        )
        loss_t = torch.where(counted_t, loss_t, 0)
        if not grad:
            return loss_t, torch.zeros_like(loss_t), None
        # Of the KL: softmax of the model minus that of the teacher, over the temperature.
        grad_tV = (log_q_tV.exp() - p_tV).mul_(imitated)
        if labels:
            scale_t1 = labels * (1 + 2 * z_weight * lse_t)[:, None]
            grad_tV += scale_t1 * (logits_tV - lse_t[:, None]).exp()
            grad_tV.scatter_add_(1, index_t1, grad_tV.new_full(index_t1.shape, -labels))
        grad_tV = torch.where(counted_t[:, None], grad_tV, 0)
        return loss_t, torch.zeros_like(loss_t), grad_tV.to(hidden_tD.dtype)
