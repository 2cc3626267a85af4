"""Helpers for all packages: errors, files on disk, pictures and plots."""
