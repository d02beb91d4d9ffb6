"""Furniture that every room needs: errors, pictures, checkpoints, figures."""
