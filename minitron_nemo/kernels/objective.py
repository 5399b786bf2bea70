"""What the losses minimise, per token."""

from __future__ import annotations

from dataclasses import dataclass

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Objective:
    """logits_weight * [T^2] * divergence + ce_weight * cross-entropy, per token.

    With p the teacher's and q the student's softmax(logits / T): forward_kl = KL(p || q), reverse_kl = KL(q || p),
    jsd = beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (2306.13649 section 2). T^2 keeps
    gradients of one size over temperatures (1503.02531 section 2). Cross-entropy is at temperature 1.
    """

    divergence: str = "forward_kl"
    temperature: float = 1.0
    temperature_squared: bool = True
    jsd_beta: float = 0.5
    logits_weight: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence {self.divergence!r}: expected one of {', '.join(DIVERGENCES)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: must be positive")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(
                f"jsd_beta {self.jsd_beta}: must lie between 0 and 1; at the ends the Jensen-Shannon divergence is 0, "
                "use forward_kl or reverse_kl"
            )

    @property
    def divergence_scale(self) -> float:
        return self.temperature**2 if self.temperature_squared else 1.0
