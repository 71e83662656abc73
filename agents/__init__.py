"""Agents for mmenvs."""
