"""A Hydra sweeper for grids that are unions of products."""

from hydra_plugins.blocks_sweeper.sweeper import BlocksSweeper

__all__ = ["BlocksSweeper"]
