"""Odds ratio preference optimization (ORPO) for diffusion models, without a reference model."""

from .loss import OrpoMetrics, beta_of_share, log_odds, odds_ratio_objective, orpo_loss, per_pair_error


__all__ = ["OrpoMetrics", "beta_of_share", "log_odds", "odds_ratio_objective", "orpo_loss", "per_pair_error"]
__version__ = "0.1.0"
