"""Tests on simulated GPUs: see README.md in this folder."""
