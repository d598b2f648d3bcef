"""Measurements that print figures for people, and write them as JSON for programs."""
