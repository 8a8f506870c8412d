"""Grow language models during pre-training: declarative recipes on torchtitan."""
