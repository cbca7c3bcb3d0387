"""How sure one can be of a comparison, and what α depends on."""

from .statistics import bootstrap_interval, omega_squared

__all__ = ["bootstrap_interval", "omega_squared"]
