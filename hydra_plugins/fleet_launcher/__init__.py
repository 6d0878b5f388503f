"""A Hydra launcher that trains what all cells of a sweep will ask for before it runs them."""

from hydra_plugins.fleet_launcher.launcher import FleetLauncher

__all__ = ["FleetLauncher"]
