"""Trained models looked at from outside: their weights read from the disk, measured, told and drawn."""
