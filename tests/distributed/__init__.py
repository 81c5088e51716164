"""Tests of gluon_bert/distributed and tools/launch.py."""
