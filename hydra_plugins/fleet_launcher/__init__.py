"""A Hydra launcher that trains the dictionaries of all cells of a sweep before it runs the cells."""

from hydra_plugins.fleet_launcher.launcher import FleetLauncher

__all__ = ["FleetLauncher"]
