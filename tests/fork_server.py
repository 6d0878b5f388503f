"""Imported once by the fork server of tests/test_kills.py, so that its processes start quickly."""

# ruff: noqa: F401

import hydra
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.gpt2 import modeling_gpt2

import core.fleet
import core.methods.batchtopk
import core.methods.jumprelu
import core.methods.relu_l1
import core.methods.topk
import experiments.leask.batchtopk
import run

get_checkpoint_conversion_mapping("gpt2")
