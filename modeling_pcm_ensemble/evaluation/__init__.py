"""How sure one can be of a comparison, and what α depends on. Needs the `training` extra."""

from .statistics import bootstrap_interval, holm, omega_squared, permutation_p_value

__all__ = ["bootstrap_interval", "holm", "omega_squared", "permutation_p_value"]
