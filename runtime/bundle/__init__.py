"""The exported artifact: its manifest, and what it holds."""
