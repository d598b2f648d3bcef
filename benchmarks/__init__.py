"""Measurements that print figures for people and, with --json, for programs."""
